# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container and org.virtd1.ContainerManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .introspection import DEFINE, GUEST, SUPERVISED, Args, Interface, Property, methods
from .kinds import Kind
from .variants import supervised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..host import Host
    from .variants import Object

CONTAINER = "org.virtd1.Container"
CONTAINER_MANAGER = "org.virtd1.ContainerManager"
LATE: dict[str, Var] = {"Exit": Var("a{sv}", {}), "Addresses": Var("as", [])}


async def listing(host: Host) -> Sequence[Object]:
    """The short forms; a host without containers needn't import their module."""
    return await host.containers.listing() if "lxc" in host.drivers else []


def properties(item: Object) -> dict[str, Var]:
    """From `info`; all but Exit and Addresses from the short form."""
    found = supervised(item)
    if "exit" in item:
        found["Addresses"] = Var("as", item.get("addresses") or [])
    return found


MEMBERS = Interface(
    methods=methods(
        "org.virtd1.Container",
        **GUEST,
        Reboot=("Reboot", "timeout:d", "changed:b"),
        Freeze=("Freeze", "", "changed:b"),
        Thaw=("Thaw", "", "changed:b"),
    ),
    properties=SUPERVISED
    | {
        "Addresses": Property("as", "invalidates"),
    },
    signals={"Ended": Args("exit:a{sv}")},
)
MANAGING = Interface(methods=methods("org.virtd1.Container", Define=DEFINE))
KIND = Kind(
    segment="container",
    interface=CONTAINER,
    members=MEMBERS,
    driver="lxc",
    listing=listing,
    info=lambda host, name: host.containers.info(name),
    properties=properties,
    late=LATE,
    ended=True,
    manager=CONTAINER_MANAGER,
    managing=MANAGING,
)
