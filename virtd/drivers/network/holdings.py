# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resources that only one network may hold at a time; see objects/conflicts.py."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from ... import errors
from ...objects import conflicts
from ...objects.conflicts import Holding, Kind
from . import links, listening

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ...model.network import Forward, Network
    from ...objects.peers import Peers
    from .ports import Port

log = logging.getLogger(__name__)


class Owner(Protocol):
    """A network, active or not; see net.Net."""

    name: str
    definition: Network | None

    @property
    def active(self) -> bool: ...
    @property
    def running(self) -> Network | None: ...
    @property
    def mac(self) -> str: ...
    @property
    def ports(self) -> tuple[Port, ...]: ...


class Beside(Protocol):
    """Other objects that may hold something."""

    @property
    def peers(self) -> Peers: ...
    @property
    def nets(self) -> Mapping[str, Owner]: ...


def of(network: Network, mac: str) -> Iterator[Holding]:
    """What a definition claims; `mac` is the bridge's, "" if not known yet."""
    if mac:
        yield conflicts.mac(network.bridge_name, mac, "bridge", network.name)
    if network.own:
        yield Holding(Kind.BRIDGE, (network.bridge_name,), "bridge", f"bridge {network.bridge_name}")
    for index, forward in enumerate(network.forward):
        version = 6 if ":" in forward.to else 4
        name = f"{forward.protocol} port {forward.port} of the host"
        yield Holding(Kind.PORT, (forward.protocol.value, version, forward.port), f"forward[{index}]", name)


def all_of(nets: Mapping[str, Owner], *, running: bool) -> Iterator[tuple[str, Holding]]:
    """See conflicts.Holder."""
    for net in nets.values():
        in_force = net.running
        wanted = None if running or net.definition is in_force else net.definition
        for network in (in_force, wanted):
            if network is not None:
                mac = net.mac if network.own else links.mac(network.bridge_name)
                yield from ((f"network {net.name}", one) for one in of(network, mac))


async def require(net: Owner, network: Network, beside: Beside) -> None:
    """Raise Busy if somebody else holds what the new definition `network` claims."""
    before = net.running.forward if net.running is not None else ()
    await _require_unserved(net.name, network.forward, before)
    require_free(net, network, beside)


def require_free(net: Owner, network: Network, beside: Beside) -> None:
    """Like `require`, for what can be checked without waiting: other networks."""
    conflicts.require(beside.peers, f"network {net.name}", of(network, net.mac if network.own else ""))
    for other in beside.nets.values():
        theirs = other.running
        if other is net or theirs is None or not (network.own and theirs.own):
            continue
        for key, subnet in network.subnets():
            for _key, taken in theirs.subnets():
                if subnet.version == taken.version and subnet.overlaps(taken):
                    text = f"{subnet} ({key}) overlaps with {taken} of network {other.name}"
                    raise errors.Busy(
                        f"Cannot start network {net.name}: {text}",
                        hint=f"Stop network {other.name} first, or choose another prefix for one of the two.",
                    )


async def _require_unserved(name: str, forwards: tuple[Forward, ...], before: tuple[Forward, ...]) -> None:
    ports = {(one.protocol, ":" in one.to, one.port) for one in before}
    for one in await _served(forwards):
        forward = forwards[one.number]
        if (forward.protocol, ":" in forward.to, forward.port) not in ports:
            raise errors.Busy(f"Cannot start network {name}: forward[{one.number}]: {one.text}", hint=one.hint)


async def warnings(net: Owner | None, network: Network, peers: Peers) -> list[str]:
    """What others hold that the definition claims, as warnings for whoever defines it."""
    found = [
        f"forward[{one.number}]: {one.text}: it can't be started like that" for one in await _served(network.forward)
    ]
    mine = of(network, net.mac if net is not None and network.own else "")
    return found + conflicts.warnings(peers, f"network {network.name}", mine) + _addresses(net, network)


def _addresses(net: Owner | None, network: Network) -> list[str]:
    """Addresses that the definition assigns to one guest while another has them."""
    given = {port.ipv4: port for port in net.ports if port.ipv4} if net is not None and net.active else {}
    return [
        f"host[{index}].ipv4: {host.ipv4} is {port.user.replace('/', ' ')}'s until its next start"
        for index, host in enumerate(network.host)
        if host.ipv4 is not None and (port := given.get(host.ipv4)) is not None and port.mac != host.mac.lower()
    ]


async def _served(forwards: tuple[Forward, ...]) -> list[listening.Served]:
    if not forwards:
        return []
    try:
        return await asyncio.to_thread(listening.served, forwards)
    except OSError as exc:
        log.warning("Cannot list the ports that the host serves: %s", exc.strerror)
        return []
