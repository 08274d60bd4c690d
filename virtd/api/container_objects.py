# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container and org.virtd1.ContainerManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bus import Var
from .variants import dictionary, limit, supervised

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ..host import Caller, Host
    from .variants import Object

LATE: dict[str, Var] = {"Exit": Var("a{sv}", {}), "Addresses": Var("as", [])}


async def listing(host: Host) -> list[Object]:
    """The short forms; a host without containers isn't made to import what knows about them."""
    return await host.containers.listing() if "lxc" in host.drivers else []


def properties(item: Object) -> dict[str, Var]:
    """From what `info` says; all but Exit and Addresses from the short form."""
    found = supervised(item)
    if "exit" in item:
        found["Addresses"] = Var("as", item.get("addresses") or [])
    return found


async def call(host: Host, name: str, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    containers = host.containers
    match member:
        case "Info":
            return (dictionary(await containers.info(name)),)
        case "Dump":
            return (await containers.dump(name),)
        case "Wait":
            states, timeout = args
            return ((await containers.wait(name, states, limit(timeout)))["state"],)
    assert by is not None
    done: Awaitable[Object]
    match member:
        case "Shutdown":
            done = containers.shutdown(name, limit(args[0]), by=by)
        case "Reboot":
            done = containers.reboot(name, limit(args[0]), by=by)
        case "Kill":
            done = containers.kill(name, args[0], by=by)
        case "SetAutostart":
            done = containers.set_autostart(name, args[0], by=by)
        case simple:
            # Start, Stop, Freeze, Thaw, Undefine: the table has let nothing else through.
            done = getattr(containers, simple.lower())(name, by=by)
    result = await done
    return (result["changed"],) if member not in ("Kill", "Undefine") else ()


async def manage(host: Host, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    assert by is not None
    text, source, check = args
    done = await host.containers.define(text, source, check=check, by=by)
    return (done["name"], done["uuid"], done["created"], done["path"], done["warnings"])
