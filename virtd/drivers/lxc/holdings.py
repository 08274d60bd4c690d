# SPDX-License-Identifier: LGPL-2.1-or-later
"""What containers hold exclusively: see objects/conflicts.py."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from ... import hostroot
from ...objects import conflicts
from ...objects.conflicts import Holding, Kind
from .links import interface_names, mac_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...model import container as model
    from .container import Container


def to_start(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What it is about to hold, except for a volume, which the storage driver checks."""
    for path, (dev, ino) in disks(container):
        yield Holding(Kind.IMAGE, (dev, ino), "device", path)
    yield from _cards(container, uuid, bridge_of)
    for index, name in enumerate(interface_names(uuid, len(container.networks))):
        yield Holding(Kind.INTERFACE, (name,), f"nic[{index}]", f"interface {name}")


def _cards(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    for index, nic in enumerate(container.nic):
        if nic.network is not None and (nic.mac or uuid):
            address = (nic.mac or mac_of(uuid, index)).lower()
            yield conflicts.mac(bridge_of(nic.network), address, f"nic[{index}]", nic.network)


def disks(container: model.Container) -> Iterator[tuple[str, tuple[int, int]]]:
    """The disks among its devices, each with device and inode. (Several may have one directory as their root.)"""
    for device in container.device:
        with contextlib.suppress(OSError):
            status = os.stat(hostroot.seen(device.path))
            if stat.S_ISBLK(status.st_mode):
                yield device.path, (status.st_dev, status.st_ino)


def defined(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What a definition wants; without a `uuid` yet, only the addresses that it names."""
    if (root := container.volume) is not None:
        name = f"volume {root.volume} of pool {root.pool}"
        yield Holding(Kind.VOLUME, (root.pool, root.volume), "rootfs", name)
    yield from _cards(container, uuid, bridge_of)


def running(container: Container, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What a running container holds, by its record."""
    kept = container.kept
    for image in kept.images:
        yield Holding(Kind.IMAGE, (image.dev, image.ino), shared=not image.writes)
    for disk in kept.held:
        yield Holding(Kind.IMAGE, (disk.dev, disk.ino))
    for card in kept.cards:
        yield conflicts.mac(bridge_of(card.network), card.mac)
    for name in kept.interfaces:
        yield Holding(Kind.INTERFACE, (name,))
