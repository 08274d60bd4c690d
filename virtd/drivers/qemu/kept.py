# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware record of one guest: reading, writing, learning and showing it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ... import errors, files
from ...model.state import State
from ...objects.protocol import Problem
from ...replies import guests as replies
from . import hardware
from .devices import placing
from .hardware import Hardware

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from ...guests.guestrecord import Shared
    from ...model.domain import Domain
    from ...records import Changes, Record
    from .devices.placing import Placed

log = logging.getLogger(__name__)


class Owner(Protocol):
    """The domain; see guest.QemuGuest."""

    name: str
    shared: Shared
    record: Record | None
    problems: dict[str, Problem]

    @property
    def alive(self) -> bool: ...
    @property
    def state(self) -> State: ...
    @property
    def recorded(self) -> Record: ...
    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def uuid(self) -> str: ...
    @property
    def running_definition(self) -> Domain | None: ...
    def keep(self, **changes: Unpack[Changes]) -> None: ...


class Kept:
    """The file, and the copy in the record of a running guest."""

    def __init__(self, machine: Owner) -> None:
        self._machine = machine
        self._read: tuple[str, Hardware | None] | None = None  # by uuid: what the file says
        self._placed: tuple[Domain, Hardware | None, list[Placed]] | None = None

    @property
    def path(self) -> str:
        return self._machine.shared.services.paths.hardware(self._machine.name)

    def on_record(self) -> Hardware | None:
        """The hardware on record, if any. Raises HostError if it can't be read."""
        uuid = self._machine.uuid
        if self._read is None or self._read[0] != uuid:
            found = hardware.read(self.path)
            self._read = (uuid, found if found is not None and found.uuid == uuid else None)
        return self._read[1]

    def read_again(self) -> Hardware | None:
        """The same, read from the file again."""
        self._read = None
        return self.on_record()

    @property
    def running(self) -> Hardware | None:
        """What the guest was started with, by its record; None if an older virtd started it, or it is off."""
        machine = self._machine
        data = machine.data.get("hardware") if machine.alive else None
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(data, Hardware)
        return None

    def keep(self, found: Hardware) -> None:
        """Record it, unless it already is. Raises HostError."""
        with contextlib.suppress(errors.HostError):
            if self.on_record() == found:
                return
        hardware.write(self.path, found)
        self._read = (found.uuid, found)

    def restore(self) -> bool:
        """Record again what the guest runs with; returns whether that succeeded."""
        with contextlib.suppress(errors.HostError):
            if (found := self.running) is not None:
                self.keep(found)
                return True
        return False

    def renew(self) -> bool:
        """Let the next start ask QEMU again. False if it would anyway. Raises HostError."""
        try:
            found = self.read_again()
        except errors.HostError:  # unreadable, so useless
            found = self.running
            if found is None:
                self.forget()
                return True
        if found is None or found.renew:
            return False
        self.keep(msgspec.structs.replace(found, renew=True))
        return True

    def forget(self) -> Callable[[], None]:
        """Remove it; calling the result puts it back. Both raise HostError."""
        found = None
        with contextlib.suppress(errors.HostError):
            found = self.read_again()
        self._read = None
        files.remove(self.path)
        return lambda: self.keep(found) if found is not None else None

    def placed(self, domain: Domain) -> list[Placed]:
        """The devices of `domain`, one of the guest's definitions, with their numbers and addresses."""
        before = None
        with contextlib.suppress(errors.HostError):  # fsck and a start report it
            before = self.on_record()
        if self._placed is None or self._placed[0] is not domain or self._placed[1] is not before:
            self._placed = (domain, before, placing.place(domain, before.devices if before is not None else ()))
        return self._placed[2]

    def shown(self) -> replies.Hardware | None:
        """For Info; None while nothing is on record."""
        found = None
        with contextlib.suppress(errors.HostError):
            found = self.on_record()
        if found is None:
            return None
        return replies.Hardware(
            machine=found.type or None,
            cpu=found.model or None,
            firmware=found.firmware.program if found.firmware is not None else None,
            renew=found.renew,
            devices=[
                replies.Device(id=one.id, what=one.what, bus=one.bus or None, slot=one.slot if one.bus else None)
                for one in found.devices
            ],
        )

    async def learn(self, ask: hardware.Ask) -> bool:
        """Put on record what the guest runs with, including what only QEMU knows, or what an older virtd didn't
        record.

        False if it has to be tried again; until then there is a problem.
        """
        machine = self._machine
        found, domain = self.running, machine.running_definition
        if found is None:
            with contextlib.suppress(errors.HostError):  # fsck reports it
                if self.on_record() is None and domain is not None and machine.uuid:
                    found = hardware.assign(None, domain, machine.uuid, kvm=machine.shared.services.facts.has_kvm())
        if found is None:
            return True
        try:
            found = await hardware.learn(found, ask)
            self.keep(found)
            if machine.alive:
                data = machine.data | {"hardware": msgspec.to_builtins(found)}
                if machine.state is State.STARTING:  # its next state is about to be put on record
                    machine.record = msgspec.structs.replace(machine.recorded, data=data)
                else:
                    machine.keep(data=data)
            machine.problems.pop("hardware", None)
            return True
        except errors.VirtdError as exc:
            text = f"What hardware {machine.name} has isn't on record: {exc.message}"
            machine.problems["hardware"] = Problem(text, exc.hint)
            log.warning("%s", text)
            return False
