# SPDX-License-Identifier: LGPL-2.1-or-later
"""The TPM of a guest: swtpm, another process of its machine, in a unit of its own, `virtd-qemu-NAME@tpm.service`.

The machine's record describes both. swtpm is started before QEMU, which connects to it, and ends as soon as QEMU
does, however that ends; what is left is put away with the machine. It is never started again for a running guest: a
TPM that has forgotten what the guest has measured isn't the guest's.

It has no slots. Nobody writes to it, and its few messages go to the journal. Its standard input is the socket that
QEMU connects to, so that it needs no directory to make one in, and QEMU can't be too early.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ... import errors, journal, process
from ...children import programs
from ...hints import do
from ...messages import Message
from ...objects.protocol import Problem
from ...records import now
from ...replies import guests as replies
from ...systemd.names import helper_unit
from ...systemd.transient import UnitSpec
from . import tpmstate, tpmunit

if TYPE_CHECKING:
    from typing import Unpack

    from ...children.child import Child, Services
    from ...guests.guestrecord import Shared
    from ...model.domain import Domain
    from ...records import Changes, Record
    from ...systemd.units import Units
    from .prerequisites import Account

ROLE = "tpm"
MISSING = "swtpm, which emulates it, isn't installed"
INSTALL = "Install it (Debian: swtpm; Fedora: swtpm)."
GRACE = 5.0  # seconds within which QEMU ends, too, if that is why swtpm has ended
AGAIN = 1.0  # seconds until PID 1 is asked again
STOP_LIMIT = 15.0


class Emulated(msgspec.Struct, frozen=True):
    """As the machine's record has it: the unit, the directory with what it keeps, the process (0 until that is on
    record), and when it ended if it did so before the guest.
    """

    unit: str
    directory: str
    pid: int = 0
    start: int = 0
    ended: str = ""


class Owner(Protocol):
    """The domain; see guest.QemuGuest."""

    name: str
    shared: Shared
    problems: dict[str, Problem]
    child: Child | None

    @property
    def alive(self) -> bool: ...
    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def uuid(self) -> str: ...
    def fields(self) -> dict[str, str]: ...
    def keep(self, **changes: Unpack[Changes]) -> None: ...
    def save(self, **changes: Unpack[Changes]) -> None: ...
    async def ended_within(self, seconds: float) -> bool: ...


def program(source: str) -> str:
    """swtpm's path. Raises InvalidDefinition, naming `source`."""
    if (found := programs.find("swtpm")) is None:
        raise errors.InvalidDefinition(source, "tpm", MISSING, hint=INSTALL)
    return found


def warnings(domain: Domain) -> list[str]:
    """What the definition asks for and the host lacks."""
    return [f"tpm: {MISSING}"] if domain.tpm is not None and programs.find("swtpm") is None else []


def recorded(data: dict[str, Any]) -> Emulated | None:
    """By a record's data; None if the guest has no TPM."""
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(data["tpm"], Emulated) if data.get("tpm") else None
    return None


class Swtpm:
    """That of one machine."""

    def __init__(self, machine: Owner) -> None:
        self._machine = machine

    @property
    def unit(self) -> str:
        return helper_unit("qemu", self._machine.name, ROLE)

    @property
    def directory(self) -> str:
        """What it keeps."""
        return self._machine.shared.services.paths.tpm(self._machine.name, self._machine.uuid)

    @property
    def on_record(self) -> Emulated | None:
        return recorded(self._machine.data)

    def promised(self) -> Emulated:
        """For the record, before anything of it exists."""
        return Emulated(self.unit, self.directory)

    # Starting

    async def start(self, argv0: str, who: Account, path: str, toplevel: list[str]) -> None:
        """Start the program `argv0` as the guest's user, for a QEMU that connects to `path`, and record its process.

        `toplevel`: the names in `/`. Raises a VirtdError.
        """
        tpmstate.hand_over(self.directory, who.uid, who.gid)
        units = await self._units()
        user, group = who.in_unit
        spec = UnitSpec(
            name=self.unit,
            description=f"TPM of domain {self._machine.name}",
            slice="virtd-qemu.slice",
            once=True,
            argv=tpmunit.argv(argv0, self.directory),
            environment=programs.ENVIRONMENT,
            user=user,
            group=group,
            properties=tuple(tpmunit.properties(self.directory, toplevel, await units.version(), own_user=who.own)),
        )
        with tpmunit.listening(path, who) as listener:
            state = await units.start(spec, (listener.fileno(), "null", "journal"))
        self._machine.save(data=self._data(self._identified(self.promised(), state.main_pid)))

    async def require_free(self) -> None:
        """Have systemd forget an earlier one. Raises Busy if one runs."""
        await (await self._units()).collect(self.unit)

    # While the machine runs

    async def watch(self) -> None:
        """Wait for its end; if the guest runs on, that is a problem."""
        found = await self._known()
        if found is None or found.ended:
            return
        await process.ended(found.pid, found.start)
        machine = self._machine
        if await machine.ended_within(GRACE) or not machine.alive:
            return
        if machine.child is None or not machine.child.alive():
            return
        machine.keep(data=self._data(msgspec.structs.replace(found, ended=now())))
        self.recall()
        journal.send(
            f"{machine.name}: {machine.problems[ROLE].text}",
            message_id=Message.TPM_ENDED, level="error", **machine.fields() | {"VIRTD_UNIT": self.unit},
        )  # fmt: skip

    def recall(self) -> None:
        """Make a problem of an end that is on record."""
        found = self.on_record
        if found is not None and found.ended:
            name = self._machine.name
            self._machine.problems[ROLE] = Problem(
                f"Its TPM has ended ({found.ended}): what the guest asks of it fails",
                "It has one again when " + do("stop", "domain", name) + " and " + do("start", "domain", name)
                + f" have been run. See: journalctl -u {self.unit}.",
            )  # fmt: skip

    async def _known(self) -> Emulated | None:
        """The one on record; its process from systemd if the daemon was killed before that was recorded."""
        while (found := self.on_record) is not None and not found.pid and not found.ended:
            try:
                state = await (await self._units()).state(found.unit)
            except errors.VirtdError:
                if await self._machine.ended_within(AGAIN):
                    return None
                continue
            if state is None or not state.main_pid:
                return found
            found = self._identified(found, state.main_pid)
            self._machine.keep(data=self._data(found))
        return found

    def described(self, domain: Domain | None) -> replies.Tpm | None:
        """For Info."""
        if domain is None or domain.tpm_model is None:
            return None
        found = self.on_record if self._machine.alive else None
        return replies.Tpm(
            model=domain.tpm_model.value,
            version="2.0",
            state=self.directory,
            unit=found.unit if found is not None else None,
            pid=found.pid if found is not None and process.alive(found.pid, found.start) else None,
        )

    # Its end

    async def end(self, record: Record) -> None:
        """Stop what the record says, if it runs, and give back what it keeps. Raises a VirtdError."""
        if (found := recorded(record.data)) is not None:
            await (await self._units()).stop(found.unit, timeout=STOP_LIMIT)
            await asyncio.to_thread(tpmstate.give_back, found.directory)

    async def forget(self, record: Record) -> None:
        """Have systemd forget it, once QEMU's unit, which names it, is forgotten. Raises a VirtdError."""
        if (found := recorded(record.data)) is not None:
            await (await self._units()).collect(found.unit)

    def _data(self, found: Emulated) -> dict[str, Any]:
        return self._machine.data | {"tpm": msgspec.to_builtins(found)}

    @staticmethod
    def _identified(found: Emulated, pid: int) -> Emulated:
        return msgspec.structs.replace(found, pid=pid, start=process.start_time(pid))

    async def _units(self) -> Units:
        return await self._machine.shared.services.units()


async def clear_away(services: Services, name: str) -> None:
    """Put away one that no record speaks of. Raises a VirtdError."""
    units = await services.units()
    unit = helper_unit("qemu", name, ROLE)
    await units.stop(unit, timeout=STOP_LIMIT)
    for directory in await asyncio.to_thread(glob.glob, services.paths.tpm(glob.escape(name), "*")):
        await asyncio.to_thread(tpmstate.give_back, directory)
    await units.collect(unit)
