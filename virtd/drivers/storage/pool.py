# SPDX-License-Identifier: LGPL-2.1-or-later
"""One pool: its definition, whether it is active, and one operation on it at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ... import errors, journal
from ...hints import do
from ...messages import Message
from ...model import pool as model
from ...model.state import Activity
from ...objects.definitions import text_in_force
from ...objects.persistent import Named, Persistent
from ...objects.protocol import Problem
from ...objects.turns import Turns
from ...records import Record, now
from ...replies import Trouble
from ...replies import storage as replies
from .task import DRIVER

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from ...paths import Paths
    from ...records import Records
    from .backend import Backend, Capacity

log = logging.getLogger(__name__)

LOST = "lost"  # a key of problems, and of the record's data
PATIENCE = 120.0  # seconds that an operation waits for another: a mount may take its time


class Shared(NamedTuple):
    """What the pools share. `publish(event, pool)` announces changes; `make` makes the backend of a definition."""

    paths: Paths
    records: Records
    publish: Callable[[str, Named], None]
    boot_id: str
    make: Callable[[model.Pool], Backend]


class StoragePool(Persistent):
    """A pool. One without a definition is still active, and disappears when it is stopped."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(name)
        self.shared: Shared = shared
        self.definition: model.Pool | None = None
        self.definition_text = ""
        self.capacity: Capacity | None = None
        self._backend: Backend | None = None
        self.settled = asyncio.Event()  # always set: its state is what the record says
        self.settled.set()
        self._turns = Turns(f"pool {name}", PATIENCE)

    @property
    def active(self) -> bool:
        return self.state in (Activity.ACTIVE, Activity.STOPPING)

    @property
    def state(self) -> Activity:
        return Activity.of(self.record.state) if self.record is not None else Activity.INACTIVE

    @property
    def in_doubt(self) -> bool:
        """Whether a start or a stop was cut off, or is under way."""
        return self.state in (Activity.STARTING, Activity.STOPPING)

    @property
    def source(self) -> str:
        """The definition's file."""
        return self.shared.paths.definition(DRIVER, self.name)

    @property
    def pending(self) -> bool:
        """Whether the definition differs from the one that it was started with."""
        return self.active and self._text() != self.definition_text

    def adopt(self, record: Record) -> None:
        self.record = record

    def recall(self) -> None:
        if self.active and self.record is not None and (lost := self.record.data.get(LOST)):
            self._say_lost(str(lost))

    def seen(self, lost: str) -> None:
        """Remember, also for the next daemon, why it can't be used though it is active; "": it can."""
        if not self.active or self.record is None:
            return
        if self.record.data.get(LOST, "") != lost:
            data = {key: value for key, value in self.record.data.items() if key != LOST}
            self.keep(data=data | ({LOST: lost} if lost else {}))
        if lost:
            self._say_lost(lost)
        else:
            self.problems.pop(LOST, None)

    def _say_lost(self, lost: str) -> None:
        self.problems[LOST] = Problem(
            f"Pool {self.name} was active and can't be used: {lost}",
            "Once that is mended: " + do("start", "pool", self.name) + ".",
        )

    def parsed(self, _text: str) -> model.Pool | None:
        """Pools are few: each start rereads their definitions."""
        return None

    @property
    def present(self) -> model.Pool:
        """The definition in force: while it is active, the one that it was started with. Raises NotFound."""
        if (
            self.state is not Activity.INACTIVE
            and self.record is not None
            and (text := text_in_force(self.record.data))
        ):
            if text == self.definition_text and self.definition is not None:
                return self.definition
            with contextlib.suppress(errors.InvalidDefinition):
                return model.parse(text, self.source)
        if self.definition is None:
            raise errors.NotFound(
                f"Pool {self.name} has no definition",
                hint=do("define", "pool", "FILE") + f', with name = "{self.name}".',
            )
        return self.definition

    @property
    def backend(self) -> Backend:
        present = self.present
        if self._backend is None or self._backend.pool != present:
            self._backend = self.shared.make(present)
        return self._backend

    @property
    def usable(self) -> Backend:
        """The backend of an active pool. Raises InvalidState."""
        if not self.active:
            raise errors.InvalidState(
                f"Pool {self.name} isn't active", hint="Start it first: " + do("start", "pool", self.name) + "."
            )
        return self.backend

    def fields(self) -> dict[str, str]:
        return {"VIRTD_DRIVER": DRIVER, "VIRTD_NAME": self.name, "VIRTD_UUID": self.uuid}

    def exclusive(self, what: str) -> AbstractAsyncContextManager[None]:
        """One operation at a time. Raises Busy when another takes too long."""
        return self._turns.take(what)

    def _begin(self, state: Activity, reason: str, definition: str) -> None:
        """Record what is about to be done. Raises HostError, and changes nothing then."""
        record = Record(
            driver=DRIVER, name=self.name, uuid=self.uuid, state=state.value, reason=reason, since=now(),
            boot_id=self.shared.boot_id, data={"definition": definition},
        )  # fmt: skip
        if self.record is not None:
            record = msgspec.structs.replace(record, unknown=self.record.unknown)
        self.put(record)
        self.shared.publish("changed", self)

    async def start(self, by: str) -> bool:
        """False if it was active."""
        async with self.exclusive("start"):
            if self.active and not await self.backend.lost():
                return False
            text = self.definition_text or self._text()
            backend = self.backend
            # Recorded first: the next daemon finishes, or undoes, what a crash leaves.
            self._begin(Activity.STARTING, f"being started by {by}", text)
            try:
                await backend.start()
            except BaseException as exc:
                with contextlib.suppress(errors.VirtdError):
                    await backend.stop()
                self.note(Activity.INACTIVE, f"failed to start: {exc}", data={})
                raise
            self.problems.clear()
            self.note(Activity.ACTIVE, f"started by {by}")
            journal.send(f"Started pool {self.name}", message_id=Message.STARTED, **self.fields())
            await self.measure()
            return True

    def _text(self) -> str:
        return str(self.record.data.get("definition", "")) if self.record is not None else ""

    async def stop(self, by: str) -> bool:
        """False if it wasn't active. The caller checks whether anybody uses its volumes."""
        async with self.exclusive("stop"):
            if not self.active:
                self.wait_for(None)
                return False
            reason = self.reason
            self._begin(Activity.STOPPING, f"being stopped by {by}", self._text())
            try:
                await self.backend.stop()
            except BaseException:
                self.note(Activity.ACTIVE, reason)
                raise
            self.capacity = None
            self.problems.clear()
            self.note(Activity.INACTIVE, f"stopped by {by}", data={})
            journal.send(f"Stopped pool {self.name}", message_id=Message.ENDED, VIRTD_CAUSE="stop", **self.fields())
            return True

    async def recover(self) -> str:
        """After the daemon's start: finish, or undo, what a crash interrupted: "adopted" or "rolled_back"."""
        if not await self.backend.lost():
            if self.state is Activity.STARTING:
                await self.backend.start()  # makes whatever is still missing
            self.note(Activity.ACTIVE, "found active after a restart of virtd")
            return "adopted"
        if self.state is Activity.STARTING:
            with contextlib.suppress(errors.VirtdError):
                await self.backend.stop()
        self.note(Activity.INACTIVE, "its start or stop was cut off", data={})
        return "rolled_back"

    async def measure(self) -> None:
        """Ask for its size and use; a pool that doesn't answer has no figures."""
        try:
            self.capacity = await self.usable.capacity()
        except errors.VirtdError as exc:
            self.capacity = None
            log.warning("Pool %s: %s", self.name, exc)

    def describe(self) -> replies.Pool:
        pool = None
        with contextlib.suppress(errors.NotFound):
            pool = self.present
        capacity = self.capacity
        return replies.Pool(
            name=self.name,
            driver=DRIVER,
            uuid=self.uuid,
            state=self.state.value,
            reason=self.reason,
            since=self.record.since if self.record is not None else None,
            autostart=bool(self.definition and self.definition.autostart),
            waits=self.waits is not None,
            type=pool.type.value if pool is not None else "",
            path=pool.path if pool is not None else "",
            capacity=capacity.capacity if capacity is not None else None,
            allocation=capacity.allocation if capacity is not None else None,
            available=capacity.available if capacity is not None else None,
        )

    def describe_fully(self) -> replies.PoolInfo:
        pool = None
        with contextlib.suppress(errors.NotFound):
            pool = self.present
        return replies.PoolInfo(
            **msgspec.structs.asdict(self.describe()),
            source=pool.source if pool is not None else None,
            fstype=pool.fstype if pool is not None else None,
            options=pool.options if pool is not None else "",
            persistent=self.definition is not None,
            pending=self.pending,
            definition_path=self.source if self.definition is not None else None,
            problems=[Trouble(text=problem.text, hint=str(problem.hint)) for problem in self.problems.values()],
        )
