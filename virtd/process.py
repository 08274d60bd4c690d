# SPDX-License-Identifier: LGPL-2.1-or-later
"""The identity of a process: its PID together with its start time, since PIDs are reused."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import time
from typing import NamedTuple

_INFO = struct.Struct("=QQ11Ii")  # the first 64 bytes of pidfd_info in linux/pidfd.h, which every kernel with it has
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_EXIT = 1 << 3  # PIDFD_INFO_EXIT
REAPED = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
)  # seconds until PID 1 may have reaped an ended process


class Seen(NamedTuple):
    """The observed end of a process: the time in seconds since the epoch, and its status as in waitpid(2), if
    known."""

    at: float
    status: int | None = None


def start_time(pid: int) -> int:
    """Clock ticks since boot at which `pid` started (proc_pid_stat(5), field 22); 0 if it has ended or is a
    zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name may contain spaces and parentheses: fields are counted from the last ')'.
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if not fields or fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, start: int) -> bool:
    """Whether the process that had `pid` at `start` still runs."""
    return pid > 0 and start > 0 and start_time(pid) == start


def open_pidfd(pid: int, start: int) -> int | None:
    """A pidfd of that very process, or None if it has ended. The caller closes it."""
    if pid <= 0:
        return None
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        # Checked after opening: from here on the PID can't be reused without us noticing.
        if alive(pid, start):
            return fd
        os.close(fd)
    return None


def exit_status(pidfd: int) -> int | None:
    """The status of an ended process, as in waitpid(2); None until its parent has waited for it.

    Raises OSError if the kernel can't tell: before Linux 6.15.
    """
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _EXIT, *(0,) * 13)
    fcntl.ioctl(pidfd, _GET_INFO, info)
    mask, *_, status = _INFO.unpack(info)
    return int(status) if mask & _EXIT else None


async def ended(pid: int, start: int) -> Seen | None:
    """Wait for the end of the process that had `pid` at `start`. Returns what was seen; None if it had ended
    before."""
    pidfd = open_pidfd(pid, start)
    if pidfd is None:
        return None
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
        return Seen(time.time(), await _reaped(pidfd))
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def _reaped(pidfd: int) -> int | None:
    """The status of an ended process that PID 1 is about to reap."""
    with contextlib.suppress(OSError):
        for pause in REAPED:
            if (status := exit_status(pidfd)) is not None:
                return status
            await asyncio.sleep(pause)
        return exit_status(pidfd)
    return None


def boot_id() -> str:
    """The boot ID of the running kernel, 32 hex digits (random(4)); a soft reboot doesn't change it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")
