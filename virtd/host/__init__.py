# SPDX-License-Identifier: LGPL-2.1-or-later
"""All operations of virtd, implemented once. Every front end is a thin adapter over a Host.

This module holds what concerns the daemon itself. Each noun has a module of its own and an attribute of Host;
attributes that not every host needs are created on first use.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from .. import __version__
from ..children.child import sweep
from ..drivers.loader import Drivers
from ..drivers.qemu.guest import DRIVER
from ..guests import console
from ..objects.protocol import Looking, Problem
from ..records import now
from ..replies import Gone
from ..replies import Problem as About
from ..replies import daemon as replies
from .access import Access
from .base import Caller, Listener, WithDescriptors
from .domains import Domains
from .events import Events
from .objects import Objects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from ..children.child import Services
    from ..drivers import lxc, qemu, storage
    from ..guests.driver import GuestDriver
    from ..logs.pump import Loss
    from ..model.settings import Settings
    from ..objects.protocol import Driver
    from ..replies.storage import Job
    from .boot import Boot
    from .containers import Containers
    from .networks import Networks
    from .pools import Pools
    from .volumes import Volumes

__all__ = ["Caller", "Host", "Listener", "WithDescriptors"]

log = logging.getLogger(__name__)

T = TypeVar("T")

TURN = 0.01  # seconds for which reading definitions may keep the event loop from other work


class Recovery(msgspec.Struct):
    """What this start recovered; `ms`: milliseconds from our first instruction until the guests were taken back."""

    objects: int = 0
    ms: float = 0.0
    what: str = ""  # "2 domains, 1 network"
    since: str = msgspec.field(default_factory=now)


class Host:
    """All operations of virtd. Every method must be called on the event loop."""

    def __init__(self, services: Services, settings: Settings) -> None:
        self._listeners: list[Listener] = []
        self._supervised: dict[str, Objects[Any]] = {}
        self.drivers = Drivers(services, settings, self._publisher, self._wake)
        self.followers = console.Followers(services.pump)
        domains = cast("qemu.driver.Driver", self.drivers.get(DRIVER))
        self.domains = Domains(services, settings.qemu, domains, self.followers, self.subscribe)
        self.access = Access()
        self.events = Events(services.paths.events, self.drivers, self._jobs)
        self.recovery = Recovery()
        self.degraded: list[str] = []
        self.problems: dict[str, tuple[str, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reconciling = False  # since `reconcile` began
        self._reloading = asyncio.Lock()
        self._comparing = asyncio.Lock()
        self.services = services

    # Nouns

    @functools.cached_property
    def networks(self) -> Networks:
        from .networks import Networks

        return Networks(self.drivers, self.use, self.services.paths)

    @functools.cached_property
    def containers(self) -> Containers:
        from .containers import Containers

        return Containers(self.services, cast("lxc.driver.Driver", self.use("lxc")), self.followers, self.subscribe)

    def supervised(self, driver: str) -> Objects[Any]:
        """The operations that any driver whose objects are processes supports."""
        if driver not in self._supervised:
            guests = cast("GuestDriver[Any, Any]", self.use(driver))
            self._supervised[driver] = Objects(self.services, guests, self.followers, self.subscribe)
        return self._supervised[driver]

    @functools.cached_property
    def boot(self) -> Boot:
        from .boot import Boot

        return Boot(self.drivers, self.services.paths, self.problems, self.subscribe, self._trouble)

    # Events

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(event, object)` on "added", "removed", "changed" and "ended". The result unsubscribes."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _publisher(self, driver: str) -> Callable[[str, str], None]:
        def publish(event: str, name: str) -> None:
            if event == "job":
                job = next((job for job in self._jobs() if job.job == name), None)
                if job is not None:
                    self.events.changed("job", name, job)
                return
            one = self.drivers.get(driver)
            item = one.describe_named(name)
            self.events.changed(one.noun, name, None if isinstance(item, Gone) else item)
            for listener in list(self._listeners):
                try:
                    listener(event, item)
                except Exception:  # a front end's failure must not affect the object
                    log.exception("A listener failed on %s of %s/%s", event, driver, name)

        return publish

    def _jobs(self) -> list[Job]:
        if "storage" not in self.drivers:
            return []
        return cast("storage.driver.Driver", self.drivers.get("storage")).jobs.describe()

    # Other nouns

    @property
    def pools(self) -> Pools:
        from .pools import Pools

        return Pools(cast("storage.driver.Driver", self.use("storage")))

    @property
    def volumes(self) -> Volumes:
        from .volumes import Volumes

        return Volumes(cast("storage.driver.Driver", self.use("storage")))

    # Drivers

    def use(self, name: str) -> Driver:
        """The driver `name`, for an operation. A driver that had nothing to do so far is created, without objects."""
        return self.drivers.use(name)

    def _wake(self, driver: Driver) -> None:
        self._restore(driver)
        if not self._reconciling:
            return  # `reconcile` will; a second time would roll back what an operation has begun in between
        task = asyncio.create_task(self._reconcile(driver), name=f"reconcile-{driver.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def restore(self, started: float) -> None:
        """The first step of a start; `started` is time.monotonic() at its beginning, in seconds."""
        for name in self.drivers.wanted():
            self.drivers.get(name)
        for driver in self.drivers:
            self._restore(driver)
        if os.path.lexists(self.services.paths.waiting):
            self.boot.recall()
        sweep(self.services)
        self.recovery.objects = self.live()
        self.recovery.what = self.summary()
        self.recovery.ms = (time.monotonic() - started) * 1000

    def _restore(self, driver: Driver) -> None:
        try:
            driver.restore()
        except Exception as exc:  # one driver's failure must not take the daemon from the others
            self._trouble(driver, "restored", exc)

    async def reconcile(self) -> None:
        """The second step of a start, once systemd can be queried."""
        self._reconciling = True
        self.events.begin()
        await asyncio.gather(*(self._reconcile(driver) for driver in self.drivers))
        self.events.compare()

    async def _reconcile(self, driver: Driver) -> None:
        try:
            await driver.reconcile()
        except Exception as exc:
            self._trouble(driver, "reconciled", exc)

    async def look(self) -> None:
        """Check for what may disappear without notice; called now and then."""
        for driver in self.drivers:
            if isinstance(driver, Looking):
                await driver.look()

    async def autostart(self) -> None:
        """Start what is marked for autostart, and keep trying where that isn't possible yet."""
        await self.boot.run()

    def _trouble(self, driver: Driver, what: str, exc: Exception) -> None:
        log.error("The driver %s can't be %s: %s", driver.name, what, exc, exc_info=exc)
        self.problems[f"{driver.name} driver"] = (
            f"Its objects couldn't be {what}: {exc}",
            "They were left alone. This is a bug: see journalctl -u virtd.",
        )

    def grown(self, key: str) -> None:
        """The pump wrote to a log; `key` is a slot's name."""
        self.followers.grown(key)
        name = key.partition("/")[0]
        if name in self.drivers:
            self.drivers.get(name).grown(key)

    def refused(self, loss: Loss) -> None:
        """The pump cannot write to a log, or can do so again."""
        reason = "" if loss.over else loss.reason
        problem = None
        if reason:
            text = f"{loss.path} can't be written: {reason}; output is being dropped"
            problem = Problem(text, "Free some space. The guest runs on.")
        self.followers.refused(loss.key, reason)
        name = loss.key.partition("/")[0]
        if name in self.drivers:
            self.drivers.get(name).refused(loss.key, problem)

    def live(self) -> int:
        return sum(driver.live() for driver in self.drivers)

    def summary(self) -> str:
        """What is running, such as "2 domains, 1 network"."""
        counted = [(driver.live(), driver.noun) for driver in self.drivers if driver.live()]
        return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counted) or "0 domains"

    def settled(self) -> bool:
        """Whether every object is known to run or not to run, so that a listing needn't wait."""
        return all(driver.settled() for driver in self.drivers)

    async def close(self) -> None:
        """Release everything that this process holds; guests and other children keep running."""
        if "boot" in self.__dict__:
            await self.boot.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(driver.close() for driver in self.drivers))
        self.events.close()

    # The daemon

    async def status(self) -> replies.Status:
        budget = self.services.store.budget()
        return replies.Status(
            version=__version__,
            pid=os.getpid(),
            since=self.recovery.since,
            recovered=replies.Recovered(
                objects=self.recovery.objects,
                ms=round(self.recovery.ms, 1),
                **self.found(),
            ),
            budget=replies.Budget(used=budget.used, max=budget.max, limited_by=str(budget.limited_by)),
            domains=self.domains.driver.counts(),
            objects={driver.name: driver.counts() for driver in self.drivers},
            jobs=await self.volumes.jobs() if "storage" in self.drivers else [],
            problems=self._all_problems(),
            degraded=list(self.degraded),
        )

    def found(self) -> dict[str, list[str]]:
        """What this start found, by kind of finding. Objects other than domains are named "driver/name"."""
        found: dict[str, list[str]] = {"adopted": [], "ended": [], "rolled_back": [], "rebuilt": []}
        for driver in self.drivers:
            prefix = "" if driver.name == DRIVER else f"{driver.name}/"
            for what, names in found.items():
                names += [f"{prefix}{name}" for name in getattr(driver.found, what)]
        return found

    def _all_problems(self) -> list[About]:
        found = [About(object=key, text=text, hint=hint) for key, (text, hint) in self.problems.items()]
        for driver in self.drivers:
            found += [_row(driver.name, *trouble) for trouble in driver.troubles()]
        return found

    async def slots(self) -> list[replies.Slot]:
        """See Slots in org.virtd1.varlink."""
        store = self.services.store
        return [
            replies.Slot(name=name, kept_as=store.kept_as(name), what=_what(store.get(name)))
            for name in store.names()
        ]

    async def check_all(self, *, repair: bool, by: Caller | None) -> replies.Checked:
        """Compare what systemd, /run, /etc and virtd know of every object. With `repair`, fix whatever can be fixed
        without touching anything that runs.
        """
        from . import fsck

        async with self._comparing:  # each comparison has PID 1 list all its units and descriptors
            rows = await fsck.compare(self.drivers, self.use, self.services, repair=repair)
        if repair and rows:
            who = by.name if by is not None else "nobody"
            log.info("fsck for %s: %d of %d differences repaired", who, sum(row.repaired for row in rows), len(rows))
        return replies.Checked(
            differences=rows, objects=sum(sum(driver.counts().values()) for driver in self.drivers)
        )

    async def reload(self, *, by: Caller) -> replies.Reloaded:
        """Reread the definitions, and reapply what others may have removed; nothing that runs is touched."""
        async with self._reloading:
            return await self._reload()

    async def _reload(self) -> replies.Reloaded:
        for name in self.drivers.wanted():
            self.use(name)
        changed: list[str] = []
        problems: list[About] = []
        for driver in self.drivers:
            prefix = "" if driver.name == DRIVER else f"{driver.name}/"
            changed += [f"{prefix}{name}" async for name in _bit_by_bit(driver.read_definitions()) if name]
            await driver.reload()
            problems += [_row(driver.name, *trouble) for trouble in driver.bad_definitions()]
        log.info("Reloaded: %d definitions changed", len(changed))
        return replies.Reloaded(changed=changed, problems=problems)


async def _bit_by_bit(work: Iterable[T]) -> AsyncIterator[T]:
    """The items of `work`; other tasks get a turn every TURN seconds."""
    turn = time.monotonic()
    for item in work:
        yield item
        if time.monotonic() - turn > TURN:
            await asyncio.sleep(0)
            turn = time.monotonic()


def _what(fd: int) -> str:
    """What `fd` refers to, as /proc names it; empty if it was just closed, before its slot is dropped."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _row(driver: str, name: str, problem: Problem) -> About:
    """A problem of the object `name`, as every front end reports it."""
    return About(object=f"{driver}/{name}" if name else driver, text=problem.text, hint=str(problem.hint))
