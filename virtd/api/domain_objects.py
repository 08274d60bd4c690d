# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Domain on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bus import Var
from ..units import unit_name
from .introspection import DOMAIN, INTERFACES
from .variants import dictionary, limit

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ..host import Caller, Host
    from .variants import Object

LATE: dict[str, Var] = {"Exit": Var("a{sv}", {})}


def properties(item: Object) -> dict[str, Var]:
    """From what Host.info says; all but Exit from the short form."""
    number = item.get("id")
    return {
        "Name": Var("s", item["name"]),
        "Driver": Var("s", item["driver"]),
        "Uuid": Var("s", item["uuid"]),
        "Unit": Var("s", item.get("unit") or unit_name(item["driver"], item["name"])),
        "State": Var("s", str(item["state"])),
        "Reason": Var("s", item.get("reason") or ""),
        "Since": Var("s", item.get("since") or ""),
        "Pid": Var("u", item.get("pid") or 0),
        # What has no number isn't running: -1, as users of libvirt know it.
        "Id": Var("i", -1 if number is None else number),
        "Autostart": Var("b", bool(item.get("autostart"))),
    } | ({"Exit": Var("a{sv}", dictionary(item["exit"] or {}))} if "exit" in item else {})


async def call(host: Host, name: str, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    match member:
        case "Info":
            return (dictionary(await host.info(name)),)
        case "Dump":
            return (await host.dump(name),)
        case "Wait":
            states, timeout = args
            return ((await host.wait(name, states, limit(timeout)))["state"],)
    assert by is not None
    done: Awaitable[Object]
    match member:
        case "Shutdown":
            done = host.shutdown(name, limit(args[0]), by=by)
        case "Kill":
            done = host.kill(name, args[0], by=by)
        case "Reboot":
            done = host.reboot(name, force=args[0], timeout=None, by=by)
        case "SetAutostart":
            done = host.set_autostart(name, args[0], by=by)
        case simple:
            # Start, Stop, Suspend, Resume, Undefine: the table has let nothing else through.
            done = getattr(host, simple.lower())(name, by=by)
    result = await done
    return (result["changed"],) if INTERFACES[DOMAIN].methods[member].gives.signature else ()
