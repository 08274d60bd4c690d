# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl log: through rotated files, while the guest writes, over restarts; nothing twice, nothing left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_daemon import FakeDaemon, Guest
from virtd import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[3]


def command(daemon: FakeDaemon, *words: str, warnings: str = "error") -> list[str]:
    return [sys.executable, "-W", warnings, "-m", "virtd.cli", *words, "--address", daemon.path]


def virtdctl(daemon: FakeDaemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(daemon, *words), capture_output=True, check=False, cwd=ROOT, timeout=60)


@pytest.fixture
def running(daemon: FakeDaemon) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, warnings: str = "error") -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command(daemon, *words, warnings=warnings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read(process: subprocess.Popen[bytes], length: int) -> bytes:
    """Exactly `length` bytes of its output; the test's time limit is what ends the wait for too few."""
    assert process.stdout is not None
    data = b""
    while len(data) < length and (more := os.read(process.stdout.fileno(), length - len(data))):
        data += more
    return data


def test_all_of_it_through_rotated_files(daemon: FakeDaemon, guest: Guest) -> None:
    for number in range(3):
        guest.write(b"line %d\r\n\xff\x00" % number)
        guest.rotate()
    guest.write(b"the present\n")
    ran = virtdctl(daemon, "log", "web1")
    assert ran.stdout == b"line 0\r\n\xff\x00line 1\r\n\xff\x00line 2\r\n\xff\x00the present\n"
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_large_log_is_complete(daemon: FakeDaemon, guest: Guest) -> None:
    data = b"".join(b"%d\n" % number for number in range(200_000))
    guest.write(data)
    assert virtdctl(daemon, "log", "web1").stdout == data


def test_the_last_lines(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write(b"one\ntwo\nthree\nlogin: ")
    assert virtdctl(daemon, "log", "web1", "-n", "2").stdout == b"three\nlogin: "
    assert virtdctl(daemon, "log", "web1", "--lines=0").stdout == b""
    assert virtdctl(daemon, "log", "web1", "--lines", "all").stdout == b"one\ntwo\nthree\nlogin: "


def test_which_log(daemon: FakeDaemon, guest: Guest) -> None:
    assert virtdctl(daemon, "log", "web1").returncode == 0
    assert virtdctl(daemon, "log", "--qemu", "web1").returncode == 0
    assert virtdctl(daemon, "log", "--stderr", "web1").returncode == 0
    assert [asked["log"] for asked in daemon.asked("Follow")][::2] == ["console", "log", "log"]


def test_as_json(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write("grüße\r\n\ncut ".encode())
    first = guest.identity(guest.files[-1])
    guest.rotate()
    guest.write(b"in two\n\xffend")
    second = guest.identity(guest.files[-1])
    ran = virtdctl(daemon, "log", "--json", "web1")
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [
        {"file": first, "offset": 0, "line": "grüße"},
        {"file": first, "offset": 9, "line": ""},
        {"file": first, "offset": 10, "line": "cut in two"},
        {"file": second, "offset": 7, "line": "\ufffdend"},
    ]


@pytest.mark.parametrize(
    ("missed", "said", "skipped"), [(2048, "2K of the log are missing", 2048), (-1, "may be", None)]
)
def test_what_was_rotated_away_is_told_of(
    daemon: FakeDaemon, guest: Guest, missed: int, said: str, skipped: int | None
) -> None:
    guest.write(b"one\ncut ")
    guest.rotate()
    guest.write(b"off\nlast\n")
    guest.missed = missed
    ran = virtdctl(daemon, "log", "web1")
    assert ran.stdout == b"one\ncut off\nlast\n"
    assert said in ran.stderr.decode()
    ran = virtdctl(daemon, "log", "--json", "web1")
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["line"] for line in lines] == ["one", "cut ", "off", "last"]
    assert ["skipped" in line for line in lines] == [False, False, True, False]
    assert lines[2]["skipped"] == skipped
    assert said in ran.stderr.decode()


def test_a_log_that_cannot_be_written_is_told_of(daemon: FakeDaemon, guest: Guest) -> None:
    guest.refused = "No space left on device"
    ran = virtdctl(daemon, "log", "web1")
    assert (ran.returncode, ran.stdout) == (0, b"")
    assert ran.stderr.decode().count("can't be written at present (No space left on device)") == 1


def test_no_such_domain(daemon: FakeDaemon, guest: Guest) -> None:
    ran = virtdctl(daemon, "log", "nosuch")
    assert ran.returncode == 4
    assert ran.stderr == b"Failed to show the log of nosuch: There is no domain nosuch\n"


def test_a_reader_that_has_seen_enough(daemon: FakeDaemon, guest: Guest, running: Any) -> None:
    guest.write(b"x" * 1_000_000)
    process = running("log", "web1")
    assert read(process, 10) == b"x" * 10
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_an_output_that_cant_be_written(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write(b"text")
    for words in (("log", "web1"), ("--help",)):
        with open("/dev/full", "wb") as full:
            ran = subprocess.run(
                command(daemon, *words), stdout=full, stderr=subprocess.PIPE, check=False, cwd=ROOT, timeout=60
            )
        assert (ran.returncode, ran.stderr) == (1, b"virtdctl: No space left on device\n")


def test_an_output_that_is_closed(daemon: FakeDaemon, guest: Guest) -> None:
    daemon.answers["Stop"] = {"name": "web1", "changed": True}
    closed = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh"]
    for words, status in ((("help",), 0), (("stop", "web1"), 0), (("info", "web1"), 1)):
        ran = subprocess.run([*closed, *command(daemon, *words)], check=False, cwd=ROOT, timeout=60)
        assert ran.returncode == status


def test_following_ends_with_the_guest(daemon: FakeDaemon, guest: Guest, running: Any) -> None:
    guest.write(b"before\n")
    process = running("log", "-f", "web1")
    assert read(process, 7) == b"before\n"
    guest.write(b"while\n")
    assert read(process, 6) == b"while\n"
    guest.rotate()
    guest.write(b"after\n")
    assert read(process, 6) == b"after\n"
    guest.write(b"last words")
    guest.state = "stopped"
    assert read(process, 100) == b"last words"
    assert process.wait(60) == 0


def test_following_begins_with_ten_lines(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write(b"".join(b"%d\n" % number for number in range(20)))
    guest.state = "stopped"
    assert virtdctl(daemon, "log", "-f", "web1").stdout.split() == [b"%d" % number for number in range(10, 20)]


def test_following_over_many_restarts(daemon: FakeDaemon, guest: Guest, running: Any) -> None:
    guest.write(b"begin\n")
    process = running("log", "-f", "-n", "all", "web1")
    written = [b"begin\n"]

    def write() -> None:
        for number in range(3000):
            written.append(b"%d\n" % number)
            guest.write(written[-1])
            if number % 400 == 399:
                guest.rotate()
            if number % 100 == 99:
                daemon.restart()
        guest.state = "stopped"

    thread = threading.Thread(target=write)
    thread.start()
    out, err = process.communicate(timeout=60)
    thread.join()
    assert out == b"".join(written)
    assert err == b""
    assert process.returncode == 0


def test_a_daemon_that_dies_of_the_question(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write(b"text\n")
    daemon.dies_on = ["Follow", "Follow"]
    assert virtdctl(daemon, "log", "web1").stdout == b"text\n"


def test_undefined_while_it_is_followed(daemon: FakeDaemon, guest: Guest, running: Any) -> None:
    guest.write(b"text\n")
    process = running("log", "-f", "web1")
    assert read(process, 5) == b"text\n"
    daemon.answers["Follow"] = errors.NotFound("There is no domain web1")
    daemon.restart()
    assert process.wait(60) == 4


def test_interrupted(daemon: FakeDaemon, guest: Guest, running: Any) -> None:
    guest.write(b"text\n")
    # It may come between a socket's making and the `with` that closes it, and a user isn't told of that.
    process = running("log", "-f", "web1", warnings="ignore::ResourceWarning")
    assert read(process, 5) == b"text\n"
    process.send_signal(2)
    assert process.wait(60) == 130
    assert process.stderr.read() == b""
