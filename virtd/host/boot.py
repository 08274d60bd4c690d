# SPDX-License-Identifier: LGPL-2.1-or-later
"""Autostart at boot, including objects that must wait for something to appear: a bridge, a disk, a mount.

Nobody is there to try again, so an object that cannot be started is retried until the host goes down: at increasing
intervals, and soon after an interface, a block device or a mount appears. The objects that wait are recorded beside
the boot's mark, so that the next daemon goes on with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from .. import errors, files, journal, untrusted
from ..messages import Message
from ..objects.protocol import Problem
from ..objects.turns import within
from ..process import boot_id
from ..text import span

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..drivers.loader import Drivers
    from ..objects.protocol import Driver, Startable
    from ..paths import Paths
    from ..replies import Reply
    from .arrivals import Arrivals
    from .base import Listener

log = logging.getLogger(__name__)

ITSELF = "autostart"  # the caller on whose behalf objects are started
AT_ONCE = 8  # starts in parallel; more would only slow each other down on a small host
AGAIN = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before each retry; the last value is repeated
CALM = 0.5  # seconds between an arrival and a retry: udev has links to make, and a bridge gets its ports
RATHER_NOT = 3.0  # minimum seconds between two retries, however much arrives
LIMIT = 1 << 20  # maximum size of the record in bytes


class Told(msgspec.Struct, frozen=True):
    """A problem as text, with a hint."""

    text: str
    hint: str = ""


class Waiting(msgspec.Struct, frozen=True):
    """The record: the boot ID, and for each "driver/name" the last failure and its hint."""

    boot: str
    objects: dict[str, Told] = {}


class Boot:
    """Autostarts objects. `problems` and `subscribe` are the host's; `trouble(driver, what, exc)` reports a bug in a
    driver.
    """

    def __init__(
        self,
        drivers: Drivers,
        paths: Paths,
        problems: dict[str, tuple[str, str]],
        subscribe: Callable[[Listener], Callable[[], None]],
        trouble: Callable[[Driver, str, Exception], None],
    ) -> None:
        self._drivers = drivers
        self._paths = paths
        self._problems = problems
        self._subscribe = subscribe
        self._trouble = trouble
        self._boot = boot_id()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._waiters: dict[str, asyncio.Task[None]] = {}
        self._trying: set[str] = set()  # objects being started here, whose changes are our own doing
        self._written = Waiting(self._boot)
        self._nudge = asyncio.Event()  # set, then replaced, when something that was missing may have appeared
        self._nudging: asyncio.TimerHandle | None = None
        self._arrivals: Arrivals | None = None
        self._unsubscribe: Callable[[], None] | None = None

    async def run(self) -> None:
        """Start what is marked for autostart, once per boot (a soft reboot isn't a boot). What cannot be started
        waits.

        The mark says "begun" before the first start, so that a daemon that takes over in the middle goes on with the
        rest. Drivers are handled in order, those that others depend on first.
        """
        if self._done():
            return self._go_on()
        for pause in (*AGAIN[:3], None):
            try:
                self._mark(f"{self._boot} begun\n")
                break
            except errors.HostError as exc:
                self._problems["autostart"] = (f"Nothing was autostarted: {exc.message}", str(exc.hint))
                if pause is None:
                    return None
                await asyncio.sleep(pause)
        self._problems.pop("autostart", None)
        for driver in self._drivers:
            try:
                await asyncio.gather(*(self._first(driver, one) for one in driver.to_autostart()))
            except Exception as exc:
                self._trouble(driver, "autostarted", exc)
        with contextlib.suppress(errors.HostError):  # the next daemon will find nothing left to do
            self._mark(f"{self._boot}\n")
        return None

    async def close(self) -> None:
        """Stop retrying; the objects that wait stay on record."""
        tasks = list(self._waiters.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._be_quiet()

    def nudge(self) -> None:
        """Something changed that a waiting object may have been waiting for."""
        if self._waiters and self._nudging is None:
            self._nudging = asyncio.get_running_loop().call_later(CALM, self._nudged)

    def _nudged(self) -> None:
        self._nudging = None
        self._nudge.set()
        self._nudge = asyncio.Event()

    # The mark

    def _done(self) -> bool:
        for mark in self._paths.autostarted:
            with contextlib.suppress(OSError):
                if untrusted.read(mark, 100).decode(errors="replace").strip() == self._boot:
                    return True
        return False

    def _mark(self, text: str) -> None:
        """Record the progress of autostarting. Raises HostError if none of the marks can be written."""
        failed = []
        marks = self._paths.autostarted
        for mark in marks:
            try:
                files.write(mark, text.encode())
            except errors.HostError as exc:
                failed.append(exc)
        if len(failed) == len(marks):
            raise failed[0]

    # Trying

    async def _first(self, driver: Driver, one: Startable) -> None:
        if (failed := await self._try(driver, one)) is not None:
            log.warning("Cannot autostart %s: %s; it is tried again", one.name, failed.text)
            self._wait(driver, one, failed)

    async def _try(self, driver: Driver, one: Startable) -> Problem | None:
        """Start the object; returns the problem if it cannot be started."""
        async with self._slots:
            if not self._wanted(driver, one):
                return None
            key = f"{driver.name}/{one.name}"
            self._trying.add(key)
            try:
                await driver.start(one.name, ITSELF)
            except errors.VirtdError as exc:
                return Problem(exc.message, exc.hint)
            finally:
                self._trying.discard(key)
        return None

    def _wanted(self, driver: Driver, one: Startable) -> bool:
        return any(other is one for other in driver.to_autostart())

    # Waiting

    def _wait(self, driver: Driver, one: Startable, failed: Problem) -> None:
        key = f"{driver.name}/{one.name}"
        one.wait_for(failed)
        if key not in self._waiters:
            self._listen()
            task = asyncio.create_task(self._keep_trying(driver, one), name=f"autostart-{one.name}")
            self._waiters[key] = task
            task.add_done_callback(lambda task: self._over(key, task))
        self._record()

    async def _keep_trying(self, driver: Driver, one: Startable) -> None:
        begun = last = time.monotonic()
        pauses = iter(AGAIN)
        pause = next(pauses)
        while True:
            if await within(self._nudge, pause):
                pauses = iter(AGAIN)
                await asyncio.sleep(max(0.0, last + RATHER_NOT - time.monotonic()))
            pause = next(pauses, AGAIN[-1])
            if one.waits is None or not self._wanted(driver, one):
                one.wait_for(None)
                return
            last = time.monotonic()
            failed = await self._try(driver, one)
            if failed is None:
                one.wait_for(None)
                after = time.monotonic() - begun
                journal.send(
                    f"Autostarted {driver.noun} {one.name} after {span(after)} of waiting",
                    message_id=Message.AUTOSTARTED_LATE, **one.fields(),
                )  # fmt: skip
                return
            if failed != one.waits:
                log.warning("Cannot autostart %s yet: %s", one.name, failed.text)
                one.wait_for(failed)
                self._record()

    def _over(self, key: str, task: asyncio.Task[None]) -> None:
        self._waiters.pop(key, None)
        if task.cancelled():
            return
        if (exc := task.exception()) is not None:
            log.error("Autostarting %s failed: %s", key, exc, exc_info=exc)
        self._record()
        if not self._waiters:
            self._be_quiet()

    def _listen(self) -> None:
        """Watch for arrivals; only needed while something waits."""
        if self._arrivals is None:
            from .arrivals import Arrivals

            self._arrivals = Arrivals(self.nudge)
            self._unsubscribe = self._subscribe(self._changed)

    def _changed(self, _event: str, item: Reply) -> None:
        """A definition changed, or an object that others depend on was started."""
        if f"{item['driver']}/{item['name']}" not in self._trying:
            self.nudge()

    def _be_quiet(self) -> None:
        if self._arrivals is not None:
            self._arrivals.close()
            self._arrivals = None
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._nudging is not None:
            self._nudging.cancel()
            self._nudging = None

    # The record of what waits

    def _record(self) -> None:
        objects = {}
        for key in self._waiters:
            driver, _, name = key.partition("/")
            one = next((one for one in self._drivers.get(driver).to_autostart() if one.name == name), None)
            if one is not None and one.waits is not None:
                objects[key] = Told(one.waits.text, str(one.waits.hint))
        record = Waiting(self._boot, objects)
        if record == self._written:
            return
        try:
            if objects:
                files.write(self._paths.waiting, msgspec.json.encode(record))
            else:
                files.remove(self._paths.waiting)
            self._written = record
        except errors.HostError as exc:  # it is written again on the next change; until then only this process knows
            log.warning("What waits to be autostarted isn't on record: %s", exc)

    def recall(self) -> None:
        """Load what an earlier daemon of this boot was waiting for, before anyone asks; `run` continues it."""
        try:
            record = msgspec.json.decode(untrusted.read(self._paths.waiting, LIMIT), type=Waiting)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, ValueError) as exc:
            log.warning("What waited to be autostarted isn't known: %s", exc)
            return
        if record.boot == self._boot:
            self._written = record
            for _driver, one, failed in self._recalled():
                one.wait_for(failed)

    def _recalled(self) -> list[tuple[Driver, Startable, Problem]]:
        found = self._written.objects
        return [
            (driver, one, Problem(found[key].text, found[key].hint))
            for driver in self._drivers
            for one in driver.to_autostart()
            if (key := f"{driver.name}/{one.name}") in found
        ]

    def _go_on(self) -> None:
        for driver, one, failed in self._recalled():
            if one.waits is not None:  # and nothing has ended the wait since
                self._wait(driver, one, failed)
        self._record()
        self.nudge()
