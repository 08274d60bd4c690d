# SPDX-License-Identifier: LGPL-2.1-or-later
"""The user's terminal, handed to a guest and restored on every way out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any


class Terminated(BaseException):
    """SIGTERM or SIGHUP (`number`) arrived. Not an Exception, so that no handler takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class RawTerminal:
    """A context in which `fd` passes every key on, and which SIGTERM and SIGHUP leave in order.

    If `fd` isn't a terminal, it is left alone; the signals are handled all the same.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.is_terminal = os.isatty(fd)
        self._modes: list[Any] = []
        self._handlers: dict[int, Any] = {}
        self._is_raw = False

    def __enter__(self) -> RawTerminal:
        if self.is_terminal:
            self._modes = termios.tcgetattr(self._fd)
        for number, handler in ((signal.SIGTERM, _leave), (signal.SIGHUP, _leave), (signal.SIGCONT, self._continued)):
            self._handlers[number] = signal.signal(number, handler)
        self._raw()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._is_raw = False
        if self._modes:
            # It may have been hung up; then nobody sees it any more.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._modes)

    def _raw(self) -> None:
        if self._modes:
            tty.setraw(self._fd, termios.TCSANOW)
            self._is_raw = True

    def _continued(self, _number: int, _frame: FrameType | None) -> None:
        """After a stop from outside (kill -STOP), the shell has set its own modes."""
        with contextlib.suppress(termios.error):
            self._raw()

    def resize(self, other: int) -> None:
        """Set another terminal's size to this one's; a pipe has none."""
        if self.is_terminal and os.isatty(other):
            with contextlib.suppress(OSError):
                fcntl.ioctl(other, termios.TIOCSWINSZ, fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8)))

    def line_end(self) -> str:
        """The line end for virtdctl's own messages: a raw terminal doesn't add a carriage return."""
        return "\r\n" if self._is_raw else "\n"


def _leave(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)
