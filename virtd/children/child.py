# SPDX-License-Identifier: LGPL-2.1-or-later
"""One child: a process in a transient unit of its own, its pipes and logs in slots. The only place that starts
children.

children/launch.py and children/ending.py define the order, and say what a crash of the daemon leaves at each step.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from .. import errors, fdstore, process
from ..systemd import aliases
from ..systemd.names import unit_name
from . import fifos
from .facts import Facts
from .output import Output
from .slots import SLOTS, STDERR, STDIN, STDOUT, verify

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..logs.logfile import LogFile
    from ..logs.pump import Pump
    from ..model.settings import Log
    from ..paths import Paths
    from ..records import Process, Record
    from ..systemd.state import UnitState
    from ..systemd.transient import UnitSpec
    from ..systemd.units import Units
    from .pipes import Ends

log = logging.getLogger(__name__)


class Services(NamedTuple):
    """What the drivers use. `units` waits for the connection to systemd, which comes up after children are
    adopted."""

    paths: Paths
    store: fdstore.Store
    pump: Pump
    log_limits: Log
    units: Callable[[], Awaitable[Units]]
    unit: str = "virtd.service"  # the daemon's own unit, which holds the slots
    facts: Facts = Facts()


class Child:
    """A child of the driver's object `name`.

    `lost`: slots in the record that were missing from the store. `seen`: what was seen of its end.
    """

    def __init__(
        self, services: Services, driver: str, name: str, pid: int = 0, start: int = 0, invocation_id: str = ""
    ) -> None:
        self.services = services
        self.driver = driver
        self.name = name
        self.pid = pid
        self.start = start
        self.invocation_id = invocation_id
        self.lost: list[str] = []
        self.seen: process.Seen | None = None
        paths = services.paths
        self._output = Output(
            self.key,
            (paths.console_log(driver, name), paths.stderr_log(driver, name)),
            services.store,
            services.pump,
            services.log_limits,
        )

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.name}"

    @property
    def pipes(self) -> str:
        return self.services.paths.fifos(self.driver, self.name)

    @property
    def aliases(self) -> str:
        return self.services.paths.aliases(self.driver, self.name)

    @property
    def unit(self) -> str:
        return unit_name(self.driver, self.name)

    def slot(self, name: str) -> str:
        return f"{self.key}/{name}"

    def slot_names(self) -> list[str]:
        return [self.slot(name) for name in SLOTS]

    @property
    def console(self) -> LogFile | None:
        """The log of its output; None while it isn't open."""
        return self._output.console

    @property
    def stderr(self) -> LogFile | None:
        """The log of its messages."""
        return self._output.stderr

    # Making one

    def prepare(self, *, terminal: bool = False, forgets: bool = False) -> tuple[Ends, dict[str, int]]:
        """Open the logs and make the pipes: the child's ends, and the descriptors for the slots. Raises HostError.

        With `terminal` the child has a terminal instead of standard input and output: its master end is in the slot
        of stdin, and its output goes through a pipe of our own, whose read end is in the slot of stdout. `forgets`:
        systemd drops the slots when virtd is stopped. So that this doesn't hang up the terminal, the unit is given
        the master end as well, which PID 1 keeps open as long as the unit exists.
        """
        from . import pipes  # no start of the daemon needs it

        logs = self._output.open()
        try:
            ends, ours = pipes.make(self.pipes, self.name, terminal=terminal, held=terminal and forgets)
        except OSError as exc:
            self._output.close_logs()
            raise errors.HostError(f"Cannot make pipes for {self.name}: {exc.strerror}") from exc
        return ends, {self.slot(name): fd for name, fd in (ours | logs).items()}

    async def keep(self, descriptors: dict[str, int]) -> None:
        """Put `descriptors` into their slots and verify that PID 1 has them. Raises HostError, with none left
        there."""
        store = self.services.store
        try:
            store.put_all(descriptors)
            await verify(store, await self.services.units(), self.services.unit, list(descriptors))
        except fdstore.StoreError as exc:
            self._drop_slots()
            raise errors.HostError(f"Cannot keep the descriptors of {self.name}: {exc}", hint=exc.hint) from exc
        except BaseException:
            self._drop_slots()
            raise
        finally:
            self.discard(descriptors)

    def discard(self, descriptors: dict[str, int]) -> None:
        """Close the descriptors that `prepare` has returned, except for the logs, which stay in use. Idempotent."""
        for name in (STDIN, STDOUT, STDERR):
            if (fd := descriptors.pop(self.slot(name), -1)) >= 0:
                os.close(fd)

    async def spawn(self, spec: UnitSpec, ends: Ends) -> UnitState:
        """Start the unit; the child's ends are closed here, whatever happens. Raises StartFailed."""
        units = await self.services.units()
        try:
            self._output.start()
            state = await units.start(msgspec.structs.replace(spec, aliases=self.aliases), ends.stdio)
        finally:
            ends.close()
        self.identify(state)
        return state

    def identify(self, state: UnitState) -> None:
        """Note the child's process from the unit's state."""
        if state.active != "activating":  # by then it has opened its pipes
            fifos.retire(self.pipes)
        self.pid = state.main_pid
        self.start = process.start_time(self.pid)
        self.invocation_id = state.invocation_id
        self.seen = None

    # Taking one back

    @classmethod
    def adopt(cls, services: Services, record: Record) -> Child:
        """The child described by `record`, with its pumps running.

        A pipe that is missing from the store is listed in `lost`; logs are reopened.
        """
        child = cls(services, record.driver, record.name, record.main_pid, record.main_start, record.invocation_id)
        doubles = services.store.duplicates()
        for name, identity in record.slots.items():
            if name.endswith("log"):
                # Opened by its path if necessary: the slot of a log that was just being rotated may well be missing.
                if name in doubles:
                    services.store.drop(name)
                continue
            dev, _, ino = identity.partition(":")
            try:
                services.store.resolve(name, int(dev or 0), int(ino or 0))
            except (fdstore.MissingSlot, ValueError):
                child.lost.append(name)
                services.store.drop(name)  # it isn't ours, whatever it is: nothing is read from it
        child._output.adopt()
        child._output.start()
        return child

    def identity(self) -> Process:
        """The identity of the process, for a record."""
        return {"main_pid": self.pid, "main_start": self.start, "invocation_id": self.invocation_id}

    def alive(self) -> bool:
        return process.alive(self.pid, self.start)

    # While it runs

    async def ended(self) -> None:
        """Wait until the process has ended; then `seen` says how, as far as that can be seen."""
        if (seen := await process.ended(self.pid, self.start)) is not None:
            self.seen = seen

    async def verdict(self) -> UnitState | None:
        """How the process ended, from its unit or otherwise from the journal; None if that isn't known.

        If the state is running, somebody has started the unit again. Raises HostError or TimedOut.
        """
        from . import witness  # the daemon's start doesn't need it before the bus is connected

        units = await self.services.units()
        return await witness.ended(units, self.unit, self.invocation_id, self.seen)

    def stdin(self) -> int:
        """The write end of its standard input, which belongs to the store. Raises MissingSlot."""
        return self.services.store.get(self.slot(STDIN))

    # The end

    async def move_words(self) -> None:
        """Move what it has written to stderr so far to the log."""
        await self._output.move_words()

    async def drain(self) -> None:
        """Move what is left in the pipes to the logs. For a child that has ended."""
        await self._output.drain()

    async def release(self) -> None:
        """Stop the pumps, drop the slots, close the logs. Idempotent.

        Slots that can't be dropped while PID 1 accepts no message are dropped later: with the store's next change, at
        the daemon's next attempt (`Store.untidy`), or by the next daemon, which finds that they belong to nothing.
        """
        await self.close()
        await asyncio.to_thread(self._drop_slots)
        fifos.remove(self.pipes)
        aliases.remove(self.aliases)

    async def close(self) -> None:
        """Close the logs and pipes; PID 1 keeps the slots."""
        await self._output.close()

    def _drop_slots(self) -> None:
        try:
            self.services.store.drop_prefix(f"{self.key}/")
        except fdstore.NotifyFailed as exc:
            log.warning("The slots of %s will be dropped later: %s", self.key, exc)


def sweep(services: Services) -> None:
    """Remove the FIFOs of starts that were cut off before they had a slot, and aliases of units without FIFOs.

    To be called before this daemon starts anything.
    """
    for driver, name in fifos.owners(services.paths.fifos()):
        child = Child(services, driver, name)
        if fifos.fresh(child.pipes) and not any(slot in services.store for slot in child.slot_names()):
            fifos.remove(child.pipes)
    for driver, name in fifos.owners(services.paths.aliases()):
        if not os.path.lexists(services.paths.fifos(driver, name)):
            aliases.remove(services.paths.aliases(driver, name))
