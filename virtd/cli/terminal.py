# SPDX-License-Identifier: LGPL-2.1-or-later
"""The user's terminal, handed to a guest and taken back on every way out."""

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
    """SIGTERM or SIGHUP (`number`) arrived. No Exception, so that nothing on the way out takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class RawTerminal:
    """A context in which `fd` passes every key on, and in which SIGTERM and SIGHUP leave through the context's end.

    `fd` that is no terminal is left alone; the signals are taken care of all the same.
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
            # It may have been hung up, and then nobody looks at it any more.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._modes)

    def _raw(self) -> None:
        if self._modes:
            tty.setraw(self._fd, termios.TCSANOW)
            self._is_raw = True

    def _continued(self, _number: int, _frame: FrameType | None) -> None:
        """After a stop from outside (kill -STOP) the shell has set modes of its own."""
        with contextlib.suppress(termios.error):
            self._raw()

    def resize(self, other: int) -> None:
        """Tell another terminal's size to be this one's; a pipe has none."""
        if self.is_terminal and os.isatty(other):
            with contextlib.suppress(OSError):
                fcntl.ioctl(other, termios.TIOCSWINSZ, fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8)))

    def line_end(self) -> str:
        """What ends a line of virtdctl's own: a raw terminal doesn't return the carriage by itself."""
        return "\r\n" if self._is_raw else "\n"


def _leave(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)
