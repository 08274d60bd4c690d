# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on domains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..drivers.qemu import operations
from ..drivers.qemu.guest import QemuGuest
from ..replies import Changed
from .objects import Objects

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..children.child import Services
    from ..drivers.qemu.driver import Driver
    from ..guests.console import Followers
    from ..model.settings import Qemu
    from .base import Caller, Listener


class Domains(Objects[QemuGuest]):
    """The operations that virtd offers on domains."""

    def __init__(
        self,
        services: Services,
        settings: Qemu,
        driver: Driver,
        followers: Followers,
        subscribe: Callable[[Listener], Callable[[], None]],
    ) -> None:
        super().__init__(services, driver, followers, subscribe)
        self._settings = settings
        self.driver = driver

    async def shutdown(self, name: str, timeout: float | None, *, by: Caller) -> Changed:
        machine = await self.find(name)
        limit = self._settings.shutdown_timeout if timeout is None else timeout
        return Changed(name=machine.name, changed=await operations.shutdown(machine, limit, by.name))

    async def kill(self, name: str, signum: int, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await operations.kill(machine, signum, by.name))

    async def reboot(self, name: str, *, force: bool, timeout: float | None, by: Caller) -> Changed:
        machine = await self.find(name)
        limit = self._settings.shutdown_timeout if timeout is None else timeout
        changed = await operations.reboot(machine, force=force, timeout=limit, by=by.name)
        return Changed(name=machine.name, changed=changed)

    async def suspend(self, name: str, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await operations.suspend(machine, by.name))

    async def remove_state(self, name: str, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await operations.remove_state(machine))

    async def upgrade_machine(self, name: str, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await operations.upgrade_machine(machine))

    async def resume(self, name: str, *, by: Caller) -> Changed:
        machine = await self.find(name)
        return Changed(name=machine.name, changed=await operations.resume(machine, by.name))
