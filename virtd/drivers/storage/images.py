# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that virtd knows nothing about yet: others' files, and uploads."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ... import errors
from ...hints import option
from ...model.drives import Format
from ...reach import Trust, opened, reached
from .. import qcow2
from .aside import Aside
from .backend import Meta
from .chains import Link, require_format

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .backend import Backend, Backing, Volume
    from .pools import Pools
    from .task import Task

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")


class Foreign(NamedTuple):
    """An image that virtd knows nothing about yet, open as `fd`.

    `size`: what a guest would see, in bytes, if known; `backing`: the backing file that its header names, or "".
    """

    fd: int
    path: str
    format: str
    identity: tuple[int, int]
    size: int | None
    backing: str = ""


@contextlib.asynccontextmanager
async def looked(file: str, told_format: str | None, *, probe: bool) -> AsyncIterator[Foreign]:
    """Open an image, and check that it can be in the format that it is said to have. It is probed only if `probe`.

    Its owner may be able to exchange the file, so use the descriptor and not the path afterwards.
    """
    if not file.startswith("/"):
        raise errors.InvalidDefinition("image", "file", f"expected an absolute path, got {file}")
    if told_format is not None and told_format not in FORMATS:
        raise errors.InvalidDefinition("image", "from", f"expected one of {', '.join(FORMATS)}, got {told_format}")
    if told_format is None and not probe:
        raise errors.InvalidDefinition(
            "image",
            "from",
            f"expected the format of {file}",
            hint="Say it with "
            + option("from")
            + ", or have it probed with "
            + option("probe")
            + ". A guest that wrote a header into its raw disk could then have it taken for another format.",
        )
    foreign = await Aside(file)(lambda: _look(file, told_format, file))
    try:
        yield foreign
    finally:
        os.close(foreign.fd)


def _look(file: str, told_format: str | None, name: str) -> Foreign:
    """`name` is for errors. The caller closes the descriptor."""
    try:
        with reached(file, Trust.OWNER) as found:
            if not stat.S_ISREG(found.status.st_mode):
                raise errors.InvalidState(f"{name} is no regular file")
            fd, path = os.open(found.itself, os.O_RDONLY | os.O_CLOEXEC), found.path
    except OSError as exc:
        raise errors.HostError(f"Cannot read {name}: {exc.strerror}") from exc
    try:
        status = os.fstat(fd)
        looks = told_format or qcow2.probe(fd)
        identity = (status.st_dev, status.st_ino)
        if looks != "qcow2":
            return Foreign(fd, path, looks, identity, status.st_size if looks == "raw" else None)
        header = qcow2.read(fd, name)
        if wrong := qcow2.unusable(header):
            raise errors.InvalidState(f"{name} can't be imported: {wrong}")
        return Foreign(fd, path, looks, identity, header.size, header.backing)
    except BaseException:
        os.close(fd)
        raise


def native(found: str) -> Format:
    """The format that an image of format `found` gets by default."""
    return Format.RAW if found == "raw" else Format.QCOW2


async def known_backing(pools: Pools, file: str, foreign: Foreign) -> Backing:
    """The volume that a foreign image is based on. Raises InvalidState if it isn't a volume."""
    path = os.path.normpath(os.path.join(os.path.dirname(foreign.path), foreign.backing))
    for pool in pools.active:
        if os.path.dirname(path) != pool.present.path:
            continue
        volume = await pool.backend.volume(os.path.basename(path))
        require_format([Link(pool, volume)])
        return Link(pool, volume).backing
    raise errors.InvalidState(
        f"{file} has a backing file outside any pool: {foreign.backing}",
        hint=f"Import that first, or make one image of both: qemu-img convert -O qcow2 {file} NEW.",
    )


# What clients write and read


async def open_begun(backend: Backend, job: str, name: str) -> tuple[int, int]:
    """A descriptor to write an unfinished volume with, and how many bytes it has. Raises NotFound."""
    path = backend.begun(job, name)

    def work() -> tuple[int, int]:
        fd = opened(path, os.O_RDWR)
        status = os.fstat(fd)
        return fd, status.st_size if stat.S_ISREG(status.st_mode) else 0

    try:
        return await Aside(path)(work)
    except FileNotFoundError:
        raise errors.NotFound(f"The unfinished volume {name} has disappeared") from None
    except OSError as exc:
        raise errors.HostError(f"Cannot open the unfinished volume {name}: {exc.strerror}") from exc


async def open_whole(backend: Backend, volume: Volume) -> int:
    path = volume.path

    def work() -> int:
        return opened(path, os.O_RDONLY)

    try:
        return await Aside(path)(work)
    except OSError as exc:
        raise errors.HostError(f"Cannot open {path}: {exc.strerror}") from exc


async def received(pools: Pools, backend: Backend, job: str, task: Task) -> tuple[Meta, str]:
    """The record and the path of a complete upload. Raises InvalidState if it isn't what it was said to be."""
    meta = task.meta or Meta()
    path = backend.begun(job, task.volume)
    if path.startswith("/dev/"):
        return meta, path
    wanted = str(meta.format)
    foreign = await Aside(path)(lambda: _look(path, wanted, task.volume))
    os.close(foreign.fd)
    if foreign.size == 0:
        raise errors.InvalidState("Nothing was uploaded")
    if meta.format is Format.RAW:
        return meta, path
    backing = None
    if foreign.backing:
        # A relative name is relative to where the image will be.
        final = foreign._replace(path=f"{os.path.dirname(os.path.dirname(os.path.dirname(path)))}/{task.volume}")
        backing = await known_backing(pools, task.volume, final)
    return msgspec.structs.replace(meta, backing=backing), path
