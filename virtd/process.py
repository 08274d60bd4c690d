# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a process is: a PID together with its start time, since a PID alone is given out again."""

from __future__ import annotations

import contextlib
import os


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


def boot_id() -> str:
    """The running kernel's boot, 32 hex digits (random(4)); a soft reboot doesn't change it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")
