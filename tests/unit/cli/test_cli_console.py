# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl console, on a terminal and in a pipe: who writes, what is read, how it ends, the restarts in between."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_daemon import INFO, FakeDaemon, Guest
from virtd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 30.0  # seconds until a test that waits for something has failed
BANNER = b"Connected to domain web1. Escape character is ^].\r\n"


class Screen:
    """virtdctl on a terminal of its own; what it printed so far."""

    def __init__(self, daemon: FakeDaemon, *words: str) -> None:
        self.master, self.slave = os.openpty()
        self.modes = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "virtd.cli", "console", *words, "--address", daemon.path],
            cwd=ROOT,
            env=os.environ | {"NO_COLOR": "1"},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
        )

    def expect(self, text: bytes) -> bytes:
        """Wait for `text`; what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} didn't come, but {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def ended(self) -> int:
        """Its exit status. The terminal has to be as it was."""
        status = self.process.wait(PATIENCE)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        assert termios.tcgetattr(self.slave) == self.modes
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture(autouse=True)
def shut_down(daemon: FakeDaemon) -> None:
    """How it ended, once it did."""
    daemon.answers["Info"] = {"object": INFO | {"exit": {"cause": "guest-shutdown", "code": 0}}}


@pytest.fixture
def screen(daemon: FakeDaemon, guest: Guest) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> Screen:
            it = Screen(daemon, *words)
            stack.callback(it.close)
            return it

        yield start


def typed(guest: Guest, length: int) -> bytes:
    """What arrives at the guest."""
    data = b""
    while len(data) < length and select.select([guest.stdin], [], [], PATIENCE)[0]:
        data += os.read(guest.stdin, length - len(data))
    return data


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# On a terminal.


def test_a_conversation(guest: Guest, screen: Any) -> None:
    guest.write(b"earlier\r\nlogin: ")
    it = screen("web1")
    it.expect(BANNER)
    assert it.expect(b"login: ") == b""
    it.type(b"root\r\x03")
    assert typed(guest, 6) == b"root\r\x03"
    guest.write(b"root\r\nPassword: \x1b[1m")
    it.expect(b"root\r\nPassword: \x1b[1m")
    it.type(b"\x1d")
    assert it.ended() == 0
    assert it.seen == b"\r\nDisconnected from web1.\r\n"
    assert guest.state == "running"


def test_what_was_typed_before_the_escape_arrives(guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    it.type(b"echo last\r\x1dnot this")
    assert it.ended() == 0
    assert typed(guest, 10) == b"echo last\r"
    assert not select.select([guest.stdin], [], [], 0)[0]


def test_the_terminal_is_raw(screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    until(lambda: not termios.tcgetattr(it.slave)[3] & termios.ICANON)
    local = termios.tcgetattr(it.slave)[3]
    assert not local & (termios.ECHO | termios.ISIG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(guest: Guest, screen: Any, number: int) -> None:
    it = screen("web1")
    it.expect(BANNER)
    guest.write(b"here")
    it.expect(b"here")
    it.process.send_signal(number)
    assert it.ended() == 128 + number


def test_another_escape_character(guest: Guest, screen: Any) -> None:
    it = screen("web1", "--escape", "^a")
    it.expect(b"Escape character is ^A.\r\n")
    it.type(b"\x1d")
    assert typed(guest, 1) == b"\x1d"
    it.type(b"\x01")
    assert it.ended() == 0


def test_no_escape_character(guest: Guest, screen: Any) -> None:
    it = screen("web1", "--escape=none")
    it.expect(b"Escape character is off.\r\n")
    it.type(b"\x1d")
    assert typed(guest, 1) == b"\x1d"


def test_from_the_start(guest: Guest, screen: Any) -> None:
    guest.write(b"one\r\n")
    guest.rotate()
    guest.write(b"two\r\n")
    it = screen("web1", "-n", "all")
    it.expect(BANNER)
    it.expect(b"one\r\ntwo\r\n")


def test_the_guest_ends(guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    guest.write(b"Power down.\r\n")
    guest.state = "stopped"
    assert it.ended() == 0
    assert it.seen == b"Power down.\r\n\r\nweb1: powered off by the guest.\r\n"


def test_the_guest_ends_and_nothing_else_is_known(daemon: FakeDaemon, guest: Guest, screen: Any) -> None:
    del daemon.answers["Info"]
    it = screen("web1")
    it.expect(BANNER)
    guest.state = "stopped"
    assert it.ended() == 0
    assert it.seen.endswith(b"web1 ended.\r\n")


def test_taken_over(guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    guest.taken_by = "root (PID 99)"
    assert it.ended() == 1
    assert it.seen.endswith(b"The console of web1 was taken over by root (PID 99).\r\n")


def test_a_second_writer_only_reads(guest: Guest, screen: Any) -> None:
    guest.writer = "another"
    it = screen("web1")
    assert it.expect(b"Connected").split(b"\r\n") == [
        b"Failed to write to the console of web1: root (PID 4711) has the console of web1",
        b"Hint: --force takes it over",
        b"Showing its output only.",
        b"",
    ]
    guest.write(b"visible")
    it.expect(b"visible")
    it.type(b"ignored\x1d")
    assert it.ended() == 0
    assert not select.select([guest.stdin], [], [], 0)[0]
    assert guest.writer == "another"


def test_force_takes_it_over(daemon: FakeDaemon, guest: Guest, screen: Any) -> None:
    guest.writer = "another"
    it = screen("web1", "--force")
    it.expect(BANNER)
    it.type(b"x")
    assert typed(guest, 1) == b"x"
    assert guest.writer != "another"
    # After a restart the claim is the token: force again would take it from whoever came later.
    daemon.restart()
    until(lambda: len(daemon.asked("OpenConsole")) == 2)
    first, second = daemon.asked("OpenConsole")
    assert (first["force"], first["token"]) == (True, None)
    assert (second["force"], second["token"]) == (False, guest.writer)


def test_a_guest_that_doesnt_read(guest: Guest, screen: Any) -> None:
    # The pipe is full: output goes on, and so does the escape character.
    os.set_blocking(guest.stdin_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(guest.stdin_end, b"x" * 65536)
    os.set_blocking(guest.stdin_end, True)
    it = screen("web1")
    it.expect(BANNER)
    it.type(b"unread")
    guest.write(b"still here")
    it.expect(b"still here")
    it.type(b"\x1d")
    assert it.ended() == 0


def test_a_stopped_domain(guest: Guest, screen: Any) -> None:
    guest.state = "stopped"
    it = screen("web1")
    assert it.ended() == 1
    assert it.seen == b"Failed to open the console of web1: web1 is stopped\r\nHint: virtdctl start web1\r\n"
    it = screen("web1", "--read-only")
    assert it.ended() == 1
    assert it.seen.startswith(b"Failed to open the console of web1: web1 isn't running\r\nHint: ")


def test_no_such_domain(screen: Any) -> None:
    it = screen("nosuch")
    assert it.ended() == 4
    assert it.seen == b"Failed to open the console of nosuch: There is no domain nosuch\r\n"


# Restarts.


def test_it_goes_on_over_restarts(daemon: FakeDaemon, guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    expected = b""
    for number in range(20):
        text = b"line %d\r\n" % number
        expected += text
        if number % 3 == 0:
            guest.write(text)
            daemon.restart()
        elif number % 3 == 1:
            daemon.stop()
            guest.write(text)
            it.type(b"k%d" % (number % 10))
            # While the daemon is away, keys reach the guest all the same.
            assert typed(guest, 2) == b"k%d" % (number % 10)
            guest.rotate()
            daemon.start()
        else:
            guest.write(text)
            assert it.expect(expected) == b""
            expected = b""
    guest.write(b"END")
    assert it.expect(b"END") == expected
    it.type(b"\x1d")
    assert it.ended() == 0
    assert it.seen.endswith(b"Disconnected from web1.\r\n")


def test_a_long_absence_is_told_and_can_be_left(daemon: FakeDaemon, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    daemon.stop()
    it.expect(b"virtdctl: virtd went away, waiting for it to come back...\r\n")
    it.type(b"\x1d")
    assert it.ended() == 0
    daemon.start()


def test_an_absence_that_is_too_long(daemon: FakeDaemon, screen: Any) -> None:
    it = screen("web1", "--daemon-timeout=0.5")
    it.expect(BANNER)
    daemon.stop()
    assert it.ended() == 1
    assert b"virtd went away and didn't come back within 0.5 s" in it.seen
    daemon.start()


def test_the_guest_ends_while_the_daemon_is_away(daemon: FakeDaemon, guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    daemon.stop()
    guest.write(b"last words\r\n")
    guest.state = "stopped"
    daemon.start()
    assert it.ended() == 0
    assert it.seen == b"last words\r\n\r\nweb1: powered off by the guest.\r\n"


def test_another_took_it_while_the_daemon_was_away(daemon: FakeDaemon, guest: Guest, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    daemon.stop()
    guest.writer = "another"
    daemon.start()
    assert it.ended() == 1
    assert it.seen.endswith(b"Lost the console of web1: root (PID 4711) has the console of web1\r\n")


def test_undefined_while_the_daemon_was_away(daemon: FakeDaemon, screen: Any) -> None:
    it = screen("web1")
    it.expect(BANNER)
    daemon.stop()
    daemon.answers["Follow"] = daemon.answers["OpenConsole"] = errors.NotFound("There is no domain web1")
    daemon.start()
    assert it.ended() == 0
    assert it.seen.endswith(b"web1: powered off by the guest.\r\n")


# In a pipe.


def piped(daemon: FakeDaemon, *words: str, stdin: Any = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "virtd.cli", "console", *words, "--address", daemon.path],
        cwd=ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_script_talks_to_the_guest(daemon: FakeDaemon, guest: Guest) -> None:
    guest.write(b"login: ")

    def answer() -> None:
        assert typed(guest, 8) == b"echo hi\n"
        guest.write(b"hi\r\n")
        # All has been sent, so that another may write, while this one goes on reading.
        until(lambda: guest.writer is None)
        guest.write(b"bye\r\n")
        guest.state = "stopped"

    thread = threading.Thread(target=answer)
    thread.start()
    out, err = piped(daemon, "web1").communicate(b"echo hi\n", timeout=PATIENCE)
    thread.join()
    assert out == b"hi\r\nbye\r\n"
    assert err == b"web1: powered off by the guest.\n"


def test_a_script_that_sends_much(daemon: FakeDaemon, guest: Guest) -> None:
    data = bytes(range(256)) * 4000
    process = piped(daemon, "web1", "--timeout", "0.1")
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(typed(guest, len(data))))
    thread.start()
    process.communicate(data, timeout=PATIENCE)
    thread.join()
    assert received == [data]
    assert process.returncode == 0


def test_a_script_leaves_in_time(daemon: FakeDaemon, guest: Guest) -> None:
    process = piped(daemon, "web1", "--timeout=0.2", "--lines", "1", stdin=subprocess.DEVNULL)
    guest.write(b"something")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, b"something", b"")
    process = piped(daemon, "--read-only", "web1", "--timeout=0.2", "-n", "all")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, b"something", b"")


def test_a_script_that_cant_write_fails(daemon: FakeDaemon, guest: Guest) -> None:
    guest.writer = "another"
    process = piped(daemon, "web1")
    out, err = process.communicate(b"text", timeout=PATIENCE)
    assert process.returncode == 1
    assert out == b""
    assert err.startswith(b"Failed to open the console of web1: root (PID 4711) has the console of web1\n")


def test_a_script_that_has_read_enough(daemon: FakeDaemon, guest: Guest) -> None:
    process = piped(daemon, "web1", "--read-only")
    until(lambda: len(daemon.asked("Follow")) == 2)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    # The guest writes nothing more, and it is noticed all the same.
    assert process.wait(PATIENCE) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


def test_terminated(daemon: FakeDaemon, guest: Guest) -> None:
    process = piped(daemon, "web1", "--read-only")
    until(lambda: len(daemon.asked("Follow")) == 2)
    process.terminate()
    assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == 143
