# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only one object can have at a time, across all drivers: an address in a network, a disk, a port.

Each driver lists what its objects hold, those that run or all that are defined (Holder). What is to be defined or
started is compared with that here. Two definitions may want the same thing as long as only one of them runs, which is
worth a warning; two running objects may not have it.
"""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from .. import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .peers import Peers


class Kind(StrEnum):
    """What is held. The comments say what identifies it: `Holding.what`."""

    MAC = "mac"  # bridge, address in lower case
    INTERFACE = "interface"  # name
    FILE = "file"  # path, as a definition has it
    IMAGE = "image"  # device, inode
    VOLUME = "volume"  # pool, volume
    PORT = "port"  # protocol, 4 or 6, number
    BRIDGE = "bridge"  # name


class Holding(NamedTuple):
    """One such thing.

    `key` is where the definition asks for it and `name` what a person calls it; only what is compared with others
    needs them. Holdings that are all `shared` don't conflict, as long as all of them write or none does.
    """

    kind: Kind
    what: tuple[str | int, ...]
    key: str = ""
    name: str = ""
    shared: bool = False
    writes: bool = False

    def goes_with(self, other: Holding) -> bool:
        """Whether two objects may have this at the same time."""
        return self.shared and other.shared and self.writes == other.writes


@runtime_checkable
class Holder(Protocol):
    """A driver whose objects hold something for themselves alone."""

    def holdings(self, *, running: bool) -> Iterator[tuple[str, Holding]]:
        """What the running objects hold, or all that run or are defined, each with its owner: "domain web1"."""


class Conflict(NamedTuple):
    """Two objects want the same thing. `other` is who else holds it, "domain web1", or "" for the object itself."""

    mine: Holding
    other: str


def mac(bridge: str, address: str, key: str = "", network: str = "") -> Holding:
    name = f"MAC address {address} in network {network}" if network else ""
    return Holding(Kind.MAC, (bridge, address.lower()), key, name)


def bridges(peers: Peers) -> Callable[[str], str]:
    """A function from a network to its bridge: networks on the same bridge are neighbours."""

    @functools.cache
    def bridge_of(network: str) -> str:
        try:
            return peers.networks.bridge_of(network) or network
        except errors.NotFound:
            return network

    return bridge_of


def require(peers: Peers, me: str, mine: Iterable[Holding]) -> None:
    """Raise Busy if a running object holds what `me` ("domain web1") needs. Doesn't wait for anything."""
    for found in _between(peers, me, list(mine), running=True):
        own = found.mine
        where = f" ({own.key})" if own.key else ""
        who = f"in use by {found.other}" if found.other else "in this definition twice"
        raise errors.Busy(f"Cannot start {me}: {own.name}{where} is {who}", hint=_hint(found))


def warnings(peers: Peers, me: str, mine: Iterable[Holding]) -> list[str]:
    """What other objects hold too, running or just defined."""
    found_ones = {}
    for found in _between(peers, me, list(mine), running=False):
        own = found.mine
        text = f"{own.name} is in this definition twice: it can't be started"
        if found.other:
            text = f"{own.name} is {found.other}'s as well: both can't run at the same time"
        found_ones[own.key, found.other] = f"{own.key}: {text}" if own.key else text
    return list(found_ones.values())


def _between(peers: Peers, me: str, mine: list[Holding], *, running: bool) -> Iterator[Conflict]:
    if not mine:
        return
    wanted: dict[tuple[Kind, tuple[str | int, ...]], Holding] = {}
    for one in mine:
        if (same := wanted.setdefault((one.kind, one.what), one)) is not one and not same.goes_with(one):
            yield Conflict(one, "")
    for driver in peers:
        if not isinstance(driver, Holder):
            continue
        for other, theirs in driver.holdings(running=running):
            found = wanted.get((theirs.kind, theirs.what))
            if found is not None and other != me and not found.goes_with(theirs):
                yield Conflict(found, other)


def _hint(found: Conflict) -> str:
    other = found.other
    match found.mine.kind:
        case Kind.MAC if not other:
            return "Give each [[nic]] a mac of its own, or none: then it gets one."
        case Kind.MAC:
            return f"Stop {other} first, or give one of the two another mac in its [[nic]]."
        case Kind.FILE | Kind.IMAGE | Kind.VOLUME:
            return (
                f"Two guests that write to one disk destroy it. Stop {other}, or mark the disk readonly in both, or "
                "shared in both if what is on it is made for that."
            )
        case Kind.PORT:
            return f"Stop {other} first, or have one of the two forward another port."
        case Kind.INTERFACE:
            return f"Names of interfaces are made of names and uuids. Stop {other} first, or give one another uuid."
        case Kind.BRIDGE:
            return f"Stop {other} first, or give one of the two another bridge."
