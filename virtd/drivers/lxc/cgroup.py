# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container's own control group, a sibling of LXC's monitor's inside the unit's, cgroups(7)."""

from __future__ import annotations

import asyncio
import contextlib

from ... import errors, hostroot
from ...text import span
from . import config

CGROUPS = "/sys/fs/cgroup"
FREEZE_LIMIT = 5.0  # seconds that all its processes may take to stop, or to resume


def payload_of(monitor: str, unit: str) -> str | None:
    """Its directory, by the control group of LXC's monitor; None if that isn't below the unit's.

    LXC 6 recreates both at each reboot, each time one deeper: in lxc.pivot, in lxc.pivot/lxc.pivot.
    """
    above = monitor.removesuffix(f"/{config.MONITOR}")
    return f"{CGROUPS}{above}/{config.PAYLOAD}" if unit in above.split("/") and above != monitor else None


def of(monitor: int, unit: str) -> Group | None:
    """The group of the container whose monitor is process `monitor`; None if that has ended."""
    try:
        with open(f"/proc/{monitor}/cgroup", encoding="utf-8") as file:
            own = next((line.rstrip("\n")[3:] for line in file if line.startswith("0::")), "")
    except OSError:
        return None
    path = payload_of(own, unit)
    return Group(hostroot.seen(path)) if path is not None else None


class Group:
    """One control group, by its directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def frozen(self) -> bool:
        """Whether all its processes are stopped."""
        try:
            with open(f"{self.path}/cgroup.events", encoding="ascii") as file:
                return "frozen 1" in file.read()
        except OSError:
            return False

    async def freeze(self, name: str, *, on: bool) -> None:
        """Freeze or thaw all processes of container `name`, and wait until that is done.

        Raises HostError or TimedOut.
        """
        try:
            with open(f"{self.path}/cgroup.freeze", "w", encoding="ascii") as file:
                file.write("1" if on else "0")
        except OSError as exc:
            raise errors.HostError(f"Cannot {'freeze' if on else 'thaw'} {name}: {exc.strerror}") from exc
        for _ in range(500):
            if self.frozen() is on:
                return
            await asyncio.sleep(FREEZE_LIMIT / 500)
        raise errors.TimedOut(f"{name} could not be {'frozen' if on else 'thawed'} within {span(FREEZE_LIMIT)}")

    def used(self) -> dict[str, int]:
        """Its present usage, as far as the kernel accounts for it: memory in bytes, pids."""
        found = {}
        for key, file in (("memory", "memory.current"), ("pids", "pids.current")):
            with contextlib.suppress(OSError, ValueError), open(f"{self.path}/{file}", encoding="ascii") as content:
                found[key] = int(content.read())
        return found
