# SPDX-License-Identifier: LGPL-2.1-or-later
"""How volumes come about: created empty, cloned, imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import errors
from ...model import pool as model
from ...model.domain import Format
from . import images, programs
from .backend import Meta
from .directory import Directory
from .job import Task
from .usage import Answer, Usage, called, key

if TYPE_CHECKING:
    from .job import Program
    from .pool import StoragePool


class Making(Usage):
    """See volumes.Volumes."""

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
        pool, known = await self._begin_call(pool_name, name, token)
        if known is not None:
            return known
        wanted = model.volume_format(format) if format else Format.QCOW2 if backing else Format.RAW
        allocate = model.preallocation(preallocation)
        self._check_format(pool, wanted)
        chain: list[images.Link] = []
        if backing is not None:
            if wanted is not Format.QCOW2:
                raise errors.InvalidDefinition("volume", "backing", 'expected format = "qcow2" with a backing volume')
            base_pool, base = await self.find(*backing)
            chain = await images.chain(self._driver, base_pool, base)
            images.require_format(chain)
            self.require("use", base_pool.name, base, writes=False)
            size = size if size is not None else base.capacity
        if size is None:
            raise errors.InvalidDefinition("volume", "size", "expected a size, since there is no backing volume")
        number = model.volume_size(size)
        await self._check_room(pool, number, everything=allocate in ("falloc", "full"))
        if wanted is Format.RAW and allocate is model.Preallocation.METADATA:
            raise errors.InvalidDefinition("volume", "preallocation", 'expected "off", "falloc" or "full" for raw')
        meta = Meta(wanted, chain[0].backing if chain else None, token=token)
        logical = pool.present.type is model.Type.LOGICAL  # which has all of its space from the start
        full = allocate is model.Preallocation.FULL
        quick = wanted is Format.RAW and (allocate is model.Preallocation.OFF or (logical and not full))
        reads = tuple(link.key for link in chain)
        task = Task(verb="create", pool=pool.name, volume=name, by=by, token=token, meta=meta, reads=reads)

        def program(path: str) -> Program:
            if logical:
                return programs.wipe(self._account, path, number, wanted, None)
            below = chain[0].pair if chain else None
            return programs.create(self._account, path, number, allocate, wanted, below)

        return await self._make(pool, task, number if wanted is Format.RAW else None, None if quick else program)

    async def clone(
        self, pool_name: str, source: str, name: str, *, to_pool: str | None = None, token: str = "", by: str
    ) -> Answer:
        target, known = await self._begin_call(to_pool or pool_name, name, token)
        if known is not None:
            return known
        pool, volume = await self.find(pool_name, source)
        chain = await images.chain(self._driver, pool, volume)
        images.require_format(chain)
        self.require("clone", pool.name, volume, writes=False)
        assert volume.meta.format is not None
        self._check_format(target, volume.meta.format)
        await self._check_room(target, volume.allocation, everything=False)
        meta = Meta(volume.meta.format, volume.meta.backing, token=token)
        task = Task(
            verb="clone",
            pool=target.name,
            volume=name,
            by=by,
            token=token,
            meta=meta,
            reads=tuple(link.key for link in chain),
        )
        raw_size = volume.capacity if volume.meta.format is Format.RAW else None

        async def reflink(job: str) -> bool:
            old, new = pool.backend, target.backend
            return isinstance(old, Directory) and isinstance(new, Directory) and await new.reflink(volume, job)

        return await self._make(
            target, task, raw_size, lambda path: programs.copy(self._account, volume.path, path), shortcut=reflink
        )

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
        """Make a volume of an image that is anywhere on the host."""
        pool, known = await self._begin_call(pool_name, name, token)
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
        self._check_format(pool, wanted)
        for user, writes in self.users().get(foreign.identity, ()):
            if writes:
                raise errors.Busy(
                    f"Cannot import {file}: {called(user)} writes to it", hint=f"Stop {called(user)} first."
                )
        backing = await images.known_backing(self._driver, file, foreign) if foreign.backing else None
        if backing is not None and (wanted is not Format.QCOW2 or foreign.format != "qcow2"):
            raise errors.InvalidState(f"Cannot convert {file}: it stands on {foreign.backing}")
        await self._check_room(pool, foreign.size or 0, everything=False)
        meta = Meta(wanted, backing, token=token)
        task = Task(verb="import", pool=pool.name, volume=name, by=by, token=token, meta=meta)

        def program(path: str) -> Program:
            if foreign.format == wanted.value:
                return programs.copy(self._account, foreign.fd, path, check=wanted is Format.QCOW2)
            return programs.convert(self._account, foreign.fd, foreign.format, path, wanted)

        return await self._make(pool, task, foreign.size if wanted is Format.RAW else None, program)

    async def adopt(
        self, pool_name: str, name: str, *, source_format: str | None, probe: bool, token: str = "", by: str
    ) -> Answer:
        """Say what a file is that somebody put into the pool."""
        pool, volume = await self.find(pool_name, name)
        if (begun := self._begun(token)) is not None:
            return Answer(pool.name, name, begun.name)
        backend = pool.usable
        if not isinstance(backend, Directory):
            raise errors.InvalidState(f"The volumes of pool {pool.name} are always raw")
        self.require("import", pool.name, volume, writes=True)
        async with images.looked(volume.path, source_format, probe=probe) as foreign:
            pass  # the pool's directory is root's: nobody exchanges it
        if volume.meta.format is not None:
            if volume.meta.format.value == foreign.format:
                return Answer(pool.name, name)
            raise errors.Exists(f"Volume {name} is {volume.meta.format} already")
        if foreign.format not in ("raw", "qcow2"):
            raise errors.InvalidState(
                f"{name} is in {foreign.format} format, which guests aren't given",
                hint="Convert it into a new volume: "
                f"virtctl volume import {pool.name} NEW {volume.path} --from {foreign.format}",
            )
        backing = await images.known_backing(self._driver, volume.path, foreign) if foreign.backing else None
        meta = Meta(Format(foreign.format), backing)
        if foreign.format == "raw":
            with self._hand_on(pool.name, name, "import"):
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
        return await self._run(pool, task, programs.check(self._account, volume.path))
