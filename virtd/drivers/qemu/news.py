# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events of a guest's QEMU, and what follows from them.

The guest's end isn't among them, since the process itself shows that. Each change of state costs a synced record, a
signal to every client and a line in the journal, and a guest that reboots or panics in a loop makes any number of
them. So their rate is limited, and what exceeds the limit is replaced by one query, a moment later.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ... import errors, journal
from ...allowance import Allowance
from ...model.state import State

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine
    from enum import StrEnum
    from typing import Unpack

    from ...objects.protocol import Problem
    from ...records import Details
    from .qmp import Event

CHANGES, CHANGES_RATE = 20, 1.0  # changes of state at once, and a second
REBOOTS, REBOOTS_RATE = 5, 1 / 60  # lines in the journal about reboots
CATCH_UP = 1.0  # seconds from a change beyond the limit until the state is asked for
STANDSTILL = "standstill"  # a key of a record's data, and of problems; see standstill.py
LOST = "lost files"  # a key of a record's data, and of problems; see openfiles.py
DISK, PANIC, INTERNAL, WATCHDOG = "io-error", "guest-panicked", "internal-error", "watchdog"
STANDSTILLS = frozenset({DISK, PANIC, INTERNAL, WATCHDOG})  # values of query-status
OF_THE_END = frozenset({"SHUTDOWN", "RESET", "POWERDOWN", "GUEST_PANICKED"})


class Change(NamedTuple):
    state: State
    reason: str


class Stopping(Protocol):
    """What learns that a guest stands still; see standstill.Standstill."""

    def by_event(self, event: str, data: dict[str, Any]) -> None: ...
    def seen(self, status: str) -> None: ...
    def passed_on(self, data: dict[str, Any]) -> None: ...


class Subject(Protocol):
    """The domain that the events are about; see guest.QemuGuest."""

    name: str
    problems: dict[str, Problem]
    guest_off: asyncio.Event

    @property
    def standstill(self) -> Stopping: ...
    @property
    def alive(self) -> bool: ...
    @property
    def busy(self) -> bool: ...
    @property
    def state(self) -> State: ...
    def note(self, state: StrEnum, reason: str, **changes: Unpack[Details]) -> None: ...
    def spawn(self, work: Coroutine[object, object, None], name: str) -> None: ...
    def fields(self) -> dict[str, str]: ...
    async def ended_within(self, seconds: float) -> bool: ...
    async def ask_state(self) -> str: ...


class News:
    """The events of one domain, in all its runs."""

    def __init__(self, machine: Subject) -> None:
        self._machine = machine
        self._changes = Allowance(CHANGES, CHANGES_RATE)
        self._reboots = Allowance(REBOOTS, REBOOTS_RATE)
        self._unsaid = 0  # reboots that weren't logged
        self._asking = False
        self.taken = 0
        self.last: deque[Event] = deque(maxlen=16)
        """The last ones that concern an end, for the verdict."""

    def forget(self) -> None:
        """Forget the events: the next ones are of another QEMU."""
        self.taken = self._unsaid = 0
        self.last.clear()

    def on_event(self, event: Event) -> None:
        machine = self._machine
        self.taken += 1
        name, data = event["event"], event["data"]
        if name in OF_THE_END:
            self.last.append(_small(event))
        if not machine.alive:
            return
        if name == "SHUTDOWN":
            machine.guest_off.set()
        elif name == "RESET" and data.get("guest"):
            self._rebooted()
        if (name, data.get("action")) == ("BLOCK_IO_ERROR", "report"):
            machine.standstill.passed_on(data)
        if (name, data.get("action")) in (("BLOCK_IO_ERROR", "stop"), ("GUEST_PANICKED", "pause")):
            if STANDSTILL in machine.problems:
                return
            if self._changes.take():
                machine.standstill.by_event(name, data)
            else:
                self._ask_later()
            return
        if (change := self._meaning(name, data)) is None or change.state is machine.state:
            return
        if not self._changes.take():
            self._ask_later()
            return
        machine.note(*change)
        if name == "STOP" and not machine.busy and not machine.guest_off.is_set():
            self._ask_later()  # nobody has asked for that: the guest may stand still

    def _ask_later(self) -> None:
        if not self._asking:
            self._asking = True
            self._machine.spawn(self._ask(), "ask-state")

    def take_status(self, status: str) -> None:
        """Take note of a value of query-status."""
        machine = self._machine
        match status:
            case "running":
                if machine.state is State.PAUSED:
                    machine.note(State.RUNNING, "resumed")
            case "shutdown":
                machine.guest_off.set()
                machine.note(State.PAUSED, "powered off, and kept")
            case _ if status in STANDSTILLS:
                machine.standstill.seen(status)
            case "paused" if machine.state is not State.PAUSED:
                machine.note(State.PAUSED, "paused")
            case _:
                pass

    def _meaning(self, name: str, data: dict[str, Any]) -> Change | None:
        machine = self._machine
        match name:
            case "STOP" if machine.state is State.RUNNING:
                # With on_poweroff = "keep", SHUTDOWN comes before this; a reboot restores the state at once.
                return Change(State.PAUSED, "powered off, and kept" if machine.guest_off.is_set() else "paused")
            case "RESUME" if machine.state is State.PAUSED:
                return Change(State.RUNNING, "resumed")
            case _:
                return None

    async def _ask(self) -> None:
        try:
            if await self._machine.ended_within(CATCH_UP):
                return
            with contextlib.suppress(errors.MonitorError):
                await self._machine.ask_state()
        finally:
            self._asking = False

    def _rebooted(self) -> None:
        machine = self._machine
        if not self._reboots.take():
            self._unsaid += 1
            return
        often = f" ({self._unsaid} more times that were not logged)" if self._unsaid else ""
        self._unsaid = 0
        journal.send(f"Domain {machine.name} rebooted itself{often}", **machine.fields())


def _small(event: Event) -> Event:
    """As much of it as the verdict needs: an event may have 128 KiB."""
    reason, time = event["data"].get("reason"), event.get("timestamp")
    at = {key: time.get(key) for key in ("seconds", "microseconds")} if isinstance(time, dict) else {}
    return {
        "event": event["event"],
        "data": {"reason": reason[:64]} if isinstance(reason, str) else {},
        "timestamp": at if all(type(value) is int for value in at.values()) else {},
    }
