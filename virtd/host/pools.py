# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on storage pools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import errors
from ..replies import Changed, Defined, Named
from ..replies import storage as replies

if TYPE_CHECKING:
    from ..drivers.storage.driver import Driver
    from .base import Caller


class Pools:
    """The operations that virtd offers on storage pools."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def listing(self) -> list[replies.Pool]:
        return [self.driver.pools[name].describe() for name in sorted(self.driver.pools)]

    async def info(self, name: str) -> replies.PoolInfo:
        return self.driver.find(name).describe_fully()

    async def dump(self, name: str) -> str:
        pool = self.driver.find(name)
        if pool.definition is None:
            raise errors.NotFound(f"Pool {pool.name} has no definition", hint="It goes when it is stopped.")
        return pool.definition_text

    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> Defined:
        if check:
            pool = self.driver.check(text, source)
            known = self.driver.pools.get(pool.name)
            return Defined(
                name=pool.name,
                uuid=pool.uuid or (known.uuid if known is not None else ""),
                created=known is None,
                path="",
                warnings=[],
            )
        mine, created = self.driver.define(text, source)
        pending = mine.active and mine.pending
        return Defined(
            name=mine.name,
            uuid=mine.uuid,
            created=created,
            path=mine.source,
            warnings=["the pool is active: this waits for its next start"] if pending else [],
        )

    async def undefine(self, name: str, *, by: Caller) -> Named:
        pool = self.driver.find(name)
        await self.driver.undefine(pool.name)
        return Named(name=pool.name)

    async def start(self, name: str, *, by: Caller) -> Changed:
        pool = self.driver.find(name)
        return Changed(name=pool.name, changed=await self.driver.start(pool.name, by.name))

    async def stop(self, name: str, *, by: Caller) -> Changed:
        pool = self.driver.find(name)
        return Changed(name=pool.name, changed=await self.driver.stop(pool.name, by.name))

    async def build(self, name: str, *, by: Caller) -> Changed:
        pool = self.driver.find(name)
        return Changed(name=pool.name, changed=await self.driver.build(pool.name))

    async def refresh(self, name: str, *, by: Caller) -> replies.Refreshed:
        return await self.driver.viewing.refresh(name)

    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> Changed:  # noqa: FBT001
        pool = self.driver.find(name)
        return Changed(name=pool.name, changed=self.driver.set_autostart(pool.name, enable=enable))
