# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on networks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from .. import errors
from ..replies import Changed, Defined, Named
from ..replies import networks as replies
from .objects import known, settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..drivers.loader import Drivers
    from ..drivers.network.driver import Driver
    from ..drivers.network.net import Net
    from ..paths import Paths
    from .base import Caller

DRIVER = "network"


class Networks:
    """The operations that virtd offers on networks."""

    def __init__(self, drivers: Drivers, use: Callable[[str], Any], paths: Paths) -> None:
        """`use(name)` returns the driver of that name, created if necessary."""
        self._drivers = drivers
        self._use = use
        self._paths = paths

    @property
    def driver(self) -> Driver:
        return cast("Driver", self._use(DRIVER))

    # Reading

    async def listing(self) -> list[replies.Network]:
        if DRIVER not in self._drivers:  # the driver was never created, so there are no networks
            return []
        await settled(self.driver.nets.values())
        return [self.driver.describe(self.driver.nets[name]) for name in sorted(self.driver.nets)]

    async def info(self, name: str) -> replies.NetworkInfo:
        net = await self._find(name)
        await self.driver.look_at(net)
        return self.driver.describe_fully(net)

    async def dump(self, name: str) -> str:
        net = self.driver.find(name)
        if net.definition is None:
            raise errors.NotFound(
                f"Network {net.name} has no definition", hint="It stays as it is until it is stopped."
            )
        return net.definition_text

    async def leases(self, name: str) -> list[replies.Lease]:
        return [lease.described() for lease in self.driver.find(name).leases()]

    # Definitions

    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> Defined:
        """Define a network. An active one adopts the definition at once, as far as that can be done live."""
        driver = self.driver
        if check:
            network = driver.check(text, source)
            existing = driver.nets.get(network.name)
            return Defined(
                name=network.name,
                uuid=network.uuid or (existing.uuid if existing else ""),
                created=existing is None,
                path=self._path(network.name),
                warnings=await driver.warnings(network),
            )
        network = driver.check(text, source)
        before = driver.nets.get(network.name)
        kept = before.definition_text if before is not None and before.definition is not None else ""
        net, created = driver.define(text, source)
        try:
            warnings = await net.adapt()
        except errors.VirtdError:
            if kept:
                driver.define(kept, net.source)  # the old definition is still the one in force
            raise
        return Defined(
            name=net.name,
            uuid=net.uuid,
            created=created,
            path=net.source,
            warnings=warnings + await driver.warnings(network),
        )

    async def define_default(self, *, by: Caller) -> Defined:
        """Define the network "default" if it doesn't exist: NAT, with a private range that is free on this host."""
        driver = self.driver
        if (net := driver.nets.get("default")) is not None and net.definition is not None:
            return Defined(name=net.name, uuid=net.uuid, created=False, path=net.source, warnings=[])
        text = await asyncio.to_thread(driver.default)
        return await self.define(text, "default", check=False, by=by)

    async def undefine(self, name: str, *, by: Caller) -> Named:
        net = await self._find(name)
        await self.driver.undefine(net.name)
        return Named(name=net.name)

    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> Changed:  # noqa: FBT001
        net = self.driver.find(name)
        return Changed(name=net.name, changed=self.driver.set_autostart(net.name, enable=enable))

    # Life

    async def start(self, name: str, *, by: Caller) -> Changed:
        net = await self._find(name)
        return Changed(name=net.name, changed=await self.driver.start(net.name, by.name))

    async def stop(self, name: str, *, force: bool, by: Caller) -> Changed:
        net = await self._find(name)
        return Changed(name=net.name, changed=await self.driver.stop(net.name, by.name, force=force))

    async def _find(self, name: str) -> Net:
        net = self.driver.find(name)
        await known(net, f"network {net.name}")
        return net

    def _path(self, name: str) -> str:
        return self._paths.definition(DRIVER, name)
