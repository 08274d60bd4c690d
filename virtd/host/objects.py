# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations common to everything that has a definition and a process: domains and containers."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from .. import errors
from ..guests.guest import Guest
from ..model.state import State, require
from ..objects.turns import within
from ..replies import Changed, Defined, Named, Reply
from ..replies import guests as replies
from ..text import span
from .viewing import Viewers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from ..children.child import Services
    from ..guests.console import Followers
    from ..guests.driver import GuestDriver
    from .base import Caller, Listener, WithDescriptors

G = TypeVar("G", bound=Guest[Any])

DOUBT = 5.0  # seconds that a listing waits until each object is known to run or not to run


class Settling(Protocol):
    settled: asyncio.Event


async def settled(objects: Iterable[Settling]) -> None:
    """Wait until each object is known to run or not to run, for DOUBT seconds at most."""
    doubtful = [asyncio.ensure_future(one.settled.wait()) for one in objects if not one.settled.is_set()]
    if doubtful:
        _, pending = await asyncio.wait(doubtful, timeout=DOUBT)
        for task in pending:
            task.cancel()


async def known(one: Settling, name: str, limit: float = DOUBT) -> None:
    """Wait up to `limit` seconds until the object is known to run or not; `name`: for errors. Raises Busy."""
    if not one.settled.is_set() and not await within(one.settled, limit):
        raise errors.Busy(
            f"virtd doesn't know yet what became of {name}", hint="Is D-Bus up? systemctl status dbus.service"
        )


class Objects(Generic[G]):
    """The operations on one driver's objects. `subscribe` is the host's."""

    def __init__(
        self,
        services: Services,
        driver: GuestDriver[G, Any],
        followers: Followers,
        subscribe: Callable[[Listener], Callable[[], None]],
    ) -> None:
        self._services = services
        self._guests = driver
        self._viewers = Viewers(services, driver.name, driver.noun, followers)
        self._subscribe = subscribe

    # Reading

    async def listing(self) -> list[replies.Guest]:
        await settled(self._guests.machines.values())
        return [self._guests.describe(self._guests.machines[name]) for name in sorted(self._guests.machines)]

    async def info(self, name: str) -> replies.GuestInfo:
        machine = await self.find(name)
        return self._guests.describe_fully(machine)

    async def dump(self, name: str) -> str:
        machine = self._guests.find(name)
        if machine.definition is None:
            raise errors.NotFound(
                f"{self._guests.noun.capitalize()} {machine.name} has no definition",
                hint="It runs on as a transient one until it ends.",
            )
        return machine.definition_text

    async def wait(self, name: str, states: list[str], timeout: float | None) -> replies.Guest:
        """Wait until the object is in one of `states`, and return it. `timeout`: seconds or None. Raises TimedOut."""
        for state in states:
            if state not in State.__members__.values():
                raise errors.InvalidState(f"There is no state {state}", hint=f"States: {', '.join(State)}.")
        machine = await self.find(name)
        changed = asyncio.Event()
        unsubscribe = self._subscribe(
            lambda _event, item: (
                changed.set() if (item["driver"], item["name"]) == (self._guests.name, machine.name) else None
            )
        )
        try:
            async with asyncio.timeout(timeout):
                while machine.state.value not in states:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise errors.TimedOut(
                f"{machine.name} is {machine.state} after {span(timeout or 0)}, not {' or '.join(states)}"
            ) from None
        finally:
            unsubscribe()
        return self._guests.describe(machine)

    # Definitions

    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> Defined:
        if check:
            checked = self._guests.check(text, source)
            existing = self._guests.machines.get(checked.name)
            path = self._services.paths.definition(self._guests.name, checked.name)
            return Defined(
                name=checked.name,
                uuid=checked.uuid or (existing.uuid if existing else ""),
                created=existing is None,
                path=path,
                warnings=self._guests.warnings(checked),
            )
        machine, created = self._guests.define(text, source)
        return Defined(
            name=machine.name,
            uuid=machine.uuid,
            created=created,
            path=machine.source,
            warnings=self._guests.warnings(machine.defined),
        )

    async def undefine(self, name: str, *, by: Caller) -> Named:
        machine = await self.find(name)
        await self._guests.undefine(machine.name)
        return Named(name=machine.name)

    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> Changed:  # noqa: FBT001
        machine = self._guests.find(name)
        return Changed(name=machine.name, changed=self._guests.set_autostart(machine.name, enable=enable))

    # Operations

    async def start(self, name: str, *, by: Caller) -> replies.Started:
        machine = await self.find(name)
        changed = await self._guests.start(machine.name, by.name)
        pid = machine.record.main_pid if machine.record else 0
        return replies.Started(name=machine.name, changed=changed, pid=pid)

    async def stop(self, name: str, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await self._guests.stop(machine.name, by.name))

    # Logs and consoles

    async def follow(
        self, name: str, which: str, file: str | None, offset: int | None, lines: int | None, *, wait: bool
    ) -> WithDescriptors:
        """See Follow in org.virtd1.varlink."""
        return await self._viewers.follow(self._guests.find(name), which, file, offset, lines, wait=wait)

    async def open_console(
        self, name: str, *, force: bool = False, token: str | None = None, by: Caller
    ) -> AsyncIterator[Reply | WithDescriptors]:
        """See OpenConsole in org.virtd1.varlink. Closing the iterator releases the console."""
        # A client attached before the daemon's restart must not lose its console because our start is slow.
        machine = await self.find(name, DOUBT if token is None else 60.0)
        require("attach to the console of", machine.name, machine.state, self._guests.noun)
        async with contextlib.aclosing(self._viewers.write(machine, force=force, token=token, by=by)) as replies:
            async for reply in replies:
                yield reply

    async def find(self, name: str, limit: float = DOUBT) -> G:
        """The guest, once it is known whether it runs; waits up to `limit` seconds. Raises NotFound or Busy."""
        machine = self._guests.find(name)
        await known(machine, machine.name, limit)
        return machine
