# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pipes between virtd and a new child, or its terminal."""

from __future__ import annotations

import fcntl
import logging
import os
from typing import TypeAlias

import msgspec

from ..logs.channel import PIPE_SIZE
from ..systemd.transient import Stdio
from . import fifos
from .slots import STDERR, STDIN, STDOUT

log = logging.getLogger(__name__)

ThreeStdio: TypeAlias = tuple[Stdio, Stdio, Stdio]


class Ends(msgspec.Struct):
    """The child's ends of its pipes, kept open by us until it has opened them by the paths in `stdio`.

    With a terminal, `stdout` is its slave end, which can be read as well, `stdin` is unused (systemd would make a
    terminal on standard input the child's controlling one), and `tty` is its name, "/dev/pts/3". `held`: the unit
    also has the master end, as standard error, and the future standard error as standard input; the child swaps them.
    """

    stdin: int
    stdout: int
    stderr: int
    stdio: ThreeStdio
    tty: str = ""
    held: bool = False

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = -1


def make(directory: str, owner: str, *, terminal: bool, held: bool) -> tuple[Ends, dict[str, int]]:
    """The child's ends, and ours by slot name. FIFOs are made in `directory`.

    `terminal`, `held`: see Child.prepare. `owner` is for log messages. Raises OSError, with nothing left behind.
    """
    opened: list[int] = []
    try:
        if terminal:
            opened += [-1, *os.openpty()[::-1], *os.pipe2(os.O_CLOEXEC)]
        opened += fifos.make(directory, (STDERR,) if terminal else fifos.NAMES)
        tty = os.ttyname(opened[1]) if terminal else ""
    except OSError:
        for fd in opened:
            if fd >= 0:
                os.close(fd)
        raise
    if terminal:
        slave = opened.pop(1)
    in_read, in_write, out_read, out_write, err_read, err_write = opened
    _enlarge(out_read, owner)
    if terminal:
        os.close(out_write)  # the feeder opens it again whenever it runs
        out_write = slave
    stdin, stdout, stderr = (f"{directory}/{name}" for name in fifos.NAMES)
    stdio: ThreeStdio = (os.devnull, slave, stderr) if terminal else (stdin, stdout, stderr)
    if held:
        in_read = os.dup(in_write)
        stdio = (err_write, slave, in_read)
    ends = Ends(in_read, out_write, err_write, stdio, tty, held)
    return ends, {STDIN: in_write, STDOUT: out_read, STDERR: err_read}


def _enlarge(pipe: int, owner: str) -> None:
    """Enlarge the console's pipe only: QEMU writes little to stderr, and if root lacks CAP_SYS_RESOURCE (in a
    container), all its large pipes share one allowance of 64 MiB.
    """
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError as exc:
        # Beyond fs.pipe-user-pages-soft. It works, but the small pipe fills quickly while we are away.
        size = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
        log.warning(
            "%s gets a pipe of %d bytes only (%s): while virtd is away, its output may be lost past that. "
            "Raise fs.pipe-user-pages-soft (sysctl)", owner, size, exc.strerror,
        )  # fmt: skip
