# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mounts as systemd's units.

systemd mounts and unmounts, keeps the mount while virtd is away and over a soft reboot, and, when the host goes down,
until the guests have ended.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from ... import errors, mountinfo
from ...systemd.bus import BusError
from ...systemd.names import FINAL_TARGETS, GROUND, mount_unit
from ...text import word

if TYPE_CHECKING:
    from ...systemd.units import Units

TRANSIENT = "/run/systemd/transient"  # where systemd keeps the files of transient units
LIMIT = 90.0  # seconds; mount.nfs gives a server that doesn't answer about as long


def table() -> dict[str, str]:
    """What is mounted, as mount(8) would name it, by mount point. Doesn't touch the file systems."""
    return {mount.point: mount.source for mount in mountinfo.mounts()}  # the last one hides the others


def mounted(path: str) -> str | None:
    """What is mounted at `path`; None if nothing is."""
    return table().get(path)


def same_source(one: str, other: str) -> bool:
    """Whether two names refer to one device or export."""
    if one == other:
        return True
    return one.startswith("/") and other.startswith("/") and os.path.realpath(one) == os.path.realpath(other)


async def mount(units: Units, what: str, where: str, kind: str, options: str) -> None:
    """Have systemd mount `what` at `where`, which must be free. Raises HostError with mount(8)'s own message."""
    name = mount_unit(where)
    with contextlib.suppress(OSError):
        # After a soft reboot systemd leaves the file behind, and refuses another transient unit of that name.
        os.unlink(f"{TRANSIENT}/{name}")
    try:
        result = await units.start_other(
            name,
            (
                # A backslash at the end of a line would swallow the next one when systemd reads it again.
                ("Description", "s", f"{where} (storage of virtd)"),
                # Default dependencies include umount.target, which is part of a soft reboot; guests survive that.
                ("DefaultDependencies", "b", False),
                ("Conflicts", "as", list(FINAL_TARGETS)),
                ("Before", "as", [*FINAL_TARGETS, GROUND]),
                ("After", "as", ["network.target"]),  # what an export needs, until it is unmounted
                ("What", "s", what),
                ("Type", "s", kind),
                ("Options", "s", options),
                ("CollectMode", "s", "inactive-or-failed"),
                ("TimeoutUSec", "t", int(LIMIT * 1_000_000)),
            ),
            timeout=LIMIT + 10,
        )
    except BusError as exc:
        raise errors.HostError(f"systemd refused to mount {what} at {where}: {exc.message}") from exc
    if result != "done":
        words = await _words(name)
        raise errors.HostError(
            f"Cannot mount {what} at {where}: {words or result}", hint=f"See: journalctl -u {name}"
        )


async def _words(unit: str) -> str:
    """What mount(8) wrote, from the journal: systemd runs it, and keeps its output nowhere else."""
    import asyncio

    return await asyncio.to_thread(_read_words, unit)


def _read_words(unit: str) -> str:
    try:
        from systemd import journal

        with journal.Reader() as reader:
            reader.this_boot()
            reader.add_match(_SYSTEMD_UNIT=unit)
            reader.seek_tail()
            found: list[str] = []
            while len(found) < 3 and (entry := reader.get_previous()):
                found.insert(0, str(entry.get("MESSAGE", "")).strip())
    except (ImportError, OSError):
        return ""
    last = [line for line in found if line.startswith("mount")] or found
    return re.sub(r"\s+", " ", "; ".join(last[-1:]))


async def unmount(units: Units, where: str) -> None:
    """Raises HostError if something is still open there."""
    try:
        await units.stop(mount_unit(where), timeout=LIMIT)
    except errors.HostError as exc:
        raise errors.HostError(
            f"Cannot unmount {where}: something still uses it", hint=f"fuser -vm {word(where)} shows what."
        ) from exc
    if mounted(where) is not None:
        raise errors.HostError(
            f"Cannot unmount {where}: something still uses it", hint=f"fuser -vm {word(where)} shows what."
        )


async def is_ours(units: Units, where: str) -> bool:
    """Whether virtd mounted it, and not fstab(5) or a person."""
    # Transient= is no help: it is lost over a soft reboot.
    return str(await units.unit_property(mount_unit(where), "FragmentPath")).startswith(f"{TRANSIENT}/")
