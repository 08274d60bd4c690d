# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network cards of a domain that are in virtd's networks: the network driver makes a tap for each.

A tap belongs to the guest's user and stays when nobody has it open. Its name is made of the domain's, and is on
record before the tap exists, so that after a crash it is known what to remove.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors
from ...hints import do
from ...replies.guests import Nic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...model.domain import Domain
    from ...objects.peers import Peers
    from .devices.placing import Placed

DRIVER = "qemu"
PREFIX = "vt-"
INTERFACES = "/sys/class/net"


class Planned(msgspec.Struct, frozen=True):
    """One such card in a record: its place in the definition, its network and its tap."""

    index: int
    network: str
    interface: str
    mac: str
    trusted: bool = False


def interface_name(domain: str, index: int) -> str:
    """The tap's name: at most 15 characters, with the domain's name in it if that fits."""
    name = f"{PREFIX}{domain}-{index}"
    return name if len(name) <= 15 else f"{PREFIX}{zlib.crc32(domain.encode()):08x}-{index}"


def plan(domain: Domain, uuid: str, placed: Sequence[Placed]) -> list[Planned]:
    """The cards that need a tap; `placed` has their numbers."""
    from .devices import assembly  # no start of the daemon needs it

    cards = assembly.cards(domain, uuid, placed)
    return [
        Planned(index, nic.network, interface_name(domain.name, index), cards[index].mac, nic.trusted)
        for index, nic in enumerate(domain.nic)
        if nic.network is not None
    ]


def recorded(data: dict[str, Any]) -> list[Planned]:
    """The cards in a record; none if it isn't as this version writes it."""
    try:
        return msgspec.convert(data.get("nics", []), list[Planned])
    except msgspec.ValidationError:
        return []


def check(domain: Domain, source: str, peers: Peers) -> None:
    """Raise InvalidDefinition for a network that doesn't exist."""
    for index, nic in enumerate(domain.nic):
        if nic.network is None:
            continue
        try:
            peers.networks.bridge_of(nic.network)
        except errors.NotFound as exc:
            raise errors.InvalidDefinition(
                source,
                f"nic[{index}].network",
                f"there is no network {nic.network}",
                hint=do("define", "network", "default") + " makes one; " + do("list", "network") + " shows all.",
            ) from exc


async def connect(name: str, planned: list[Planned], uid: int, peers: Peers) -> None:
    """Make the taps, and start networks that aren't active. Raises a VirtdError."""
    for nic in planned:
        await peers.networks.attach(
            nic.network,
            user=f"{DRIVER}/{name}",
            interface=nic.interface,
            mac=nic.mac,
            uid=uid,
            trusted=nic.trusted,
        )


async def sweep(alive: set[str], peers: Peers) -> None:
    """Remove taps of domains that don't run: a crash may have left them, and their records be lost."""
    try:
        found = [name for name in os.listdir(INTERFACES) if name.startswith(PREFIX)]
    except OSError:
        return
    if found:
        await peers.networks.sweep(DRIVER, alive)


def describe(domain: Domain, uuid: str, placed: Sequence[Placed], peers: Peers, *, alive: bool) -> list[Nic]:
    """The cards, for Info."""
    from .devices import assembly  # no start of the daemon needs it

    rows = []
    for index, nic in enumerate(assembly.cards(domain, uuid, placed)):
        mac = nic.mac
        network = nic.network if alive else None
        rows.append(
            Nic(
                network=nic.network,
                mode="user" if nic.network is None else None,
                mac=mac,
                interface=interface_name(domain.name, index) if network is not None else None,
                addresses=peers.networks.addresses_of(network, mac) if network is not None else [],
            )
        )
    return rows
