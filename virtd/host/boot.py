# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is started at boot, and what has to wait for something that appears later: a bridge, a disk, a mount.

Nobody is there to try again, so whatever can't be started is retried for as long as the boot lasts: after growing
pauses, and soon after an interface, a block device or a mount has appeared. What waits is on record beside the mark
of the boot, so that the next daemon continues to wait for it.
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

ITSELF = "autostart"  # who starts them
AT_ONCE = 8  # starts in parallel; more only slow each other down on a small host
AGAIN = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before each further try; the last one from then on
CALM = 0.5  # seconds between an arrival and the try: udev has its links to make, and a bridge gets its ports
RATHER_NOT = 3.0  # seconds between two tries, however much arrives
LIMIT = 1 << 20  # bytes of the record


class Told(msgspec.Struct, frozen=True):
    """A problem, in words."""

    text: str
    hint: str = ""


class Waiting(msgspec.Struct, frozen=True):
    """The record: of which boot, and for each "driver/name" what was wrong at its last try, and what helps."""

    boot: str
    objects: dict[str, Told] = {}


class Boot:
    """`problems` and `subscribe` are the host's; `trouble(driver, what, exc)` reports a bug in a driver."""

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
        self._trying: set[str] = set()  # whose changes are of our own making
        self._written = Waiting(self._boot)
        self._nudge = asyncio.Event()  # set, and replaced by a new one, when what was missing may be there
        self._nudging: asyncio.TimerHandle | None = None
        self._arrivals: Arrivals | None = None
        self._unsubscribe: Callable[[], None] | None = None

    async def run(self) -> None:
        """Start what is to be started: once per boot, which a soft reboot isn't. What can't be started waits.

        The mark says "begun" before the first one is started, so that a daemon that takes over in the middle goes on
        with the rest. One driver comes after the other: what others stand on is first.
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
        """What waits stays on record."""
        tasks = list(self._waiters.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._be_quiet()

    def nudge(self) -> None:
        """Something has changed for which one of those that wait may have waited."""
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
        """Write how far autostarting is. Raises HostError when that can be done nowhere."""
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
        """Start it; what is wrong, if that can't be done."""
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
        """Look out for what may come, only while somebody waits for it."""
        if self._arrivals is None:
            from .arrivals import Arrivals

            self._arrivals = Arrivals(self.nudge)
            self._unsubscribe = self._subscribe(self._changed)

    def _changed(self, _event: str, item: Reply) -> None:
        """A definition was changed, or what one of them stands on was started."""
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
        except errors.HostError as exc:  # it is written with the next change; until then this process knows
            log.warning("What waits to be autostarted isn't on record: %s", exc)

    def recall(self) -> None:
        """Know what an earlier daemon of this boot has waited for, before anybody asks; `run` goes on with it."""
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
            if one.waits is not None:  # and nobody has ended that since
                self._wait(driver, one, failed)
        self._record()
        self.nudge()
