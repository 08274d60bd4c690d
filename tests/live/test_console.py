# SPDX-License-Identifier: LGPL-2.1-or-later
"""Consoles and logs, with a real guest, a real terminal and a daemon that comes and goes."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import termios
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness import LAB, Checker, Lab, check
from tests.live.tools import KILL, attached, settings, spawn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

READY = "virtd-lab ready"
BOOTS = int(os.environ.get("VIRTD_BOOTS", "4"))  # of a guest, half of them its own reboots: see CONTRIBUTING.md


@pytest.fixture
def guest(lab: Lab) -> str:
    """A guest that is quiet until it is told otherwise."""
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    return "web1"


class Terminal:
    """`virtdctl console` on a terminal of its own."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.descriptor, other = pty.openpty()
        self.before = termios.tcgetattr(other)
        self.process = subprocess.Popen(
            [LAB, "exec", lab.name, "--", "virtdctl", "console", *arguments], stdin=other, stdout=other, stderr=other
        )
        self.other = other
        self.shown = b""

    def type(self, data: bytes) -> None:
        os.write(self.descriptor, data)

    def see(self, text: bytes, seconds: float = 20) -> bool:
        """Whether `text` is shown by then."""
        end = time.monotonic() + seconds
        while text not in self.shown and (left := end - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], min(left, 0.2))[0]:
                self.shown += os.read(self.descriptor, 65536)
        return text in self.shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        os.close(self.descriptor)
        os.close(self.other)


@contextlib.contextmanager
def terminal(lab: Lab, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal(lab, *arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_a_terminal_and_its_escape_character(lab: Lab, guest: str) -> None:
    with terminal(lab, guest) as console:
        assert console.see(b"Connected to domain web1. Escape character is ^].")
        console.type(b"echo one\r")
        assert console.see(b"\none\r\n"), console.shown
        # A restart in the middle is none of the typist's business.
        lab.sh("systemctl restart virtd.service")
        console.type(b"echo two\r")
        assert console.see(b"\ntwo\r\n"), console.shown
        console.type(b"\x1d")
        assert console.see(b"Disconnected from web1."), console.shown
        assert console.process.wait(20) == 0
        assert termios.tcgetattr(console.other) == console.before, "the terminal is as it was"
    assert lab.info(guest)["state"] == "running"


def test_one_writer_and_any_number_of_readers(lab: Lab, guest: str) -> None:
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(attached(lab, guest))
        assert writer.ask("from-the-first")
        readers = [stack.enter_context(attached(lab, guest, "--read-only")) for _ in range(5)]

        refused = lab.virtdctl("console", guest, check=False, stdin="echo from-nobody\n")
        assert refused.returncode == 1
        assert "in use by root (PID " in refused.stderr
        assert "--force" in refused.stderr

        # The writer keeps its place over a restart: the next one is refused by the new daemon too.
        lab.sh(KILL)
        refused = lab.virtdctl("console", guest, check=False, stdin="echo from-nobody\n")
        assert "in use by root (PID " in refused.stderr
        assert writer.ask("from-the-first-again")

        second = stack.enter_context(attached(lab, guest, "--force"))
        assert second.ask("from-the-second")
        assert writer._process.wait(20) == 1
        assert "The console of web1 was taken over by root." in writer.close()
        for reader in readers:
            assert reader.heard("from-the-second")
        # A place that is given up is free at once.
        second.close()
    with attached(lab, guest) as third:
        assert third.ask("from-the-third")
    assert b"from-nobody" not in lab.console(guest)


@pytest.mark.parametrize("turn", range(BOOTS // 2))
def test_a_word_typed_as_soon_as_the_guest_is_ready(lab: Lab, turn: int) -> None:
    """By a console that was attached before, after a start and after the guest's own reboot."""
    lab.define("web1", start=True)
    with attached(lab, "web1", "-n", "all") as console:
        assert console.heard(READY, 60)
        assert console.ask(f"word-{turn}"), console.tally.words
        console.forget(READY)
        console.type("reboot\n")
        assert console.heard(READY, 60)
        assert console.ask(f"again-{turn}"), console.tally.words


def test_answers_are_the_first_that_a_new_console_shows(lab: Lab, guest: str) -> None:
    """Ten lines a second: the answer is there before the next one, and a console shows what follows its attaching."""
    lab.virtdctl("console", "--timeout", "0", guest, stdin="lines 10\n")
    for number in range(10):
        with attached(lab, guest) as console:
            assert console.ask(f"word-{number}"), console.tally.words


def test_an_attached_console_over_restarts(lab: Lab, guest: str) -> None:
    with attached(lab, guest) as console:
        console.type("lines 500\n")
        lab.wait("the lines", lambda: console.tally.lines > 100)
        for number, event in enumerate(("systemctl restart virtd.service", KILL, "systemctl restart virtd.service")):
            lab.sh(event)
            assert console.ask(f"word-{number}"), event
        shown = console.tally
        assert shown.whole, (shown.lost, shown.repeated, shown.broken[:3])
        assert shown.lines > 300
        lab.sh("systemctl stop virtd.service 2>/dev/null; sleep 2; systemctl start virtd.service")
        before = console.tally.lines
        lab.wait("the lines of the pause", lambda: console.tally.lines > before + 1000)
        assert console.tally.whole


def test_the_end_is_told(lab: Lab, guest: str) -> None:
    with terminal(lab, guest) as console:
        assert console.see(b"Connected")
        console.type(b"poweroff\r")
        assert console.see(b"virtd-lab: powering off"), "its last words are shown"
        assert console.see(b"\nweb1: "), console.shown
        assert console.process.wait(20) == 0


def test_last_lines(lab: Lab, guest: str) -> None:
    lab.virtdctl("console", "--timeout", "1", guest, stdin="lines 1000 100\n")
    lab.wait("the lines", lambda: b"virtd-lab end 100" in lab.console(guest))
    assert lab.virtdctl("log", "-n", "1", guest).stdout.rstrip() == "virtd-lab end 100"
    last = lab.virtdctl("log", "-n", "11", guest).stdout.splitlines()
    assert [line.split()[1] for line in last[:10]] == [f"{number:010}" for number in range(91, 101)]
    assert lab.virtdctl("log", "-n", "0", guest).stdout == ""
    assert lab.virtdctl("log", guest).stdout.encode() == lab.console(guest).replace(b"\r\n", b"\n")


def test_following_over_rotations(lab: Lab) -> None:
    with settings(lab, '[log]\nmax_size = "64K"\nbackups = 50\n'):
        lab.define("web1", cmdline="virtd.rate=4000 virtd.lines=12000", start=True)
        checker = Checker()
        killed = 0
        with spawn(lab, "virtdctl", "log", "-f", "-n", "all", "web1") as follower:
            assert follower.stdout is not None
            while data := os.read(follower.stdout.fileno(), 65536):
                checker.feed(data)
                if b"virtd-lab end 12000" in checker.tally.words:
                    break
                # The daemon goes in the middle of it, twice.
                if killed < 2 and checker.tally.lines > 4000 * (killed + 1):
                    killed += 1
                    lab.sh(KILL)
            follower.terminate()
        seen = checker.tally
        assert (seen.lines, seen.whole) == (12000, True), (seen.lost, seen.repeated, seen.broken[:3])
        files = lab.sh("ls /var/log/virtd/qemu").split()
        assert len([name for name in files if name.startswith("web1.console.log")]) > 10
        sizes = lab.sh("stat -c %s /var/log/virtd/qemu/web1.console.log*").split()
        # A line is finished first, which is 80 bytes here.
        assert all(int(size) <= (64 << 10) + 80 for size in sizes), sizes
        whole = check(lab.console("web1"))
        assert (whole.lines, whole.whole) == (12000, True)
        assert lab.sh("stat -c '%U %a' /var/log/virtd/qemu/web1.console.log") == "root 600\n"
        lab.virtdctl("stop", "web1")


def test_as_many_backups_as_asked_for(lab: Lab) -> None:
    with settings(lab, '[log]\nmax_size = "64K"\nbackups = 2\n'):
        lab.define("web1", cmdline="virtd.rate=4000 virtd.lines=6000", start=True)
        lab.wait("all lines", lambda: b"virtd-lab end 6000" in lab.console("web1"), 60)
        files = [name for name in lab.sh("ls /var/log/virtd/qemu").split() if "console" in name]
        assert len(files) == 3
        kept = check(lab.console("web1"))
        assert kept.last == 6000
        assert (kept.lost, kept.repeated) == (0, 0), "what is left is the end of it, without a hole"
        lab.virtdctl("stop", "web1")
