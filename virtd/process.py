# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a process is: a PID together with its start time, since a PID alone is given out again."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import time
from typing import NamedTuple

_INFO = struct.Struct("=QQ11Ii")  # the 64 bytes of linux/pidfd.h's pidfd_info that every kernel with it has
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_EXIT = 1 << 3  # PIDFD_INFO_EXIT
REAPED = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # seconds until PID 1 may have waited for a process that has ended


class Seen(NamedTuple):
    """What was seen of a process's end: when (seconds since the epoch), and how, as waitpid(2) has it, if known."""

    at: float
    status: int | None = None


def start_time(pid: int) -> int:
    """Clock ticks since boot at which `pid` started (proc_pid_stat(5), field 22); 0 when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name may hold spaces and parentheses: fields are counted from the last ')'.
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if not fields or fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, start: int) -> bool:
    """Whether the process that was `pid` at `start` still runs."""
    return pid > 0 and start > 0 and start_time(pid) == start


def open_pidfd(pid: int, start: int) -> int | None:
    """A pidfd of that very process, or None when it has ended. The caller closes it."""
    if pid <= 0:
        return None
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        # Checked after opening: from here on the PID can't come to mean another process without us noticing.
        if alive(pid, start):
            return fd
        os.close(fd)
    return None


def exit_status(pidfd: int) -> int | None:
    """How the process ended, as waitpid(2) has it; None until its parent has waited for it.

    Raises OSError where the kernel can't tell: before Linux 6.15.
    """
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _EXIT, *(0,) * 13)
    fcntl.ioctl(pidfd, _GET_INFO, info)
    mask, *_, status = _INFO.unpack(info)
    return int(status) if mask & _EXIT else None


async def ended(pid: int, start: int) -> Seen | None:
    """Wait until the process that was `pid` at `start` has ended: what was seen of that, None if it had before."""
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
    """How a process has ended that PID 1 is about to wait for."""
    with contextlib.suppress(OSError):
        for pause in REAPED:
            if (status := exit_status(pidfd)) is not None:
                return status
            await asyncio.sleep(pause)
        return exit_status(pidfd)
    return None


def boot_id() -> str:
    """The running kernel's boot, 32 hex digits (random(4)); a soft reboot doesn't change it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")
