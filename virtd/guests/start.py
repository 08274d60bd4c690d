# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a domain or a container: the record and the states around the launch of its process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import errors, journal
from ..children.child import Child
from ..children.launch import Launch
from ..hints import do
from ..messages import Message
from ..model.state import State
from ..objects import definitions
from ..objects.object import D
from ..objects.protocol import Problem
from ..records import Record, now
from .guest import Guest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ..objects.conflicts import Holding
    from ..objects.peers import Peers
    from ..records import Process

G = TypeVar("G", bound=Guest[Any])


async def start(machine: Guest[D], ready: Callable[[D], Awaitable[Start[Any, D]]]) -> bool:
    """Start it; False if it was running. `ready` makes a Start of its definition.

    Raises a VirtdError, with nothing left behind.
    """
    async with machine.exclusive("start"):
        if machine.alive:
            return False
        await machine.over.wait()
        await machine.finishing.tidy("start")
        await (await ready(machine.defined)).run()
        return True


class Start(Launch, Generic[G, D]):
    """One attempt. What the guest gets is up to the driver; the record and its states are handled here."""

    def __init__(self, machine: G, definition: D, peers: Peers, by: str) -> None:
        super().__init__(
            Child(machine.shared.services, machine.driver, machine.name),
            f"Cannot start {machine.name}",
            f"{machine.noun.capitalize()} {machine.name}",
            machine.fields(),
        )
        self.machine = machine
        self.peers = peers
        self.definition = definition
        self.by = by
        self.before = machine.record
        self.words = ""  # what the process wrote before the attempt failed

    # To be overridden

    def check(self) -> None:
        """Check the host. Raises a VirtdError."""

    def holdings(self) -> Iterable[Holding]:
        """What it needs exclusively."""
        return ()

    def data(self) -> dict[str, Any]:
        """More data for the record, which `Guest.give_back` needs. Nothing on the host is changed yet."""
        return {}

    def own_words(self, words: str) -> str:
        """What the process wrote when it failed, for a person; "" if none of it explains anything."""
        return words

    def last_line(self, words: str) -> str:
        """The same in one line."""
        return words.splitlines()[-1] if words else ""

    # The steps

    async def run(self) -> None:
        """Raises a VirtdError, with nothing left behind."""
        await self.launch()
        self._running()

    def require(self) -> None:
        self.check()
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        from ..objects import conflicts  # no start of the daemon needs it

        conflicts.require(self.peers, f"{self.machine.noun} {self.machine.name}", self.holdings())

    def remember(self, promise: Process) -> None:
        machine = self.machine
        # Checked again, since other starts may have come in between. They see what it holds once it is recorded.
        self._check_conflicts()
        record = Record(
            driver=machine.driver,
            name=machine.name,
            uuid=machine.uuid,
            state=State.STARTING.value,
            reason=f"being started by {self.by}",
            since=now(),
            id=machine.shared.next_id(),
            boot_id=machine.shared.boot_id,
            data={
                **definitions.in_force(self.definition, machine.definition_text),
                "request": None,
                **self.data(),
            },
            **promise,
        )
        machine.shared.records.save(record)
        machine.over.clear()
        machine.record = record

    def begin(self) -> None:
        machine = self.machine
        machine.child = self.child
        machine.shared.publish("changed", machine)
        machine.stderr.begin(self.child)

    def know(self, identity: Process) -> None:
        self.machine.save(**identity)

    def _running(self) -> None:
        machine = self.machine
        if machine.state is State.STARTING:
            machine.note(State.RUNNING, f"started by {self.by}")
        machine.problems.pop("start", None)
        machine.finishing.watch(self.child)
        journal.send(
            f"Started {machine.noun} {machine.name} (PID {self.child.pid})",
            message_id=Message.STARTED, VIRTD_PID=str(self.child.pid), **machine.fields(),
        )  # fmt: skip

    async def failed(self, why: BaseException) -> None:
        machine = self.machine
        if not self.remembered:
            return
        machine.stderr.end()
        self.words = machine.last_words(self.words_from)
        reason = self.last_line(self.words) or str(why)
        ending = self.before.exit if self.before is not None else None
        machine.note(State.STOPPED, f"failed to start: {reason}", exit=ending)
        await machine.finishing.put_away()

    def trouble(self, text: str) -> None:
        self.machine.problems["start"] = Problem(text)

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        said = self.own_words(self.words) if self.words and not isinstance(exc, errors.InvalidDefinition) else ""
        if not said:
            return exc
        return errors.StartFailed(
            f"Cannot start {self.machine.name}: {said}",
            hint=exc.hint or "See: " + do("log", self.machine.noun, self.machine.name, stderr=True),
        )
