# SPDX-License-Identifier: LGPL-2.1-or-later
"""Coexistence with firewalld, whose chains drop what comes from interfaces in none of its zones.

So each bridge is put into the zone "virtd", which the package brings: our own rules then decide about forwarding, and
of the host's services guests reach only DHCP and DNS. firewalld keeps the assignment over a reload and forgets it
when it stops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import errors
from ...systemd.bus import BusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...systemd.bus import Bus
    from ...systemd.units import Units

NAME = "org.fedoraproject.FirewallD1"
PATH = "/org/fedoraproject/FirewallD1"
ZONES = "org.fedoraproject.FirewallD1.zone"
DBUS = "org.freedesktop.DBus"
ZONE = "virtd"
LIMIT = 10.0


async def running(bus: Bus) -> bool:
    """Whether firewalld is running; doesn't start it."""
    (there,) = await bus.call(DBUS, "/org/freedesktop/DBus", DBUS, "NameHasOwner", "s", (NAME,), timeout=LIMIT)
    return bool(there)


async def adopt(units: Units, bridge: str) -> None:
    """Put a bridge into our zone if firewalld is running. Raises HostError."""
    bus = units.bus
    try:
        if await running(bus):
            await bus.call(NAME, PATH, ZONES, "changeZoneOfInterface", "ss", (ZONE, bridge), timeout=LIMIT)
    except BusError as exc:
        if "ZONE_ALREADY_SET" in exc.message:
            return
        if "INVALID_ZONE" in exc.message:
            raise errors.HostError(
                f"it doesn't know the zone {ZONE} yet", hint="firewall-cmd --reload, then: systemctl reload virtd."
            ) from exc
        raise errors.HostError(f"it refused: {exc.message}", hint="See: systemctl status firewalld.") from exc


async def watch(bus: Bus, changed: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    """Call `changed` when firewalld starts, reloads or stops. Returns a function that cancels this."""

    def owner(_path: str, _interface: str, _member: str, args: tuple[str, ...]) -> None:
        if args[0] == NAME:
            changed()

    def reloaded(*_signal: object) -> None:
        changed()

    first = await bus.subscribe(DBUS, DBUS, "NameOwnerChanged", "/org/freedesktop/DBus", owner, arg0=NAME)
    second = await bus.subscribe(NAME, NAME, "Reloaded", PATH, reloaded)

    async def end() -> None:
        await first()
        await second()

    return end
