# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on containers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from .. import errors
from ..drivers.lxc import execs, operations
from ..drivers.lxc.container import Container
from ..model.state import require
from ..replies import Changed, Named, Reply
from ..replies import guests as replies
from .base import WithDescriptors
from .objects import Objects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..children.child import Services
    from ..drivers.lxc.driver import Driver
    from ..guests.console import Followers
    from .base import Caller, Listener


class Containers(Objects[Container]):
    """The operations that virtd offers on containers."""

    def __init__(
        self,
        services: Services,
        driver: Driver,
        followers: Followers,
        subscribe: Callable[[Listener], Callable[[], None]],
    ) -> None:
        super().__init__(services, driver, followers, subscribe)
        self.driver = driver

    def _limit(self, container: Container, timeout: float | None) -> float:
        return container.settings.shutdown_timeout if timeout is None else timeout

    async def start(self, name: str, *, by: Caller) -> replies.Started:
        done = await super().start(name, by=by)
        return replies.Started(name=done.name, changed=done.changed, pid=self.driver.find(name).init() or 0)

    async def shutdown(self, name: str, timeout: float | None, *, by: Caller) -> Changed:
        container = await self.find(name)
        limit = self._limit(container, timeout)
        return Changed(name=container.name, changed=await operations.shutdown(container, limit, by.name))

    async def kill(self, name: str, signum: int, *, by: Caller) -> Changed:
        container = await self.find(name)
        return Changed(name=container.name, changed=await operations.kill(container, signum, by.name))

    async def reboot(self, name: str, timeout: float | None, *, by: Caller) -> Changed:
        container = await self.find(name)
        limit = self._limit(container, timeout)
        return Changed(name=container.name, changed=await operations.reboot(container, limit, by.name))

    async def freeze(self, name: str, *, by: Caller) -> Changed:
        container = await self.find(name)
        return Changed(name=container.name, changed=await operations.freeze(container, by.name))

    async def thaw(self, name: str, *, by: Caller) -> Changed:
        container = await self.find(name)
        return Changed(name=container.name, changed=await operations.thaw(container, by.name))

    async def create(self, name: str, image: str, ids: int | None = None, *, by: Caller) -> replies.Made:
        container = await self.driver.create(name, image, ids)
        return replies.Made(name=container.name, uuid=container.uuid, path=container.source)

    # Commands in a container

    async def execute(
        self,
        name: str,
        *,
        command: list[str],
        environment: dict[str, Any] | None = None,
        terminal: bool = False,
        token: str | None = None,
        by: Caller,
    ) -> AsyncIterator[Reply | WithDescriptors]:
        """See Execute in org.virtd1.Container.varlink."""
        container = await self.find(name)
        if token is None:
            require("run a command in", container.name, container.state, container.noun)
            variables = {key: str(value) for key, value in (environment or {}).items()}
            run = await execs.begin(container, command, variables, terminal=terminal)
            unit = run.unit
            yield WithDescriptors(replies.Opened(token=unit, name=container.name), run.fds)
        elif execs.belongs(token, container):
            unit = token
        else:
            raise errors.NotFound(f"There is no command {token} in {container.name}")
        units = await self._services.units()
        try:
            result = await execs.result(units, unit)
        except GeneratorExit:
            container.spawn(self._forget(unit), "forget")  # nobody is waiting for it any more
            raise
        yield replies.Ran(name=container.name, event="ended", code=result.code, signal=result.signal)

    async def _forget(self, unit: str) -> None:
        units = await self._services.units()
        with contextlib.suppress(errors.VirtdError):
            await execs.result(units, unit)

    async def signal(self, name: str, token: str, signum: int, *, by: Caller) -> Named:
        """Send signal number `signum` to a command that Execute started."""
        container = await self.find(name)
        if not execs.belongs(token, container):
            raise errors.NotFound(f"There is no command {token} in {container.name}")
        await execs.send(await self._services.units(), token, signum)
        return Named(name=container.name)
