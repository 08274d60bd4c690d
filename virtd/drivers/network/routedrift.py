# SPDX-License-Identifier: LGPL-2.1-or-later
"""Routes and rules of others that would send packets for guests elsewhere than to their bridge."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from . import links, routes
from .bridgedrift import alias_of
from .drift import Drift
from .rtnetlink import MAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...model.network import Subnet
    from .kernel import Kernel, Way
    from .ports import Ground
    from .routes import Route

MOST_ADDRESSES = 16  # maximum number of guests' addresses whose routes are queried
DEFAULT = 253  # RT_TABLE_DEFAULT, consulted after the main table


def differences(kernel: Kernel, ground: Ground, there: list[Route]) -> Iterator[Drift]:
    """What diverts the host's packets to guests away from the bridge."""
    network, name = ground.network, ground.network.bridge_name
    for _key, subnet in network.subnets():
        if why := routes.in_the_way(subnet, name, there):
            hint = "Remove that route, or choose another prefix. ip route and ip -6 route show it."
            if other := links.bearing(alias_of(network), ground.mac, [name]):
                hint = f"{other} was the network's bridge until it was renamed: ip link delete {other}."
            yield Drift(f"{name} {subnet} wins", f"{name}: {why}", None, hint)
            continue
        own = str((network.interface4 if subnet.version == 4 else network.interface6).ip)  # type: ignore[union-attr]
        for address in _samples(ground, subnet, own):
            route = kernel.route_to(address)
            if route is not None and route.interface == name:
                continue
            key = f"{name} {subnet}"
            rules = "ip rule" if subnet.version == 4 else "ip -6 rule"
            if route is None and any(one.prefix == subnet and one.interface == name for one in there):
                text = f"{name}: what is for {address} is refused by a rule of policy routing"
                hint = f"{rules} shows it. Remove that rule, or choose another prefix."
                yield Drift(f"{key} wins", text, None, hint)
            elif route is None or _lacks(route, subnet):
                yield Drift(
                    key, f"{name}: no route to {subnet}",
                    partial(_lead, name, str(subnet), own),
                    f"ip route get {address} says where else it leads.",
                )  # fmt: skip
            else:
                by = f"{route.prefix or 'a default route'} through {route.interface or 'nowhere'}"
                table = "" if route.table == MAIN else f" in table {route.table}, by a rule of policy routing"
                hint = f"ip route get {address} and {rules} show them. Remove that route, or choose another prefix."
                yield Drift(f"{key} wins", f"{name}: what is for {address} goes by {by}{table}", None, hint)
            break


def _lead(name: str, prefix: str, source: str, kernel: Kernel) -> None:
    kernel.add_route(name, prefix, source)


def _lacks(route: Way, subnet: Subnet) -> bool:
    """Whether packets would go to the bridge if the main table had the route."""
    length = int(route.prefix.partition("/")[2] or 0)
    return route.table in (MAIN, DEFAULT) and length < subnet.prefixlen


def _samples(ground: Ground, subnet: Subnet, own: str) -> list[str]:
    found = [str(subnet[1]), str(subnet[-2])]
    if subnet.version == 4:
        found += sorted({port.ipv4 for port in ground.ports if port.ipv4})[:MOST_ADDRESSES]
    return [address for address in dict.fromkeys(found) if address != own]
