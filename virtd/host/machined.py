# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registers running guests with systemd-machined, so that `machinectl list` shows them as qemu-NAME and lxc-NAME.

Nothing waits for this and nothing depends on it. It listens to the host's events like a front end, and brings
machined's list in line with what runs whenever either changes.

machined may decide on its own to end a machine. When a container's first process ends, which also happens when the
container reboots, systemd 258 and later sends SIGTERM to the process that registered it. So virtd registers
containers from a short-lived process, which has ended by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .. import errors
from ..children.hardening import TOOL
from ..systemd.bus import DBUS, DBUS_PATH, BusError
from ..systemd.transient import UnitSpec

if TYPE_CHECKING:
    from ..guests.driver import GuestDriver
    from ..replies import Reply
    from ..systemd.units import Units
    from . import Host

log = logging.getLogger(__name__)

MACHINED = "org.freedesktop.machine1"
PATH = "/org/freedesktop/machine1"
MANAGER = f"{MACHINED}.Manager"
CLASSES = {"qemu": "vm", "lxc": "container"}
NAME_MAX = 64  # maximum length of a host name, which a machine's name must be
SUPERVISORS_SINCE = 258
LIMIT = 10.0  # seconds for a call to machined
RETRY = 60.0  # seconds before a machined that didn't answer is called again
AWAY = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")


class Machine(NamedTuple):
    """A guest as registered with machined. `leader` is the PID of its process, or of a container's first one."""

    kind: str
    leader: int
    uuid: str

    @property
    def id(self) -> bytes:
        return bytes.fromhex(self.uuid.replace("-", "")) or bytes(16)


def name_of(driver: str, name: str, uuid: str) -> str:
    """The name as libvirt forms it, but without the number; a domain and a container of one name stay distinct."""
    whole = f"{driver}-{name}"
    return (whole if len(whole) <= NAME_MAX else f"{whole[: NAME_MAX - 9]}-{uuid[:8]}").rstrip(".-")


class Registrar:
    """Keeps machined's list up to date, for as long as one connection to the bus lasts."""

    def __init__(self, host: Host, units: Units) -> None:
        self._host = host
        self._units = units
        self._bus = units.bus
        self._wanted: dict[str, Machine] = {}
        self._told: dict[str, Machine] = {}
        self._due = asyncio.Event()
        self._again = False

    async def run(self) -> None:
        """Run until cancelled."""
        unsubscribe = self._host.subscribe(self._event)
        try:
            await self._bus.subscribe(DBUS, DBUS, "NameOwnerChanged", DBUS_PATH, self._owner_changed, arg0=MACHINED)
            for driver in self._host.drivers:
                if driver.name in CLASSES:
                    for machine in cast("GuestDriver[Any, Any]", driver).machines.values():
                        self._event("", driver.describe_named(machine.name))
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY if self._again else None):
                        await self._due.wait()
                self._due.clear()
                await self._tell()
        finally:
            unsubscribe()

    def _event(self, _event: str, item: Reply) -> None:
        driver = str(item["driver"])
        if driver not in CLASSES:
            return
        name = name_of(driver, str(item["name"]), str(item.get("uuid", "")))
        # While a guest starts, its PID isn't the final one, and machined should be called only once.
        if item.get("pid") and item.get("state") != "starting":
            self._wanted[name] = Machine(CLASSES[driver], int(item["pid"]), str(item["uuid"]))
        else:
            self._wanted.pop(name, None)
        if self._wanted.get(name) != self._told.get(name):
            self._due.set()

    def _owner_changed(self, _path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
        if args[0] == MACHINED and args[2]:
            self._told.clear()  # machined remembers its machines across a restart, and answers that they exist
            if self._wanted:
                self._due.set()

    async def _tell(self) -> None:
        """Bring machined's list up to date; if machined cannot be reached, the rest is done later."""
        try:
            for name, machine in list(self._told.items()):
                if self._wanted.get(name) != machine:
                    await self._forget(name)
            for name, machine in list(self._wanted.items()):
                if self._told.get(name) != machine and self._wanted.get(name) == machine:
                    await self._register(name, machine)
            self._again = False
        except errors.VirtdError as exc:
            # If machined isn't running, NameOwnerChanged announces it when it appears.
            self._again = not isinstance(exc, BusError)
            log.debug("systemd-machined: %s", exc)

    async def _forget(self, name: str) -> None:
        self._told.pop(name, None)
        try:
            await self._call("UnregisterMachine", "s", (name,))
        except BusError as exc:
            if exc.name in AWAY:
                raise

    async def _register(self, name: str, machine: Machine) -> None:
        try:
            await self._add(name, machine)
        except BusError as exc:
            if exc.name in AWAY:
                raise
            if exc.name != f"{MACHINED}.MachineExists":
                log.debug("systemd-machined doesn't take %s: %s", name, exc)
            elif await self._leader(name) != machine.leader:
                await self._forget(name)
                await self._add(name, machine)
        self._told[name] = machine

    async def _add(self, name: str, machine: Machine) -> None:
        if machine.kind == "container" and await self._units.version() >= SUPERVISORS_SINCE:
            if await self._leader(name) not in (0, machine.leader):
                await self._forget(name)
            await self._add_by_another(name, machine)
            return
        values = (name, machine.id, "virtd", machine.kind, machine.leader, "")
        await self._call("RegisterMachine", "sayssus", values)

    async def _add_by_another(self, name: str, machine: Machine) -> None:
        """Register from a process that then exits."""
        words = (name, "16", *map(str, machine.id), "virtd", machine.kind, str(machine.leader), "")
        spec = UnitSpec(
            name=f"virtd-register-{name}.service",
            description=f"Telling systemd-machined of {name}",
            slice="virtd.slice",
            argv=("/usr/bin/busctl", "-q", "call", MACHINED, PATH, MANAGER, "RegisterMachine", "sayssus", *words),
            properties=TOOL,
        )
        try:
            await self._units.start(spec, (os.devnull, os.devnull, os.devnull))
            await self._units.ended(spec.name, timeout=LIMIT)
        finally:
            await self._units.collect(spec.name)

    async def _leader(self, name: str) -> int:
        """The PID of the machine's leader; 0 if machined doesn't know the machine."""
        try:
            (path,) = await self._call("GetMachine", "s", (name,))
            values = await self._bus.properties(MACHINED, path, f"{MACHINED}.Machine", ("Leader",))
            return int(values["Leader"])
        except BusError as exc:
            if exc.name in AWAY:
                raise
            return 0

    async def _call(self, method: str, signature: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return await self._bus.call(MACHINED, PATH, MANAGER, method, signature, args, timeout=LIMIT)
