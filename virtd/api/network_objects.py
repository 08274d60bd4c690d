# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Network and org.virtd1.NetworkManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bus import Var
from .variants import common, dictionary

if TYPE_CHECKING:
    from ..host import Caller, Host
    from .variants import Object


def properties(item: Object) -> dict[str, Var]:
    """From the short form."""
    return common(item) | {
        "Pid": Var("u", item.get("pid") or 0),
        "Mode": Var("s", item.get("mode") or ""),
        "Bridge": Var("s", item.get("bridge") or ""),
        "Addresses": Var("as", [item[key] for key in ("ipv4", "ipv6") if item.get(key)]),
    }


async def call(host: Host, name: str, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    networks = host.networks
    match member:
        case "Info":
            return (dictionary(await networks.info(name)),)
        case "Dump":
            return (await networks.dump(name),)
        case "Leases":
            return ([dictionary(lease) for lease in await networks.leases(name)],)
    assert by is not None
    match member:
        case "Start":
            return ((await networks.start(name, by=by))["changed"],)
        case "Stop":
            return ((await networks.stop(name, force=args[0], by=by))["changed"],)
        case "SetAutostart":
            return ((await networks.set_autostart(name, args[0], by=by))["changed"],)
        case _:  # Undefine: the table has let nothing else through
            await networks.undefine(name, by=by)
            return ()


async def manage(host: Host, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    assert by is not None
    if member == "Define":
        text, source, check = args
        done = await host.networks.define(text, source, check=check, by=by)
    else:
        done = await host.networks.define_default(by=by)
    return done["name"], done["uuid"], done["created"], done["path"], done["warnings"]
