# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resizing, wiping and deleting volumes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...hints import option
from ...model import pool as model
from ...model import size as sizes
from ...model.drives import Format
from . import chains, programs
from .task import Task
from .usage import key
from .volumes import Answer, check_room

if TYPE_CHECKING:
    from .volumes import Volumes


class Changing:
    """Each call is refused while anybody uses the volume."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._pools = volumes.pools
        self._usage = volumes.usage

    async def resize(
        self, pool_name: str, name: str, size: str | int, *, shrink: bool = False, token: str = "", by: str
    ) -> Answer:
        pool, volume = await self._volumes.find(pool_name, name)
        if (known := self._volumes.repeated(pool, name, token)) is not None:
            return known
        number = model.volume_size(size)
        chain = await chains.chain(self._pools, pool, volume)
        chains.require_format(chain)
        await self._volumes.require_no_dependents("resize", pool.name, name)
        await check_room(pool, number, everything=False)
        self._usage.require("resize", pool.name, volume, writes=True)
        if volume.capacity == number:
            return Answer(pool.name, name)
        if volume.capacity is not None and number < volume.capacity and not shrink:
            raise errors.InvalidDefinition(
                "volume",
                "size",
                f"expected at least what it has, {sizes.show(volume.capacity)}, got {sizes.show(number)}",
                hint=option("shrink") + " cuts off what is beyond, for good.",
            )
        backend = pool.usable
        if volume.meta.format is Format.RAW:
            with self._usage.taken(pool.name, name, "resize"):
                await backend.grow(volume, number)
            await pool.measure()
            self._pools.changed(pool)
            return Answer(pool.name, name)
        task = Task(
            verb="resize",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            size=number,
            writes=(key(pool.name, name),),
            reads=tuple(link.key for link in chain[1:]),
            undo=False,
        )
        program = programs.resize(
            self._volumes.account, volume.path, number, [link.pair for link in chain[1:]], shrink=shrink
        )
        return await self._volumes.lend_and_run(pool, volume, task, program)

    async def wipe(self, pool_name: str, name: str, *, token: str = "", by: str) -> Answer:
        pool, volume = await self._volumes.find(pool_name, name)
        if (known := self._volumes.repeated(pool, name, token)) is not None:
            return known
        form = chains.Link(pool, volume).format
        chain = await chains.chain(self._pools, pool, volume)
        await self._volumes.require_no_dependents("wipe", pool.name, name)
        self._usage.require("wipe", pool.name, volume, writes=True)
        task = Task(
            verb="wipe",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            meta=msgspec.structs.replace(volume.meta, damaged=""),
            writes=(key(pool.name, name),),
            reads=tuple(link.key for link in chain[1:]),
            undo=False,
        )
        size = volume.capacity
        if size is None:
            raise errors.InvalidState(
                f"Cannot wipe {name}: {volume.trouble}", hint="Delete it; its blocks are then free, though not empty."
            )
        below = chain[1].pair if len(chain) > 1 else None
        program = programs.wipe(self._volumes.account, volume.path, size, form, below)
        damaged = msgspec.structs.replace(volume.meta, damaged="it was being wiped: wipe it again, or delete it")
        await pool.usable.describe(name, damaged)
        try:
            return await self._volumes.lend_and_run(pool, volume, task, program)
        except BaseException:
            with contextlib.suppress(errors.VirtdError):
                await pool.usable.describe(name, volume.meta)
            raise

    async def delete(self, pool_name: str, name: str, *, by: str) -> Answer:
        pool, volume = await self._volumes.find(pool_name, name)
        await self._volumes.require_no_dependents("delete", pool.name, name)
        self._usage.require("delete", pool.name, volume, writes=True)
        with self._usage.taken(pool.name, name, "delete"):
            await pool.usable.delete(volume)
        await pool.measure()
        self._pools.changed(pool)
        return Answer(pool.name, name)
