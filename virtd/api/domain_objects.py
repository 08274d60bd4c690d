# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Domain on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bus import Var
from .introspection import DOMAIN, INTERFACES
from .variants import dictionary, limit, supervised

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ..host import Caller, Host
    from .variants import Object

LATE: dict[str, Var] = {"Exit": Var("a{sv}", {})}


def properties(item: Object) -> dict[str, Var]:
    """From what Host.info says; all but Exit from the short form."""
    number = item.get("id")
    # What has no number isn't running: -1, as users of libvirt know it.
    return supervised(item) | {"Id": Var("i", -1 if number is None else number)}


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
