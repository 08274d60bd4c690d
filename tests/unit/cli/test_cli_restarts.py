# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl while the daemon goes away: what is repeated, what isn't, what is said, how descriptors arrive."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_daemon import DOMAIN, INFO, FakeDaemon, Guest
from virtd import errors
from virtd.cli import client
from virtd.cli.follow import Cursor
from virtd.cli.link import Link
from virtd.cli.log import chunks
from virtd.cli.main import main

if TYPE_CHECKING:
    pass

CHANGED = {"name": "web1", "changed": True, "pid": 1}


@pytest.mark.parametrize("command", ["start", "stop", "suspend", "resume", "autostart", "undefine", "shutdown"])
def test_a_call_that_broke_is_sent_again(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    method = command.capitalize()
    daemon.answers[method] = CHANGED
    daemon.dies_on = [method, method]
    assert main([command, "web1"]) == 0
    assert len(daemon.asked(method)) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["kill", "reboot"])
def test_what_must_not_happen_twice_is_not_sent_again(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    method = command.capitalize()
    daemon.answers[method] = CHANGED
    daemon.dies_on = [method]
    assert main([command, "web1"]) == 1
    assert len(daemon.asked(method)) == 1
    assert "it isn't known whether this was done" in capsys.readouterr().err


def test_undefined_by_the_first_attempt(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["Undefine"] = errors.NotFound("There is no domain web1")
    assert main(["undefine", "web1"]) == 4
    daemon.dies_on = ["Undefine"]
    assert main(["undefine", "web1"]) == 0
    assert "no domain" in capsys.readouterr().err


def test_ended_while_the_daemon_was_away(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["Shutdown"] = errors.InvalidState("web1 is stopped")
    daemon.answers["Info"] = {"object": INFO | {"state": "stopped"}}
    assert main(["shutdown", "web1"]) == 1
    daemon.dies_on = ["Shutdown"]
    assert main(["shutdown", "web1"]) == 0
    daemon.answers["Info"] = {"object": INFO | {"state": "paused"}}
    daemon.dies_on = ["Shutdown"]
    assert main(["shutdown", "web1"]) == 1
    assert capsys.readouterr().err.count("Failed to shut down web1: web1 is stopped") == 2


def test_a_shutdown_waits_on_with_what_is_left(daemon: FakeDaemon) -> None:
    daemon.answers["Shutdown"] = CHANGED
    daemon.dies_on = ["Shutdown"]
    assert main(["shutdown", "--timeout", "50", "web1"]) == 0
    first, second = (asked["timeout"] for asked in daemon.asked("Shutdown"))
    assert second < first <= 50


def test_a_call_waits_for_a_daemon_that_is_away(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["List"] = {"objects": [DOMAIN]}
    daemon.stop()
    back = threading.Timer(0.3, daemon.start)
    back.start()
    assert main(["list", "--json"]) == 0
    back.join()
    captured = capsys.readouterr()
    assert "web1" in captured.out
    assert captured.err == ""


def test_a_longer_absence_is_told(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "QUIET", 0.1)
    daemon.answers["Start"] = CHANGED
    started = threading.Event()

    def die(call: Any) -> None:
        started.set()
        call.until(lambda: False)

    daemon.answers["Start"] = die

    def restart() -> None:
        started.wait()
        daemon.stop()
        daemon.answers["Start"] = CHANGED
        back = threading.Event()
        back.wait(0.6)
        daemon.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert main(["start", "web1"]) == 0
    thread.join()
    assert capsys.readouterr().err == "virtdctl: virtd went away, waiting for it to come back...\n"


def test_a_daemon_that_doesnt_come_back(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    def die(call: Any) -> None:
        os.unlink(daemon.path)
        call.connection.shutdown(socket.SHUT_RDWR)

    daemon.answers["Start"] = die
    assert main(["start", "web1", "--daemon-timeout", "0.2"]) == 1
    assert capsys.readouterr().err == (
        "Failed to start web1: virtd went away and didn't come back within 0.2 s\nHint: systemctl status virtd\n"
    )


def test_a_daemon_that_takes_connections_and_never_answers(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["List"] = lambda call: call.until(lambda: False) and None
    assert main(["list", "--daemon-timeout=0.2"]) == 1
    assert "virtd didn't answer within 0.2 s" in capsys.readouterr().err


def test_a_backlog_that_is_full(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["List"] = {"objects": []}
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        path = str(tmp_path / "full.sock")
        full.bind(path)
        full.listen(0)
        waiting.connect(path)
        session = client.Session(path, 0.3)
        with pytest.raises(errors.TimedOut, match=r"answer|connections"):
            session.call("List")


def test_a_viewer_doesnt_wake_a_daemon_that_was_stopped(daemon: FakeDaemon, tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    daemon.guest(guest)
    guest.write(b"before")
    cgroups = tmp_path / "system.slice"
    processes = cgroups / "virtd.service" / "cgroup.procs"
    processes.parent.mkdir(parents=True)
    processes.write_text("4711\n")
    session = client.Session(daemon.path, None, wakes=False, cgroups=str(cgroups))
    seen: list[bytes] = []
    cursor = Cursor("web1", "console", -1, print)
    viewer = threading.Thread(target=lambda: seen.extend(chunks(session, cursor, follow=True)), daemon=True)
    link = Link(session, lambda _again: ("Status", {}), more=False)
    viewer.start()
    while len(daemon.asked("Follow")) < 2:
        time.sleep(0.01)
    daemon.answers["Status"] = {"status": {}}
    link.open()
    while link.receive() is None:
        time.sleep(0.01)

    processes.write_text("")
    daemon.restart()
    guest.write(b" and after")
    asked = len(daemon.calls)
    assert link.receive() is None
    for _ in range(30):
        assert link.poll_fd(time.monotonic()) == -1
        time.sleep(0.01)
    assert len(daemon.calls) == asked
    assert seen == [b"before"]
    processes.unlink()
    assert session.must_wait()

    processes.write_text("4712\n")
    guest.state = "stopped"
    viewer.join()
    assert b"".join(seen) == b"before and after"
    while link.poll_fd(time.monotonic()) < 0:
        time.sleep(0.01)
    link.close()
    cursor.close()
    guest.close()


def test_descriptors_come_with_their_reply_and_close_with_it(daemon: FakeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")

    def follow(call: Any) -> None:
        fd = os.open(file, os.O_RDONLY)
        call.reply({"file": "1:2", "offset": 0, "more": False, "ended": False, "state": "running"}, fds=(fd, fd))
        os.close(fd)

    daemon.answers["Follow"] = follow
    parameters = {"name": "web1", "log": "console"}
    with client.Call(client.Session(daemon.path), "Follow", client.constant(parameters)) as call:
        reply = call.result()
    assert [os.pread(fd, 10, 0) for fd in reply.fds] == [b"text", b"text"]
    assert not any(os.get_inheritable(fd) for fd in reply.fds)
    reply.close()
    assert reply.fds == []


def test_an_answer_in_many_pieces(daemon: FakeDaemon) -> None:
    text = "x" * 300_000

    def dump(call: Any) -> None:
        data = b'{"parameters":{"text":"' + text.encode() + b'"}}\0'
        for at in range(0, len(data), 70_001):
            call.connection.sendall(data[at : at + 70_001])

    daemon.answers["Dump"] = dump
    assert client.Session(daemon.path).call("Dump", {"name": "web1"})["text"] == text


def test_a_daemon_that_breaks_off_each_time_is_no_restart(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY", 0.001)
    said = os.path.join(os.path.dirname(daemon.path), "daemon.json")
    Path(said).write_text("{}")
    daemon.dies_on = ["List"] * 1000
    assert main(["list"]) == 1
    assert "closes the connection whenever it is asked for List" in capsys.readouterr().err
    assert len(daemon.asked("List")) == client.BROKEN
    # Each other daemon is one restart more, and no end of the patience.
    daemon.calls.clear()
    daemon.answers["List"] = {"objects": []}
    daemon.dies_on = []
    left = 3 * client.BROKEN

    def die(call: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            return {"objects": []}
        os.unlink(said)
        Path(said).write_text(f"{left}")
        return call.connection.shutdown(socket.SHUT_RDWR)

    daemon.answers["List"] = die
    assert main(["list"]) == 0
    assert left == 0


def test_one_that_cannot_be_told_apart_is_given_up_in_the_end(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.dies_on = ["List"] * 1000
    assert main(["list", "--daemon-timeout", "0.3"]) == 1
    assert "virtd went away again and again" in capsys.readouterr().err
    assert len(daemon.asked("List")) < 20


def test_a_name_that_is_not_utf8_is_refused_before_it_is_sent(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "B\udcfcro"]) == 1
    assert "isn't UTF-8" in capsys.readouterr().err
    assert daemon.calls == []
