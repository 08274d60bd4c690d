# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that stands still by itself: its disk is full or broken, its kernel has panicked, QEMU can't continue.

Nobody has asked for that, and its users only see that it doesn't answer. So it becomes a problem, on record and in
the journal, with the disk and the reason, and resuming it is refused as long as it would stand still again at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ... import errors, hostroot, journal, reach
from ...allowance import Allowance
from ...hints import do
from ...messages import Message
from ...model.state import State
from ...objects.protocol import Problem
from ...objects.turns import within
from ...records import now
from ...replies import guests as replies
from ..nodes import is_device
from .news import DISK, INTERNAL, PANIC, STANDSTILL, WATCHDOG, Subject

if TYPE_CHECKING:
    from ...model.domain import Domain
    from ...objects.persistent import Shared

TOLD, TOLD_RATE = 10, 1 / 60  # lines in the journal of one guest at once, and a second
LOOK = 10.0  # seconds that a file system may take to say how full it is
ENOUGH = 64 << 10  # bytes; with less free space a writing guest would stand still again at once
RELAPSE = 1.0  # seconds after which it counts as resumed: QEMU retries what failed in a few milliseconds
WORDS = 120  # characters of QEMU's reason that are shown
NODE = r"disk([0-9]{1,4})"  # what a disk is called, see devices/disk.py; CD-ROMs never stop a guest
DEVICE = r".*/[a-z]+-disk([0-9]{1,4})(?:/.*)?"
OTHERS = {
    PANIC: "the guest's kernel panicked",
    WATCHDOG: "the guest's watchdog ran out",
    INTERNAL: "QEMU can't go on, for an internal error",
}


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why it stands still, as on record. `kind` is one of STANDSTILLS. The rest concerns the disk: its number if
    known, "read" or "write", whether it is full, and QEMU's own words.
    """

    kind: str
    since: str
    disk: int | None = None
    operation: str = ""
    full: bool = False
    reason: str = ""


class Space(msgspec.Struct, frozen=True):
    """A file system: where it is mounted, and how many bytes are free for users other than root."""

    place: str
    free: int


class Stopped(Subject, Protocol):
    """The domain; see guest.QemuGuest."""

    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def shared(self) -> Shared: ...
    @property
    def running_definition(self) -> Domain | None: ...
    async def command(self, name: str) -> Any: ...


class Standstill:
    """The standstill of one domain, if it stands still."""

    def __init__(self, machine: Stopped) -> None:
        self._machine = machine
        self._told = Allowance(TOLD, TOLD_RATE)
        self._begun = asyncio.Event()

    @property
    def fault(self) -> Fault | None:
        kept = self._machine.data.get(STANDSTILL)
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(kept, Fault) if kept is not None else None
        return None

    def by_event(self, event: str, data: dict[str, Any]) -> None:
        """It stands still, by an event: BLOCK_IO_ERROR or GUEST_PANICKED."""
        self._begin(_reported(event, data))

    def passed_on(self, data: dict[str, Any]) -> None:
        """An event BLOCK_IO_ERROR: the error was reported to the guest, which continues as it likes."""
        machine = self._machine
        if self._told.take():
            failure = self._failure(_reported("BLOCK_IO_ERROR", data))
            text = f"{machine.name}: {failure}; the error was reported to the guest"
            journal.send(text, message_id=Message.DISK_FAILED, level="warning", **machine.fields())

    def seen(self, status: str) -> None:
        """It stands still, by query-status: one of STANDSTILLS."""
        self._begin(Fault(status, now()))

    def _begin(self, fault: Fault) -> None:
        """It stands still. If it did before, what is known of that is kept."""
        machine = self._machine
        if not machine.alive or self.fault is not None:
            return
        request = machine.data.get("request")
        if machine.state is State.STOPPING and request and request["verb"] == "stop":
            return  # the plug is being pulled, so it is about to end in any case
        self._begun.set()
        machine.note(State.PAUSED, self._reason(fault), data=machine.data | {STANDSTILL: msgspec.to_builtins(fault)})
        self.recall()
        machine.spawn(self._look_into(), STANDSTILL)

    def recall(self) -> None:
        """Make it a problem, as far as it is known without examining the host."""
        if (fault := self.fault) is not None:
            self._machine.problems[STANDSTILL] = self._problem(fault, None)

    def resumed(self, data: dict[str, Any]) -> dict[str, Any]:
        """It no longer stands still: the record's data without the fault."""
        self._machine.problems.pop(STANDSTILL, None)
        return {key: value for key, value in data.items() if key != STANDSTILL}

    async def _look_into(self) -> None:
        """Find out what the event didn't say, then log and publish it."""
        machine = self._machine
        fault = self.fault
        if fault is not None and fault.kind == DISK and fault.disk is None:
            with contextlib.suppress(errors.MonitorError):
                found = _failed(await machine.command("query-block"))
                if found is not None and self.fault == fault:
                    self._replace(fault, found)
        await self.look()
        if (problem := machine.problems.get(STANDSTILL)) is not None and self._told.take():
            journal.send(problem.text, message_id=Message.GUEST_STOOD_STILL, level="error", **machine.fields())
        machine.shared.publish("changed", machine)

    def _replace(self, fault: Fault, found: dict[str, Any]) -> None:
        fault = msgspec.structs.replace(fault, **found)
        data = self._machine.data | {STANDSTILL: msgspec.to_builtins(fault)}
        self._machine.note(self._machine.state, self._reason(fault), data=data)

    async def look(self) -> None:
        """Update the problem."""
        if (fault := self.fault) is not None:
            space = await self._space(fault)
            if self.fault == fault:
                self._machine.problems[STANDSTILL] = self._problem(fault, space)

    async def _space(self, fault: Fault) -> Space | None:
        path = self._path(fault)
        if not fault.full or not path or is_device(path):
            return None
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(LOOK):
                return await asyncio.to_thread(_space_of, path)
        return None

    async def require_none_for(self, what: str) -> None:
        """Raise InvalidState, with the reason, while it stands still and can't be asked for anything."""
        await self.look()
        if (problem := self._machine.problems.get(STANDSTILL)) is not None:
            raise errors.InvalidState(f"Cannot {what} {self._machine.name}: {problem.text}", hint=problem.hint)

    async def require_over(self) -> bool:
        """Whether it stands still. Raises InvalidState as long as resuming it would be in vain."""
        machine, fault = self._machine, self.fault
        self._begun.clear()
        if fault is None:
            return False
        space = await self._space(fault)
        problem = machine.problems[STANDSTILL] = self._problem(fault, space)
        if fault.kind == INTERNAL or (space is not None and space.free < ENOUGH):
            raise errors.InvalidState(f"Cannot resume {machine.name}: {problem.text}", hint=problem.hint)
        return True

    @property
    def again(self) -> bool:
        """Whether it has stood still again since `require_over`."""
        return self._begun.is_set()

    async def require_none(self) -> None:
        """Raise InvalidState if it stands still again within a moment."""
        if await within(self._begun, RELAPSE):
            await self.look()
            if (problem := self._machine.problems.get(STANDSTILL)) is not None:
                raise errors.InvalidState(
                    f"{self._machine.name} was resumed, and stands still again: {problem.text}", hint=problem.hint
                )

    # In words

    def _path(self, fault: Fault) -> str:
        """The disk's path by record and definition; QEMU isn't trusted with that."""
        machine = self._machine
        if fault.disk is None:
            return ""
        index = self._index(fault.disk)
        kept = machine.data.get("disks")
        if isinstance(kept, list) and index < len(kept):
            return str(kept[index])
        domain = machine.running_definition
        disks = domain.disk if domain is not None else ()
        return (disks[index].path or "") if index < len(disks) else ""

    def _index(self, number: int) -> int:
        """The place in the definition of the disk with QEMU's `number`; with an older virtd both were the same."""
        numbers = self._machine.data.get("numbers")
        return numbers.index(number) if isinstance(numbers, list) and number in numbers else number

    def _disk(self, fault: Fault) -> str:
        if fault.disk is None:
            return "one of its disks"
        path = self._path(fault)
        return f"disk[{self._index(fault.disk)}]{f', {path}' if path else ''}"

    def _reason(self, fault: Fault) -> str:
        if fault.kind != DISK:
            return OTHERS.get(fault.kind, OTHERS[INTERNAL])
        return self._failure(fault)

    def _failure(self, fault: Fault) -> str:
        request = {"read": "a read of", "write": "a write to"}.get(fault.operation, "a request to")
        why = "no space left" if fault.full else fault.reason
        return f"{request} {self._disk(fault)} failed{f': {why}' if why else ''}"

    def _problem(self, fault: Fault, space: Space | None) -> Problem:
        name = self._machine.name
        text = f"{name} stands still since {fault.since[:19]}Z: {self._reason(fault)}"
        resume, afresh = do("resume", "domain", name), do("stop", "domain", name) + ", and start it"
        if fault.kind == PANIC:
            return Problem(text, do("log", "domain", name) + " shows its last words. Then: " + afresh + ".")
        if fault.kind == WATCHDOG:
            return Problem(text, resume + " lets it go on; or: " + afresh + ".")
        if fault.kind != DISK:
            log = do("log", "domain", name, stderr=True)
            return Problem(text, log + " shows what QEMU says. Then: " + afresh + ".")
        if space is not None:
            free = f"{space.free >> 20} MiB" if space.free >> 20 else f"{space.free} bytes"
            text += f" on the file system of {space.place}, {free} free"
            return Problem(text, "Free some space there, then: " + resume + ".")
        path = self._path(fault)
        if fault.full and path and not path.startswith("/dev/"):  # not examined yet, or it doesn't answer
            return Problem(text, "Free some space on its file system, then: " + resume + ".")
        if fault.full:
            hint = "Extend what it is on, such as an LVM thin pool (lvs shows these), then: "
            return Problem(text, hint + resume + ".")
        return Problem(
            text, "journalctl -k shows what the host says about it. When that is repaired: " + resume + "."
        )

    def described(self) -> replies.Standstill | None:
        """For Info."""
        if (fault := self.fault) is None:
            return None
        return replies.Standstill(
            kind=fault.kind,
            since=fault.since,
            disk=f"disk[{self._index(fault.disk)}]" if fault.disk is not None else None,
            path=self._path(fault) or None,
            operation=fault.operation or None,
            full=fault.full,
            reason=fault.reason or None,
        )


def _reported(event: str, data: dict[str, Any]) -> Fault:
    if event != "BLOCK_IO_ERROR":
        return Fault(PANIC, now())
    disk = _number(NODE, data.get("node-name"))
    if disk is None:
        disk = _number(DEVICE, data.get("qom-path"))
    operation = str(data.get("operation"))
    return Fault(
        DISK,
        now(),
        disk,
        operation if operation in ("read", "write") else "",
        data.get("nospace") is True,
        _words(data.get("reason")),
    )


def _failed(blocks: object) -> dict[str, Any] | None:
    """What query-block says about the first failed disk."""
    for block in blocks if isinstance(blocks, list) else []:
        if isinstance(block, dict) and block.get("io-status") in ("failed", "nospace"):
            number = _number(DEVICE, block.get("qdev"))
            if number is not None:
                return {"disk": number, "full": block["io-status"] == "nospace"}
    return None


def _number(pattern: str, text: object) -> int | None:
    match = re.fullmatch(pattern, text) if isinstance(text, str) else None
    return int(match[1]) if match else None


def _words(text: object) -> str:
    shown = text[:WORDS] if isinstance(text, str) else ""
    return "".join(letter if letter.isprintable() else " " for letter in shown)


def _space_of(path: str) -> Space:
    """The file system of a file. Raises OSError."""
    with reach.reached(path, reach.Trust.ANYBODY) as found:
        place, status = found.path, os.statvfs(found.itself)
    while not os.path.ismount(hostroot.seen(place)):
        place = os.path.dirname(place)
    return Space(place, status.f_bavail * status.f_frsize)
