# SPDX-License-Identifier: LGPL-2.1-or-later
"""What domains hold exclusively: see objects.conflicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...objects import conflicts
from ...objects.conflicts import Holding, Kind
from . import prerequisites
from .devices import assembly

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from ...model.domain import Domain
    from .devices.placing import Placed
    from .guest import QemuGuest
    from .nics import Planned


def of_images(images: dict[tuple[int, int], tuple[str, bool]], shared: Collection[str] = ()) -> Iterator[Holding]:
    """Opened files, as opened.identified() returns them; `shared` are those that several guests may write to."""
    for identity, (path, writes) in images.items():
        yield Holding(Kind.IMAGE, identity, "", path, not writes or path in shared, writes)


def of_cards(nics: Iterable[Planned], bridge_of: Callable[[str], str]) -> Iterator[Holding]:
    """Cards in networks."""
    for nic in nics:
        key = f"nic[{nic.index}]"
        yield conflicts.mac(bridge_of(nic.network), nic.mac, key, nic.network)
        yield Holding(Kind.INTERFACE, (nic.interface,), key, f"interface {nic.interface}")


def defined(
    domain: Domain, uuid: str, placed: Sequence[Placed], bridge_of: Callable[[str], str]
) -> Iterator[Holding]:
    """What a definition wants; as long as there is no `uuid`, only the MAC addresses that it names."""
    for device in assembly.assemble(domain, uuid, placed=placed):
        yield from device.holdings(bridge_of)


def here(domain: Domain) -> Iterator[Holding]:
    """Those of its files that exist, by device and inode: others may have them under other names."""
    for index, disk in enumerate(domain.disk):
        if disk.path is not None and (identity := prerequisites.identity(disk.path)) is not None:
            shared, writes = disk.readonly or disk.shared, not disk.readonly
            yield Holding(Kind.IMAGE, identity, f"disk[{index}]", disk.path, shared, writes)


def running(machine: QemuGuest, bridge_of: Callable[[str], str]) -> list[Holding]:
    """What a running domain holds, by its record. It is cached, because every other start asks for it."""
    opened = machine.data.get("images")
    if opened is None or machine.held is None or machine.held[0] is not opened:
        shared = machine.data.get("shared", ())
        machine.held = (opened, [*of_images(machine.images(), shared), *of_cards(machine.cards, bridge_of)])
    return machine.held[1]
