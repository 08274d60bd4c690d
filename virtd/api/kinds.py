# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kinds of objects that D-Bus knows, each below a path of its own: /org/virtd1/<segment>/<name>."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import container_objects, domain_objects, network_objects, pool_objects

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..host import Host
    from ..systemd.bus import Var
    from .variants import Object


class Kind(NamedTuple):
    """One kind.

    `driver` is what its objects and events have as "driver". `listing` gives the short forms, `info` the long one;
    `properties` makes the properties of either, and `late` names those that only the long form has, with the value
    that stands for them until somebody asks. `ended` is for kinds whose objects end: the signal Ended carries what
    the long form has as "exit".
    """

    segment: str
    interface: str
    driver: str
    listing: Callable[[Host], Awaitable[Sequence[Object]]]
    info: Callable[[Host, str], Awaitable[Object]]
    properties: Callable[[Object], dict[str, Var]]
    late: dict[str, Var]
    ended: bool = False
    manager: str = ""  # the interface of /org/virtd1/<segment> itself, for what a kind offers besides its objects


async def _none() -> Sequence[Object]:
    """Of a driver that has nothing, and needn't be imported to say so."""
    return []


KINDS: dict[str, Kind] = {
    "domain": Kind(
        segment="domain",
        interface="org.virtd1.Domain",
        driver="qemu",
        listing=lambda host: host.listing(),
        info=lambda host, name: host.info(name),
        properties=domain_objects.properties,
        late=domain_objects.LATE,
        ended=True,
    ),
    "network": Kind(
        segment="network",
        interface="org.virtd1.Network",
        driver="network",
        listing=lambda host: host.networks.listing(),
        info=lambda host, name: host.networks.info(name),
        properties=network_objects.properties,
        late={},
        manager="org.virtd1.NetworkManager",
    ),
    "container": Kind(
        segment="container",
        interface="org.virtd1.Container",
        driver="lxc",
        listing=container_objects.listing,
        info=lambda host, name: host.containers.info(name),
        properties=container_objects.properties,
        late=container_objects.LATE,
        ended=True,
        manager="org.virtd1.ContainerManager",
    ),
    "pool": Kind(
        segment="pool",
        interface="org.virtd1.Pool",
        driver="storage",
        listing=lambda host: host.pools.listing() if "storage" in host.drivers else _none(),
        info=lambda host, name: host.pools.info(name),
        properties=pool_objects.properties,
        late={},
        manager="org.virtd1.PoolManager",
    ),
}
