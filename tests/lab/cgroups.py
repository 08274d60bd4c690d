# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control group that a lab lives in, on hosts whose PID 1 is systemd and on those where it isn't.

Everything of a lab is in one group from its first instruction on: so `lab down` finds all of it, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from .state import LabError


def host_has_systemd() -> bool:
    """True where systemd is the host's PID 1 (the test that sd_booted(3) makes)."""
    return Path("/run/systemd/system").is_dir()


def unified_mount() -> Path:
    """Where the host has its unified (v2) hierarchy."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split()[4])
    raise LabError("the host has no cgroup v2 hierarchy mounted; systemd in a lab cannot do without one")


def expected(machine: str) -> Path:
    """The group of a lab that didn't get as far as noting it."""
    if host_has_systemd():
        return unified_mount() / "system.slice" / f"{machine}.service"
    return unified_mount() / machine


def mounts_of_all() -> list[Path]:
    """The mount points of all hierarchies that can hold named groups: the unified one, and v1 ones as well."""
    with open("/proc/self/mountinfo") as mounts:
        split = [line.partition(" - ") for line in mounts]
    return [Path(left.split()[4]) for left, _, right in split if right.startswith(("cgroup2 ", "cgroup "))]


def processes(group: Path) -> list[int]:
    """PIDs in the group and below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(group):
        with contextlib.suppress(OSError, ValueError):
            found += [int(line) for line in Path(directory, "cgroup.procs").read_text().split()]
    return found


def kill(group: Path, seconds: float = 20.0) -> list[int]:
    """SIGKILL to everything in the group and below until nothing is left; returns PIDs that outlived `seconds`."""
    end = time.monotonic() + seconds
    while left := processes(group):
        if time.monotonic() > end:
            return left
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return []


def remove(group: Path) -> None:
    """Removes an emptied group with its subgroups. A process that is just dying can hold it for a moment."""
    for attempt in range(100):
        busy = False
        for directory, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                busy = True
        if not busy:
            return
        time.sleep(0.02 + attempt * 0.002)
    raise LabError(f"the control group {group} cannot be removed")
