# SPDX-License-Identifier: LGPL-2.1-or-later
"""A storage volume as a container's root: mounted by systemd, below /run, from before its record until its end.

If the daemon ends in between, the next one unmounts what belongs to no container.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, NamedTuple

from ... import errors, files
from ...model.drives import Format
from ..storage import mounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...model import container as model
    from ...objects.peers import Peers
    from ...systemd.units import Units

log = logging.getLogger(__name__)

ROOTS = ".roots"  # in /run/virtd/lxc; hidden, since it isn't a container's


class Mounted(NamedTuple):
    """A volume's path, and the unit of the mount that it is on, or "".

    `require_free()` raises Busy when somebody has taken the volume since; the record has to be written in the same
    step.
    """

    path: str
    after: str
    require_free: Callable[[], None]


def place(run: str, name: str) -> str:
    """Where the root of container `name` is mounted."""
    return f"{run}/{ROOTS}/{name}"


async def mount(root: model.Root, where: str, peers: Peers, units: Units, source: str, by: str) -> Mounted:
    """Mount the volume at `where`. Raises a VirtdError."""
    volumes = peers.volumes
    try:
        path, form, _, after = await volumes.for_guest(root.pool, root.volume, writes=True, by=by)
    except errors.NotFound as exc:
        raise errors.InvalidDefinition(source, "rootfs", exc.message, hint=exc.hint) from exc
    if form is not Format.RAW:
        raise errors.InvalidDefinition(source, "rootfs", f"expected a raw volume, got {root.volume}, which is {form}")
    require_free = await volumes.require_unused(root.pool, root.volume)
    await unmount(where, units)  # left by a start that was cut off
    try:
        files.make_directory(os.path.dirname(where), 0o700)
        files.make_directory(where, 0o755)
    except OSError as exc:
        raise errors.HostError(f"Cannot make {where}: {exc.strerror}") from exc
    # The file system's type is detected, as for any device; "loop" is for a file. Setuid programs are allowed to the
    # container alone, in its unit: see config.start_script.
    options = "rw,nodev,nosuid" if path.startswith("/dev/") else "loop,rw,nodev,nosuid"
    await mounts.mount(units, path, where, "auto", options)
    return Mounted(path, after, require_free)


async def unmount(where: str, units: Units) -> None:
    """Idempotent. Raises HostError when something still uses it. The directory stays, for the unit's ExecStop=."""
    if mounts.mounted(where) is not None:
        await mounts.unmount(units, where)


def forget(run: str, name: str) -> None:
    """Remove the mount point of container `name`, and with the last of them the directory that they are in."""
    with contextlib.suppress(OSError):  # there was none, or others are there
        os.rmdir(place(run, name))
    with contextlib.suppress(OSError):
        os.rmdir(f"{run}/{ROOTS}")


async def sweep(run: str, units: Units, alive: set[str]) -> None:
    """At a start of the daemon: unmount the volumes of containers that don't run."""
    try:
        names = os.listdir(f"{run}/{ROOTS}")
    except OSError:
        return
    for name in names:
        if name not in alive:
            try:
                await unmount(place(run, name), units)
            except errors.VirtdError as exc:
                log.warning("%s", exc)
            forget(run, name)
