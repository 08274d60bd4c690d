# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations, once. Every front end is a thin adapter over a Host."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from . import __version__, console, errors
from .child import CONSOLE_LOG, STDERR, STDERR_LOG, STDOUT, Services
from .drivers.qemu import operations
from .drivers.qemu.driver import Driver
from .drivers.qemu.machine import DRIVER, Machine, Problem
from .logfile import Cursor, LogFile
from .model.state import ALIVE, State, require
from .records import now

if TYPE_CHECKING:
    from .model.settings import Qemu

log = logging.getLogger(__name__)

DOUBT = 5.0  # seconds that a listing waits for a domain of which nobody knows yet whether it runs

Listener = Callable[[str, dict[str, Any]], None]


class Caller(msgspec.Struct, frozen=True):
    """Who asks: SO_PEERCRED's answer, or D-Bus's."""

    uid: int
    pid: int
    name: str


class WithDescriptors(msgspec.Struct, frozen=True):
    """A reply with descriptors, which the front end passes on and then closes."""

    value: dict[str, Any]
    fds: list[int]


class Recovery(msgspec.Struct):
    """What this start found; `ms` from the process's first instruction of ours until the guests were taken back."""

    objects: int = 0
    ms: float = 0.0
    since: str = msgspec.field(default_factory=now)


class Host:
    """Everything that can be asked of virtd. All methods are to be called on the event loop."""

    def __init__(self, services: Services, settings: Qemu) -> None:
        self._services = services
        self._settings = settings
        self._listeners: list[Listener] = []
        self.driver = Driver(services, settings, self._publish)
        self.followers = console.Followers(services.pump)
        self._writers = console.Writers()
        self.recovery = Recovery()
        self.degraded: list[str] = []
        self.problems: dict[str, tuple[str, str]] = {}

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """`listener(event, object)`, event one of "added", "removed", "changed", "ended"; returns how to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _publish(self, event: str, name: str) -> None:
        machine = self.driver.machines.get(name)
        item = self.driver.describe(machine) if machine is not None else {"name": name, "driver": DRIVER}
        for listener in list(self._listeners):
            try:
                listener(event, item)
            except Exception:  # a front end's trouble is not the guest's
                log.exception("A listener failed on %s of %s", event, name)

    # Reading

    async def listing(self) -> list[dict[str, Any]]:
        doubtful = [
            machine.settled.wait() for machine in self.driver.machines.values() if not machine.settled.is_set()
        ]
        if doubtful:
            _, pending = await asyncio.wait([asyncio.ensure_future(wait) for wait in doubtful], timeout=DOUBT)
            for task in pending:
                task.cancel()
        return [self.driver.describe(self.driver.machines[name]) for name in sorted(self.driver.machines)]

    async def info(self, name: str) -> dict[str, Any]:
        machine = await self._find(name)
        return self.driver.describe_fully(machine)

    async def dump(self, name: str) -> str:
        machine = self.driver.find(name)
        if machine.definition is None:
            raise errors.NotFound(
                f"Domain {machine.name} has no definition", hint="It runs on as a transient domain until it ends."
            )
        return machine.definition_text

    async def status(self) -> dict[str, Any]:
        budget = self._services.store.budget()
        found = self.driver.found
        counts = {state.value: 0 for state in State}
        for machine in self.driver.machines.values():
            counts[machine.state.value] += 1
        return {
            "version": __version__,
            "pid": os.getpid(),
            "since": self.recovery.since,
            "recovered": {
                "objects": self.recovery.objects,
                "ms": round(self.recovery.ms, 1),
                "adopted": found.adopted,
                "ended": found.ended,
                "rolled_back": found.rolled_back,
                "rebuilt": found.rebuilt,
            },
            "budget": {"used": budget.used, "max": budget.max, "limited_by": str(budget.limited_by)},
            "domains": counts,
            "problems": self._all_problems(),
            "degraded": list(self.degraded),
        }

    def _all_problems(self) -> list[dict[str, str]]:
        found = [{"object": key, "text": text, "hint": hint} for key, (text, hint) in self.problems.items()]
        found += self._driver_problems()
        for machine in self.driver.machines.values():
            found += [_row(machine.name, problem) for problem in machine.problems.values()]
        return found

    def _driver_problems(self, about: str = "") -> list[dict[str, str]]:
        """The driver's own troubles, besides its machines': all, or those `about` "definition" or "record"."""
        return [
            _row(key.partition(" ")[2], problem)
            for key, problem in self.driver.problems.items()
            if key.startswith(about)
        ]

    async def wait(self, name: str, states: list[str], timeout: float | None) -> dict[str, Any]:
        """Returns the object when it is in one of `states`. Raises TimedOut."""
        for state in states:
            if state not in State.__members__.values():
                raise errors.InvalidState(f"There is no state {state}", hint=f"States: {', '.join(State)}.")
        machine = await self._find(name)
        changed = asyncio.Event()
        unsubscribe = self.subscribe(lambda _event, item: changed.set() if item["name"] == machine.name else None)
        try:
            async with asyncio.timeout(timeout):
                while machine.state.value not in states:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise errors.TimedOut(
                f"{machine.name} is {machine.state} after {timeout:g} s, not {' or '.join(states)}"
            ) from None
        finally:
            unsubscribe()
        return self.driver.describe(machine)

    # Definitions

    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> dict[str, Any]:
        if check:
            domain = self.driver.check(text, source)
            existing = self.driver.machines.get(domain.name)
            path = self._services.paths.definition(DRIVER, domain.name)
            return {
                "name": domain.name,
                "uuid": domain.uuid or (existing.uuid if existing else ""),
                "created": existing is None,
                "path": path,
                "warnings": self.driver.warnings(domain),
            }
        machine, created = self.driver.define(text, source)
        assert machine.definition is not None
        return {
            "name": machine.name,
            "uuid": machine.uuid,
            "created": created,
            "path": machine.source,
            "warnings": self.driver.warnings(machine.definition),
        }

    async def undefine(self, name: str, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        await self.driver.undefine(machine.name)
        return {"name": machine.name}

    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> dict[str, Any]:  # noqa: FBT001
        machine = self.driver.find(name)
        return {"name": machine.name, "changed": self.driver.set_autostart(machine.name, enable=enable)}

    async def reload(self, *, by: Caller) -> dict[str, Any]:
        """Read the definitions again; nothing that runs is touched."""
        changed = self.driver.load_definitions()
        log.info("Reloaded: %d definitions changed", len(changed))
        return {"changed": changed, "problems": self._driver_problems("definition")}

    # Operations

    async def start(self, name: str, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        changed = await self.driver.start(machine.name, by.name)
        return {"name": machine.name, "changed": changed, "pid": machine.record.main_pid if machine.record else 0}

    async def shutdown(self, name: str, timeout: float | None, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        limit = self._settings.shutdown_timeout if timeout is None else timeout
        return {"name": machine.name, "changed": await operations.shutdown(machine, limit, by.name)}

    async def stop(self, name: str, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        return {"name": machine.name, "changed": await operations.stop(machine, by.name)}

    async def kill(self, name: str, signum: int, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        return {"name": machine.name, "changed": await operations.kill(machine, signum, by.name)}

    async def reboot(self, name: str, *, force: bool, timeout: float | None, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        limit = self._settings.shutdown_timeout if timeout is None else timeout
        return {
            "name": machine.name,
            "changed": await operations.reboot(machine, force=force, timeout=limit, by=by.name),
        }

    async def suspend(self, name: str, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        return {"name": machine.name, "changed": await operations.suspend(machine, by.name)}

    async def resume(self, name: str, *, by: Caller) -> dict[str, Any]:
        machine = await self._find(name)
        return {"name": machine.name, "changed": await operations.resume(machine, by.name)}

    # Logs and consoles

    async def follow(
        self, name: str, which: str, file: str | None, offset: int | None, lines: int | None, *, wait: bool
    ) -> WithDescriptors:
        """See Follow in org.virtd1.varlink."""
        if which not in ("console", "log"):
            raise errors.InvalidState(f"There is no log {which}", hint='The logs are "console" and "log".')
        machine = self.driver.find(name)
        slot, pipe = (CONSOLE_LOG, STDOUT) if which == "console" else (STDERR_LOG, STDERR)
        child = machine.child
        open_log = (child.console if slot == CONSOLE_LOG else child.stderr) if child is not None else None
        asked = Cursor(file, offset or 0) if file is not None else None
        passing = open_log is None
        logfile = open_log or self._past_log(machine, which)
        try:
            place = await self.followers.place(
                logfile, f"{DRIVER}/{machine.name}/{pipe}", asked, lines or 0, machine.over, wait=wait and not passing
            )
        finally:
            if passing:
                logfile.close()
        value = {
            "file": place.cursor.file,
            "offset": place.cursor.offset,
            "more": place.more,
            "ended": place.ended,
            "state": machine.state.value,
        }
        return WithDescriptors(value, [place.fd] if place.fd is not None else [])

    def _past_log(self, machine: Machine, which: str) -> LogFile:
        """The log of a domain that doesn't run."""
        paths = self._services.paths
        path = (paths.console_log if which == "console" else paths.stderr_log)(DRIVER, machine.name)
        if not os.path.exists(path):
            raise errors.NotFound(f"{machine.name} has no log yet", hint=f"Start it: virtctl start {machine.name}.")
        limits = self._services.log_limits
        return LogFile(path, limit=limits.max_bytes, backups=limits.backups)

    async def open_console(
        self, name: str, *, force: bool = False, token: str | None = None, by: Caller
    ) -> AsyncIterator[dict[str, Any] | WithDescriptors]:
        """See OpenConsole in org.virtd1.varlink. Closing the iterator gives the console up."""
        # Who was attached before the daemon's restart must not lose the console to a slow start of ours.
        machine = await self._find(name, DOUBT if token is None else 60.0)
        require("attach to the console of", machine.name, machine.state)
        if machine.child is None or machine.record is None:
            raise errors.InvalidState(f"Cannot attach to the console of {machine.name}: it is {machine.state}")
        kept = machine.record.data.get("console")
        try:
            pipe = machine.child.stdin()
        except LookupError:
            raise errors.HostError(f"The console of {machine.name} takes no input: its slot was lost") from None
        claim = self._writers.claim(machine.name, kept, force=force, token=token, by=by.name, pid=by.pid)
        machine.keep_console({"token": claim.token, "by": by.name, "pid": by.pid})
        try:
            yield WithDescriptors({"token": claim.token, "name": machine.name}, [os.dup(pipe)])
            event = await console.write(claim, machine.over)
            yield {"name": machine.name, "event": event, "by": claim.taken_by or None}
        finally:
            if self._writers.release(machine.name, claim):
                machine.keep_console(None)

    async def _find(self, name: str, limit: float = DOUBT) -> Machine:
        """The machine, once it is known what became of it."""
        machine = self.driver.find(name)
        if not machine.settled.is_set():
            try:
                async with asyncio.timeout(limit):
                    await machine.settled.wait()
            except TimeoutError:
                raise errors.Busy(
                    f"virtd doesn't know yet what became of {machine.name}",
                    hint="Is D-Bus up? systemctl status dbus.service",
                ) from None
        return machine

    # For the daemon

    def live(self) -> int:
        return sum(machine.state in ALIVE for machine in self.driver.machines.values())

    def settled(self) -> bool:
        """Whether it is known of every domain what became of it, so that a listing needn't wait."""
        return all(machine.settled.is_set() for machine in self.driver.machines.values())

    def restore(self, started: float) -> None:
        """The first step of a start; `started` is time.monotonic() at its beginning."""
        self.driver.restore()
        self.recovery.objects = self.live()
        self.recovery.ms = (time.monotonic() - started) * 1000


def _row(name: str, problem: Problem) -> dict[str, str]:
    """A problem of the domain `name`, as every front end tells it."""
    return {"object": f"{DRIVER}/{name}", "text": problem.text, "hint": problem.hint}
