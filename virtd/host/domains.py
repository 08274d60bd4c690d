# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on domains."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .. import errors
from ..drivers.qemu import operations
from ..drivers.qemu.machine import DRIVER, Machine
from ..model.state import State, require
from .viewing import Viewers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..child import Services
    from ..console import Followers
    from ..drivers.qemu.driver import Driver
    from ..model.settings import Qemu
    from .base import Caller, Listener, WithDescriptors

DOUBT = 5.0  # seconds that a listing waits for a domain of which nobody knows yet whether it runs


class Domains:
    """What can be asked of virtd about domains. `subscribe` is the host's."""

    def __init__(
        self,
        services: Services,
        settings: Qemu,
        driver: Driver,
        followers: Followers,
        subscribe: Callable[[Listener], Callable[[], None]],
    ) -> None:
        self._services = services
        self._settings = settings
        self.driver = driver
        self._viewers = Viewers(services, DRIVER, followers)
        self._subscribe = subscribe

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

    async def wait(self, name: str, states: list[str], timeout: float | None) -> dict[str, Any]:
        """Returns the object when it is in one of `states`. Raises TimedOut."""
        for state in states:
            if state not in State.__members__.values():
                raise errors.InvalidState(f"There is no state {state}", hint=f"States: {', '.join(State)}.")
        machine = await self._find(name)
        changed = asyncio.Event()
        unsubscribe = self._subscribe(
            lambda _event, item: changed.set() if (item["driver"], item["name"]) == (DRIVER, machine.name) else None
        )
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
        return await self._viewers.follow(self.driver.find(name), which, file, offset, lines, wait=wait)

    async def open_console(
        self, name: str, *, force: bool = False, token: str | None = None, by: Caller
    ) -> AsyncIterator[dict[str, Any] | WithDescriptors]:
        """See OpenConsole in org.virtd1.varlink. Closing the iterator gives the console up."""
        # Who was attached before the daemon's restart must not lose the console to a slow start of ours.
        machine = await self._find(name, DOUBT if token is None else 60.0)
        require("attach to the console of", machine.name, machine.state)
        async with contextlib.aclosing(self._viewers.write(machine, force=force, token=token, by=by)) as replies:
            async for reply in replies:
                yield reply

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
