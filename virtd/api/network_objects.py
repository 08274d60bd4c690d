# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Network and org.virtd1.NetworkManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .introspection import COMMON, DEFINE, Interface, Property, methods
from .kinds import Kind
from .variants import common

if TYPE_CHECKING:
    from .variants import Object

NETWORK = "org.virtd1.Network"
NETWORK_MANAGER = "org.virtd1.NetworkManager"


def properties(item: Object) -> dict[str, Var]:
    """From the short form."""
    return common(item) | {
        "Pid": Var("u", item.get("pid") or 0),
        "Mode": Var("s", item.get("mode") or ""),
        "Bridge": Var("s", item.get("bridge") or ""),
        "Addresses": Var("as", [item[key] for key in ("ipv4", "ipv6") if item.get(key)]),
    }


MEMBERS = Interface(
    methods=methods(
        "org.virtd1.Network",
        Info=("Info", "", "info=object:a{sv}"),
        Dump=("Dump", "", "text:s"),
        Leases=("Leases", "", "leases:aa{sv}"),
        Start=("Start", "", "changed:b"),
        Stop=("Stop", "force:b", "changed:b"),
        SetAutostart=("Autostart", "enable:b", "changed:b"),
        Undefine=("Undefine", "", ""),
    ),
    properties=COMMON
    | {
        "Pid": Property("u"),
        "Mode": Property("s"),
        "Bridge": Property("s"),
        "Addresses": Property("as"),
    },
)
MANAGING = Interface(
    methods=methods(
        "org.virtd1.Network",
        Define=DEFINE,
        DefineDefault=("DefineDefault", "", DEFINE[2]),
    )
)
KIND = Kind(
    segment="network",
    interface=NETWORK,
    members=MEMBERS,
    driver="network",
    listing=lambda host: host.networks.listing(),
    info=lambda host, name: host.networks.info(name),
    properties=properties,
    manager=NETWORK_MANAGER,
    managing=MANAGING,
)
