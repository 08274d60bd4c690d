# SPDX-License-Identifier: LGPL-2.1-or-later
"""What containers have that nobody else may have at the same time: see drivers.conflicts."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any

from ...model import container as model
from ...objects import conflicts
from ...objects.conflicts import Holding, Kind
from .container import interface_names, mac_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .container import Container


def to_start(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What it is going to have. A volume is the storage driver's to look after."""
    for path, (dev, ino) in disks(container):
        yield Holding(Kind.IMAGE, (dev, ino), "device", path)
    yield from _cards(container, uuid, bridge_of)
    nics = [index for index, nic in enumerate(container.nic) if nic.network is not None]
    for index, name in zip(nics, interface_names(uuid, len(nics)), strict=True):
        yield Holding(Kind.INTERFACE, (name,), f"nic[{index}]", f"interface {name}")


def _cards(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    nics = [nic for nic in container.nic if nic.network is not None]
    for index, nic in enumerate(nics):
        if nic.network is not None and (nic.mac or uuid):
            address = (nic.mac or mac_of(uuid, index)).lower()
            yield conflicts.mac(bridge_of(nic.network), address, f"nic[{index}]", nic.network)


def disks(container: model.Container) -> Iterator[tuple[str, tuple[int, int]]]:
    """The disks among its devices, each with device and inode. (A directory several may have as their root.)"""
    for device in container.device:
        with contextlib.suppress(OSError):
            status = os.stat(device.path)
            if stat.S_ISBLK(status.st_mode):
                yield device.path, (status.st_dev, status.st_ino)


def defined(container: model.Container, uuid: str, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What a definition wants; without a `uuid` yet, those addresses only that it names."""
    root = container.rootfs
    if isinstance(root, model.Root):
        name = f"volume {root.volume} of pool {root.pool}"
        yield Holding(Kind.VOLUME, (root.pool, root.volume), "rootfs", name)
    yield from _cards(container, uuid, bridge_of)


def running(container: Container, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """What one that runs has, by its record, in which anything may be."""
    data: dict[str, Any] = container.record.data if container.record is not None else {}
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
        for _path, dev, ino, writes in data.get("images", []):
            yield Holding(Kind.IMAGE, (int(dev), int(ino)), shared=not writes)
        for dev, ino in data.get("held", []):
            yield Holding(Kind.IMAGE, (int(dev), int(ino)))
        for address, network in data.get("macs", []):
            yield conflicts.mac(bridge_of(network), address)
        for name in data.get("interfaces", []):
            yield Holding(Kind.INTERFACE, (str(name),))
