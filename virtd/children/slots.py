# SPDX-License-Identifier: LGPL-2.1-or-later
"""The slots of a child: their names, and how we verify that PID 1 has what was put into them."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from .. import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..fdstore import Store
    from ..systemd.units import Units

STDIN, STDOUT, STDERR, CONSOLE_LOG, STDERR_LOG = SLOTS = ("stdin", "stdout", "stderr", "console.log", "log")

LOOKS = 3  # at PID 1's store, before a descriptor counts as not kept
PAUSE = 0.02  # seconds between two of them


def identities(descriptors: Mapping[str, int]) -> dict[str, str]:
    """The slots' identities for a record: "device:inode" of each descriptor."""
    found = {}
    for name, fd in descriptors.items():
        status = os.fstat(fd)
        found[name] = f"{status.st_dev}:{status.st_ino}"
    return found


async def verify(store: Store, units: Units, unit: str, wanted: list[str]) -> None:
    """Verify that PID 1 has these slots in the store of `unit`. Raises HostError.

    A message that was sent proves nothing, and sd_notify(3) doesn't report a full store.
    """
    boxed = any(store.kept_as(name) != name for name in wanted)
    missing: set[str] = set()
    for look in range(LOOKS):
        if look:
            await asyncio.sleep(PAUSE)
        dump = await units.store_dump(unit, None if boxed else wanted)
        if dump is None:  # systemd < 254 can't tell
            return
        difference = store.verify(dump)
        missing = set(wanted) & {*difference.missing, *difference.mismatched}
        if not missing:
            return
    if boxed:
        # The box also contains others' slots, which PID 1 must keep whatever happens to ours.
        await asyncio.to_thread(store.send_again)
    raise errors.HostError(
        f"systemd didn't keep {', '.join(sorted(missing))} in its FD store",
        hint=f"Raise FileDescriptorStoreMax= of {unit}. See: journalctl -b _PID=1 -g FileDescriptorStore",
    )
