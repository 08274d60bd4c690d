# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small process that behaves towards virtd as lxc-start and lxc-execute do: a monitor, its child, and the diary.

It takes LXC's own options. What it starts is no program of a root file system's but itself: a child that obeys what
is typed on its console (`echo WORD`, `poweroff`, `reboot`, `exit STATUS`, `die SIGNAL`) and the signals that systemd
as an init obeys, SIGRTMIN+3 and SIGRTMIN+5; with the word "deaf" in the container's environment it ignores those.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tty
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

PR_SET_PDEATHSIG = 1


class Monitor:
    def __init__(self, arguments: list[str]) -> None:
        self.name = arguments[arguments.index("-n") + 1]
        with open(arguments[arguments.index("-f") + 1]) as file:
            self.deaf = "lxc.environment = deaf=" in file.read()
        self.command = "--" in arguments
        self.log = os.open(arguments[arguments.index("-o") + 1], os.O_WRONLY | os.O_APPEND)

    def say(self, words: str, level: str = "NOTICE") -> None:
        line = f"lxc-start {self.name} 20261124035119.773 {level:<8} start - ../src/lxc/start.c:x:1 - {words}\n"
        with contextlib.suppress(BrokenPipeError):  # LXC ignores SIGPIPE, too
            os.write(self.log, line.encode())

    def run(self) -> int:
        """Its exit status: what lxc-execute tells of a command; lxc-start says 0 of an init that was ended."""
        while True:
            ready, theirs = os.pipe()
            pid = os.fork()
            if not pid:
                first_program(theirs, deaf=self.deaf)
            os.close(theirs)
            os.read(ready, 1)  # until it listens
            os.close(ready)
            self.say(f"'program' started with pid '{pid}'" if self.command else f'Started "init" with pid "{pid}"')
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status > 0:
                self.say(f"Child <{pid}> ended on error ({status})", "INFO")
                return status if self.command else 0
            if status < 0:
                self.say(f"Child <{pid}> ended on signal {signal.Signals(-status).name}({-status})", "INFO")
                # As reboot(2) in a PID namespace has it: SIGHUP is for another life.
                if -status == signal.SIGHUP:
                    continue
            return 0 if status == 0 or -status == signal.SIGINT or not self.command else 128 - status


def first_program(ready: int, *, deaf: bool) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number, by in ((signal.SIGRTMIN + 3, signal.SIGINT), (signal.SIGRTMIN + 5, signal.SIGHUP)):
        signal.signal(number, signal.SIG_IGN if deaf else ender(by))
    os.close(ready)
    rest = b""
    while chunk := os.read(0, 65536):
        rest += chunk
        while b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            verb, _, word = line.decode().partition(" ")
            match verb:
                case "echo":
                    os.write(1, f"{word}\n".encode())
                case "poweroff":
                    die(signal.SIGINT)
                case "reboot":
                    die(signal.SIGHUP)
                case "exit":
                    os._exit(int(word))
                case "die":
                    die(signal.Signals[word])
    os._exit(0)


def ender(by: signal.Signals) -> Callable[[int, FrameType | None], None]:
    return lambda _number, _frame: die(by)


def die(number: int) -> NoReturn:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError(f"survived signal {number}")


if __name__ == "__main__":
    if os.isatty(0):
        tty.setraw(0)  # what is typed isn't repeated
    sys.exit(Monitor(sys.argv).run())
