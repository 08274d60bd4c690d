# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool that is a directory: its volumes are regular files, and `.virtd` has what virtd knows of them.

    POOL/NAME              a volume, root's and readable for the guests' group (0640)
    POOL/.virtd/NAME.json  its format and backing volume
    POOL/.virtd/new/JOB    one that is being made, the guests' user's while qemu-img writes it

A volume is linked to its name when it is whole and what is known of it is on record. All files are reached from the
directory's own descriptor, one name at a time and never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from ... import errors, files
from ...hints import do
from ...model import pool as model
from ...model.domain import Format
from ...reach import Reached, make_directory, opened, reached, require_directory
from .. import qcow2
from .aside import Aside
from .backend import Capacity, Meta, Volume

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .mountpoint import MountPoint

log = logging.getLogger(__name__)

OURS = ".virtd"
NEW = "new"
MODE = 0o640
FICLONE = 0x40049409  # linux/fs.h
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Directory:
    """See Backend. `uid` and `gid`: the guests' user and group; `mountpoint`: of the file system that it
    must be on."""

    files = True

    def __init__(self, pool: model.Pool, uid: int, gid: int, mountpoint: MountPoint | None = None) -> None:
        self.pool = pool
        self._mountpoint = mountpoint
        self._uid = uid
        self._gid = gid
        self._aside = Aside(f"Pool {pool.name} ({pool.path})")

    # The pool

    async def start(self) -> None:
        if self._mountpoint is not None:
            await self._mountpoint.require()
        await self._aside(self._start)
        if self._mountpoint is not None:
            self._mountpoint.remember()

    async def stop(self) -> None:
        """Nothing to do: the directory stays."""

    async def lost(self) -> str:
        if self._mountpoint is not None and (gone := self._mountpoint.gone()):
            return gone
        try:
            await self._aside(self._look)
        except errors.VirtdError as exc:
            return exc.message
        return ""

    @property
    def mount(self) -> str:
        return ""

    async def build(self) -> bool:
        if self._mountpoint is not None:
            await self._mountpoint.require()
        return await self._aside(self._build)

    async def capacity(self) -> Capacity:
        return await self._aside(self._capacity)

    def _build(self) -> bool:
        try:
            return make_directory(self.pool.path, 0o700)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {self.pool.path}: {exc.strerror}", hint=files.hint(exc)) from exc

    def _start(self) -> None:
        with self._open() as top:
            try:
                for path in (OURS, f"{OURS}/{NEW}"):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700, dir_fd=top)
            except OSError as exc:
                raise self._refused("Cannot write to", exc) from exc

    def _look(self) -> None:
        with self._open():
            pass

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """The pool's directory, checked: a directory, and nobody's but ours."""
        path, hint = self.pool.path, do("build", "pool", self.pool.name) + " makes it."
        try:
            if os.path.islink(path):
                raise errors.HostError(f"{path} is no directory", hint="A symbolic link isn't followed.")
            with reached(path) as found:
                if found.status.st_uid == self._uid != os.geteuid():
                    # An older virtd said that it may be the guests' user's, who had /var/lib/virtd/images.
                    os.chown(found.itself, os.geteuid(), -1)
                    log.warning("%s belonged to the user of guests, and is root's now", path)
            fd = opened(path, _DIRECTORY)
        except FileNotFoundError:
            raise errors.HostError(f"There is no directory {path}", hint=hint) from None
        except NotADirectoryError:
            raise errors.HostError(f"{path} is no directory") from None
        except OSError as exc:
            raise errors.HostError(f"Cannot open {path}: {exc.strerror}") from exc
        try:
            require_directory(Reached(fd, path, os.fstat(fd)))
            yield fd
        finally:
            os.close(fd)

    def _capacity(self) -> Capacity:
        with self._open() as top:
            found = os.fstatvfs(top)
        unit = found.f_frsize
        return Capacity(found.f_blocks * unit, (found.f_blocks - found.f_bfree) * unit, found.f_bavail * unit)

    def _refused(self, doing: str, exc: OSError) -> errors.HostError:
        return errors.HostError(
            f"{doing} pool {self.pool.name} ({self.pool.path}): {exc.strerror}", hint=files.hint(exc)
        )

    # Its volumes

    async def volumes(self) -> dict[str, Volume]:
        return await self._aside(self._volumes)

    async def volume(self, name: str) -> Volume:
        model.check_volume(name)
        return await self._aside(lambda: self._volume(name))

    def _volumes(self) -> dict[str, Volume]:
        with self._open() as top:
            found = {}
            for name in sorted(filter(model.is_volume, os.listdir(top))):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                        found[name] = self._read(top, name)
        return found

    def _volume(self, name: str) -> Volume:
        with self._open() as top:
            try:
                status = os.stat(name, dir_fd=top, follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    raise errors.InvalidState(
                        f"{self.pool.path}/{name} is a symbolic link, which could lead out of the pool",
                        hint="Put the file itself there.",
                    )
                if not stat.S_ISREG(status.st_mode):
                    raise errors.InvalidState(f"{self.pool.path}/{name} is no regular file")
                return self._read(top, name)
            except FileNotFoundError:
                raise errors.NotFound(
                    f"There is no volume {name} in pool {self.pool.name}",
                    hint=do("list", "volume", self.pool.name) + " shows all.",
                ) from None
            except OSError as exc:
                raise self._refused(f"Cannot read {name} of", exc) from exc

    def _read(self, top: int, name: str) -> Volume:
        meta, trouble = self._meta(top, name)
        with _opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, top) as fd:
            status = os.fstat(fd)
            capacity: int | None = status.st_size
            if meta.format is Format.QCOW2:
                try:
                    header = qcow2.read(fd, name)
                    capacity = header.size
                    trouble = trouble or qcow2.unusable(header)
                except errors.VirtdError as exc:
                    capacity, trouble = None, exc.message
        return Volume(
            name=name,
            path=f"{self.pool.path}/{name}",
            meta=meta,
            capacity=capacity,
            allocation=status.st_blocks * 512,
            identity=(status.st_dev, status.st_ino),
            trouble=meta.damaged or trouble,
        )

    def _meta(self, top: int, name: str) -> tuple[Meta, str]:
        """What is on record of a volume, and what is wrong with that."""
        try:
            with _opened(f"{OURS}/{name}.json", os.O_RDONLY | os.O_NOFOLLOW, top) as fd:
                return msgspec.json.decode(os.read(fd, 1 << 16), type=Meta), ""
        except FileNotFoundError:
            return Meta(), ""
        except (OSError, msgspec.MsgspecError) as exc:
            return Meta(), f"{self.pool.path}/{OURS}/{name}.json can't be read: {exc}"

    # Making one

    async def begin(self, job: str, name: str, size: int | None, *, allocate: bool = False) -> str:
        model.check_volume(name)
        await self._aside(lambda: self._begin(job, size, allocate=allocate), limit=None if allocate else 60)
        return self.begun(job, name)

    def begun(self, job: str, _name: str) -> str:
        return f"{self.pool.path}/{OURS}/{NEW}/{job}"

    def _begin(self, job: str, size: int | None, *, allocate: bool) -> None:
        with self._open() as top:
            path = f"{OURS}/{NEW}/{job}"
            try:
                with _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, top) as fd:
                    os.fchmod(fd, 0o600)
                    os.fchown(fd, self._uid, self._gid)
                    if size is not None:
                        os.ftruncate(fd, size)
                        if allocate:
                            os.posix_fallocate(fd, 0, size)
            except OSError as exc:
                with contextlib.suppress(OSError):
                    os.unlink(path, dir_fd=top)
                if exc.errno == errno.EFBIG:
                    raise errors.InvalidDefinition(
                        "volume", "size", f"expected what the file system of {self.pool.path} can hold in one file"
                    ) from exc
                raise self._refused("Cannot make a volume in", exc) from exc

    async def reflink(self, source: Volume, job: str) -> bool:
        return await self._aside(lambda: self._reflink(source.path, f"{OURS}/{NEW}/{job}"), limit=600)

    def _reflink(self, source: str, target: str) -> bool:
        with (
            self._open() as top,
            _reopened(source) as old,
            _opened(target, os.O_RDWR | os.O_NOFOLLOW, top) as new,
        ):
            try:
                fcntl.ioctl(new, FICLONE, old)
            except OSError as exc:
                if exc.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
                    return False
                raise self._refused("Cannot clone in", exc) from exc
        return True

    async def commit(self, job: str, name: str, meta: Meta) -> None:
        model.check_volume(name)
        await self._aside(lambda: self._commit(job, name, meta), limit=None)

    def _commit(self, job: str, name: str, meta: Meta) -> None:
        new = f"{OURS}/{NEW}/{job}"
        with self._open() as top:
            try:
                with _opened(new, os.O_RDWR | os.O_NOFOLLOW, top) as fd:
                    os.fsync(fd)
                    os.fchown(fd, os.geteuid(), self._gid)
                    os.fchmod(fd, MODE)
            except FileNotFoundError:
                if self._meta(top, name)[0].job == job and _exists(name, top):
                    return  # a daemon that was killed had come as far as this
                raise errors.HostError(f"What was to become volume {name} has gone") from None
            except OSError as exc:
                raise self._refused(f"Cannot finish {name} in", exc) from exc
            if _exists(name, top) and not _same(new, name, top):
                raise self._exists(name)
            with _opened(new, os.O_RDONLY | os.O_NOFOLLOW, top) as fd:
                _check(fd, name, meta)
            self._write_meta(name, meta)
            try:
                # link(2) and not rename(2): it never takes the place of a file that came there meanwhile.
                with contextlib.suppress(FileExistsError):
                    os.link(new, name, src_dir_fd=top, dst_dir_fd=top, follow_symlinks=False)
                if not _same(new, name, top):
                    raise self._exists(name)
                os.unlink(new, dir_fd=top)
                os.fsync(top)
            except OSError as exc:
                raise self._refused(f"Cannot finish {name} in", exc) from exc

    def _exists(self, name: str) -> errors.Exists:
        return errors.Exists(
            f"There is a volume {name} in pool {self.pool.name} already",
            hint=do("info", "volume", self.pool.name, name),
        )

    async def free(self, name: str) -> None:
        """Raise Exists when the name is taken, by whatever there is in the directory."""
        model.check_volume(name)

        def look() -> None:
            with self._open() as top:
                if _exists(name, top):
                    raise self._exists(name)

        await self._aside(look)

    async def discard(self, job: str, name: str) -> None:
        await self._aside(lambda: self._discard(job), limit=None)

    def _discard(self, job: str) -> None:
        with self._open() as top, contextlib.suppress(FileNotFoundError):
            os.unlink(f"{OURS}/{NEW}/{job}", dir_fd=top)

    async def stale(self, jobs: Collection[str]) -> list[str]:
        kept = frozenset(jobs)
        return await self._aside(lambda: self._stale(kept))

    async def sweep(self, jobs: Collection[str]) -> list[str]:
        kept = frozenset(jobs)
        return await self._aside(lambda: self._sweep(kept), limit=None)

    def _stale(self, jobs: frozenset[str]) -> list[str]:
        """What `sweep` would remove, below the pool's directory."""
        with self._open() as top:
            found = [f"{OURS}/{NEW}/{entry}" for entry in _listed(f"{OURS}/{NEW}", top) if entry not in jobs]
            for entry in _listed(OURS, top):
                name = entry.removesuffix(".json")
                if name != entry and not _exists(name, top) and self._meta(top, name)[0].job not in jobs:
                    found.append(f"{OURS}/{entry}")
        return found

    def _sweep(self, jobs: frozenset[str]) -> list[str]:
        removed = []
        with self._open() as top:
            for path in self._stale(jobs):
                with contextlib.suppress(OSError):
                    os.unlink(path, dir_fd=top)
                    removed.append(path.rpartition("/")[2])
        return removed

    # Changing one

    async def grow(self, volume: Volume, size: int) -> None:
        def work() -> None:
            try:
                with self._open() as top, _opened(volume.name, os.O_WRONLY | os.O_NOFOLLOW, top) as fd:
                    os.ftruncate(fd, size)
                    os.fsync(fd)
            except OSError as exc:
                raise self._refused(f"Cannot resize {volume.name} in", exc) from exc

        await self._aside(work, limit=60)

    async def describe(self, name: str, meta: Meta) -> None:
        await self._aside(lambda: self._write_meta(name, meta))

    async def lend(self, volume: Volume) -> None:
        await self._aside(lambda: self._own(volume.name, self._uid))

    async def take(self, name: str) -> None:
        await self._aside(lambda: self._own(name, os.geteuid()))

    def _own(self, name: str, uid: int) -> None:
        try:
            with self._open() as top, _opened(name, os.O_RDONLY | os.O_NOFOLLOW, top) as fd:
                os.fchown(fd, uid, self._gid)
                os.fchmod(fd, MODE)
        except OSError as exc:
            raise self._refused(f"Cannot change the owner of {name} in", exc) from exc

    def _write_meta(self, name: str, meta: Meta) -> None:
        files.write(f"{self.pool.path}/{OURS}/{name}.json", msgspec.json.encode(meta) + b"\n", mode=0o600)

    async def delete(self, volume: Volume) -> None:
        def work() -> None:
            with self._open() as top:
                try:
                    # In this order: what is known of it goes when nobody can take another file for it any more.
                    for path in (volume.name, f"{OURS}/{volume.name}.json"):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(path, dir_fd=top)
                    os.fsync(top)
                except OSError as exc:
                    raise self._refused(f"Cannot delete {volume.name} from", exc) from exc

        await self._aside(work, limit=600)

    async def header(self, volume: Volume) -> qcow2.Header:
        """The header of a qcow2 volume with its snapshots. Raises InvalidState."""

        def work() -> qcow2.Header:
            with _reopened(volume.path) as fd:
                return qcow2.read(fd, volume.name, snapshots=True)

        return await self._aside(work)


@contextlib.contextmanager
def _opened(path: str, flags: int, top: int | None = None) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=top)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _reopened(path: str) -> Iterator[int]:
    """A volume of any pool, to be read."""
    fd = opened(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _check(fd: int, name: str, meta: Meta) -> None:
    """Raise InvalidState when a new volume isn't what is to be put on record of it.

    What it was made of may have been written to since it was looked at.
    """
    if meta.format is Format.QCOW2:
        header = qcow2.read(fd, name)
        if wrong := qcow2.unusable(header):
            raise errors.InvalidState(f"{name} can't be used: {wrong}")
        if bool(header.backing) != (meta.backing is not None):
            raise errors.InvalidState(f"{name} can't be used: it was changed while it was made")


def _exists(name: str, top: int) -> bool:
    try:
        os.stat(name, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _same(one: str, other: str, top: int) -> bool:
    a, b = (os.stat(path, dir_fd=top, follow_symlinks=False) for path in (one, other))
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _listed(path: str, top: int) -> list[str]:
    try:
        with _opened(path, _DIRECTORY | os.O_NOFOLLOW, top) as fd:
            return sorted(os.listdir(fd))
    except FileNotFoundError:
        return []
