# SPDX-License-Identifier: LGPL-2.1-or-later
"""Toys: each is a program that reads and writes its console."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from virtd import errors
from virtd.children.hardening import TOOL
from virtd.guests import start as starting
from virtd.guests.driver import GuestDriver
from virtd.guests.guest import Guest
from virtd.guests.power import stop
from virtd.guests.verdict import End
from virtd.model import document
from virtd.model.naming import canonical_uuid
from virtd.model.state import Cause, State
from virtd.records import Exit, now, stamp
from virtd.systemd.transient import UnitSpec

if TYPE_CHECKING:
    from virtd.children.child import Services
    from virtd.model.settings import Settings
    from virtd.objects.peers import Peers
    from virtd.objects.protocol import Publish
    from virtd.systemd.state import UnitState


class Toy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The model: what a definition says."""

    name: str
    command: tuple[str, ...]
    uuid: str | None = None
    autostart: bool = False


def parse(text: str, source: str) -> Toy:
    toy = document.decode(text, source, Toy)
    if not toy.command or not toy.command[0].startswith("/"):
        raise errors.InvalidDefinition(source, "command", "expected a program, by its path")
    return msgspec.structs.replace(toy, uuid=canonical_uuid(toy.uuid)) if toy.uuid is not None else toy


class Machine(Guest[Toy]):
    """One toy."""

    driver = "toy"
    noun = "toy"
    housed = False
    definition_type = Toy

    def parse(self, text: str, source: str) -> Toy:
        return parse(text, source)

    def meaning(self, slot: str) -> str:
        return f"nobody is at the other end of its {slot}"

    def judge(self, unit: UnitState | None) -> End:
        asked = self.request
        at = stamp(unit.exited_at) if unit is not None and unit.exited_at else now()
        code, killer = (unit.exit_code, unit.killed_by) if unit is not None else (None, None)

        def end(state: State, reason: str, cause: Cause, by: str | None = None) -> End:
            return End(state, reason, Exit(cause=cause.value, at=at, code=code, signal=killer, by=by))

        if asked is not None and asked.verb == "stop":
            return end(State.STOPPED, f"stopped by {asked.by}", Cause.STOP, asked.by)
        if unit is None:
            return end(State.CRASHED, "ended, and nobody saw how", Cause.UNKNOWN)
        if killer is not None:
            return end(State.CRASHED, f"killed by {killer}", Cause.KILLED)
        if code:
            return end(State.CRASHED, f"exited with status {code}", Cause.FAILED)
        return end(State.STOPPED, "ended by itself", Cause.EXITED)


class Start(starting.Start[Machine, Toy]):
    """One try."""

    def spec(self) -> UnitSpec:
        return UnitSpec(
            name=self.machine.unit,
            description=f"Toy {self.machine.name}",
            slice="virtd-toy.slice",
            once=True,
            argv=self.definition.command,
            properties=TOOL,
        )


class Driver(GuestDriver[Machine, Toy]):
    """All toys."""

    name = "toy"
    noun = "toy"

    def __init__(self, services: Services, publish: Publish, peers: Peers) -> None:
        super().__init__(services, publish)
        self._peers = peers

    def make(self, name: str) -> Machine:
        return Machine(self._shared, name)

    def parse(self, text: str, source: str) -> Toy:
        return parse(text, source)

    def warnings(self, definition: Toy) -> list[str]:
        del definition
        return []

    async def start(self, name: str, by: str) -> bool:
        machine = self.find(name)
        await self.certain()

        async def ready(toy: Toy) -> Start:
            return Start(machine, toy, self._peers, by)

        return await starting.start(machine, ready)

    async def stop(self, name: str, by: str) -> bool:
        return await stop(self.find(name), by)

    async def go_on(self, machine: Machine) -> None:
        if machine.request is not None and machine.request.verb == "stop":
            await stop(machine, machine.request.by)


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    del settings
    return Driver(services, publish, peers)
