# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container and org.virtd1.ContainerManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .variants import supervised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..host import Host
    from .variants import Object

LATE: dict[str, Var] = {"Exit": Var("a{sv}", {}), "Addresses": Var("as", [])}


async def listing(host: Host) -> Sequence[Object]:
    """The short forms; a host without containers isn't made to import what knows about them."""
    return await host.containers.listing() if "lxc" in host.drivers else []


def properties(item: Object) -> dict[str, Var]:
    """From what `info` says; all but Exit and Addresses from the short form."""
    found = supervised(item)
    if "exit" in item:
        found["Addresses"] = Var("as", item.get("addresses") or [])
    return found
