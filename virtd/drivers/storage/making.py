# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making volumes: empty ones, clones, imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import errors
from ...hints import do
from ...model import pool as model
from ...model.drives import Format
from . import chains, images, programs
from .backend import Meta
from .task import Task
from .usage import key
from .volumes import Answer, check_format, check_room

if TYPE_CHECKING:
    from .pool import StoragePool
    from .task import Program
    from .volumes import Volumes


class Making:
    """Each call names the new volume, which nobody sees until it is complete."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._pools = volumes.pools
        self._usage = volumes.usage

    async def create(
        self,
        pool_name: str,
        name: str,
        size: str | int | None,
        *,
        format: str | None = None,  # noqa: A002
        preallocation: str = "off",
        backing: tuple[str, str] | None = None,
        token: str = "",
        by: str,
    ) -> Answer:
        pool, known = await self._volumes.begin(pool_name, name, token)
        if known is not None:
            return known
        wanted = model.volume_format(format) if format else Format.QCOW2 if backing else Format.RAW
        allocate = model.preallocation(preallocation)
        check_format(pool, wanted)
        chain: list[chains.Link] = []
        if backing is not None:
            if wanted is not Format.QCOW2:
                raise errors.InvalidDefinition("volume", "backing", 'expected format = "qcow2" with a backing volume')
            base_pool, base = await self._volumes.find(*backing)
            chain = await chains.chain(self._pools, base_pool, base)
            chains.require_format(chain)
            self._usage.require("use", base_pool.name, base, writes=False)
            size = size if size is not None else base.capacity
        if size is None:
            raise errors.InvalidDefinition("volume", "size", "expected a size, since there is no backing volume")
        number = model.volume_size(size)
        await check_room(pool, number, everything=allocate in ("falloc", "full"))
        if wanted is Format.RAW and allocate is model.Preallocation.METADATA:
            raise errors.InvalidDefinition("volume", "preallocation", 'expected "off", "falloc" or "full" for raw')
        meta = Meta(wanted, chain[0].backing if chain else None, token=token)
        logical = not pool.backend.files  # where it has all of its space from the start
        full = allocate is model.Preallocation.FULL
        quick = wanted is Format.RAW and (allocate is model.Preallocation.OFF or (logical and not full))
        reads = tuple(link.key for link in chain)
        task = Task(verb="create", pool=pool.name, volume=name, by=by, token=token, meta=meta, reads=reads)

        def program(path: str) -> Program:
            if logical:
                return programs.wipe(self._volumes.account, path, number, wanted, None)
            below = chain[0].pair if chain else None
            return programs.create(self._volumes.account, path, number, allocate, wanted, below)

        begun = number if wanted is Format.RAW else None
        return await self._volumes.make(pool, task, begun, None if quick else program)

    async def clone(
        self, pool_name: str, source: str, name: str, *, to_pool: str | None = None, token: str = "", by: str
    ) -> Answer:
        target, known = await self._volumes.begin(to_pool or pool_name, name, token)
        if known is not None:
            return known
        pool, volume = await self._volumes.find(pool_name, source)
        chain = await chains.chain(self._pools, pool, volume)
        chains.require_format(chain)
        self._usage.require("clone", pool.name, volume, writes=False)
        form = chain[0].format
        check_format(target, form)
        await check_room(target, volume.allocation, everything=False)
        meta = Meta(form, volume.meta.backing, token=token)
        task = Task(
            verb="clone",
            pool=target.name,
            volume=name,
            by=by,
            token=token,
            meta=meta,
            reads=tuple(link.key for link in chain),
        )
        raw_size = volume.capacity if form is Format.RAW else None

        async def reflink(job: str) -> bool:
            old, new = pool.backend, target.backend
            return old.files and await new.reflink(volume, job)

        def program(path: str) -> Program:
            return programs.copy(self._volumes.account, volume.path, path)

        return await self._volumes.make(target, task, raw_size, program, shortcut=reflink)

    async def import_file(
        self,
        pool_name: str,
        name: str,
        file: str,
        *,
        source_format: str | None,
        probe: bool,
        format: str | None,  # noqa: A002
        token: str = "",
        by: str,
    ) -> Answer:
        """Make a volume from an image anywhere on the host."""
        pool, known = await self._volumes.begin(pool_name, name, token)
        if known is not None:
            return known
        async with images.looked(file, source_format, probe=probe) as foreign:
            return await self._import(pool, name, file, foreign, format, token=token, by=by)

    async def _import(
        self,
        pool: StoragePool,
        name: str,
        file: str,
        foreign: images.Foreign,
        format: str | None,  # noqa: A002
        *,
        token: str,
        by: str,
    ) -> Answer:
        wanted = model.volume_format(format) if format else images.native(foreign.format)
        check_format(pool, wanted)
        self._usage.require_not_written("import", file, foreign.identity)
        backing = await images.known_backing(self._pools, file, foreign) if foreign.backing else None
        if backing is not None and (wanted is not Format.QCOW2 or foreign.format != "qcow2"):
            raise errors.InvalidState(f"Cannot convert {file}: it stands on {foreign.backing}")
        await check_room(pool, foreign.size or 0, everything=False)
        meta = Meta(wanted, backing, token=token)
        task = Task(verb="import", pool=pool.name, volume=name, by=by, token=token, meta=meta)

        def program(path: str) -> Program:
            if foreign.format == wanted.value:
                return programs.copy(self._volumes.account, foreign.fd, path, check=wanted is Format.QCOW2)
            return programs.convert(self._volumes.account, foreign.fd, foreign.format, path, wanted)

        return await self._volumes.make(pool, task, foreign.size if wanted is Format.RAW else None, program)

    async def adopt(
        self, pool_name: str, name: str, *, source_format: str | None, probe: bool, token: str = "", by: str
    ) -> Answer:
        """Record the format of a file that somebody has put into the pool."""
        pool, volume = await self._volumes.find(pool_name, name)
        if (known := self._volumes.repeated(pool, name, token)) is not None:
            return known
        backend = pool.usable
        if not backend.files:
            raise errors.InvalidState(f"The volumes of pool {pool.name} are always raw")
        self._usage.require("import", pool.name, volume, writes=True)
        async with images.looked(volume.path, source_format, probe=probe) as foreign:
            pass  # only root can write to the pool's directory: nobody exchanges it
        if volume.meta.format is not None:
            if volume.meta.format.value == foreign.format:
                return Answer(pool.name, name)
            raise errors.Exists(f"Volume {name} is {volume.meta.format} already")
        if foreign.format not in ("raw", "qcow2"):
            raise errors.InvalidState(
                f"{name} is in {foreign.format} format, which guests aren't given",
                hint="Convert it into a new volume: "
                + do("import", "volume", pool.name, "NEW", volume.path, from_=foreign.format),
            )
        backing = await images.known_backing(self._pools, volume.path, foreign) if foreign.backing else None
        meta = Meta(Format(foreign.format), backing)
        if foreign.format == "raw":
            with self._usage.taken(pool.name, name, "import"):
                await backend.take(name)
                await backend.describe(name, meta)
            return Answer(pool.name, name)
        task = Task(
            verb="adopt",
            pool=pool.name,
            volume=name,
            by=by,
            token=token,
            meta=meta,
            writes=(key(pool.name, name),),
            undo=False,
        )
        return await self._volumes.run(pool, task, programs.check(self._volumes.account, volume.path))
