# SPDX-License-Identifier: LGPL-2.1-or-later
"""The volumes of a directory pool that are being made. Everything here may block: see aside.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from ... import errors
from ...model.drives import Format
from ...reach import opened
from .. import qcow2
from .entries import MODE
from .place import NEW, OURS, exists, listed, opened_at, same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .backend import Meta
    from .entries import Entries
    from .place import Place

FICLONE = 0x40049409  # linux/fs.h


def path_of(job: str) -> str:
    """Where a job's volume is made, below the pool's directory."""
    return f"{NEW}/{job}"


class Unfinished:
    """Volumes that are begun in `place`, and become ones of its `entries`."""

    def __init__(self, place: Place, entries: Entries) -> None:
        self._place = place
        self._entries = entries

    def begin(self, job: str, size: int | None, *, allocate: bool) -> None:
        """Make the file that a job fills. Raises HostError, or InvalidDefinition for a size that no file can have."""
        place, path = self._place, path_of(job)
        with place.open() as top:
            try:
                with opened_at(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, top) as fd:
                    os.fchmod(fd, 0o600)
                    os.fchown(fd, place.uid, place.gid)
                    if size is not None:
                        os.ftruncate(fd, size)
                        if allocate:
                            os.posix_fallocate(fd, 0, size)
            except OSError as exc:
                with contextlib.suppress(OSError):
                    os.unlink(path, dir_fd=top)
                if exc.errno == errno.EFBIG:
                    raise errors.InvalidDefinition(
                        "volume", "size", f"expected what the file system of {place.path} can hold in one file"
                    ) from exc
                raise place.refused("Cannot make a volume in", exc) from exc

    def reflink(self, source: str, job: str) -> bool:
        """Share the blocks of file `source`; False where that isn't possible."""
        with (
            self._place.open() as top,
            reopened(source) as old,
            opened_at(path_of(job), os.O_RDWR, top) as new,
        ):
            try:
                fcntl.ioctl(new, FICLONE, old)
            except OSError as exc:
                if exc.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
                    return False
                raise self._place.refused("Cannot clone in", exc) from exc
        return True

    def commit(self, job: str, name: str, meta: Meta) -> None:
        """See Backend. Raises Exists, InvalidState or HostError."""
        new, place, entries = path_of(job), self._place, self._entries
        with place.open() as top:
            try:
                with opened_at(new, os.O_RDWR, top) as fd:
                    os.fsync(fd)
                    os.fchown(fd, os.geteuid(), place.gid)
                    os.fchmod(fd, MODE)
            except FileNotFoundError:
                if entries.meta(top, name)[0].job == job and exists(name, top):
                    return  # a daemon that was killed had come as far as this
                raise errors.HostError(f"The unfinished volume {name} has disappeared") from None
            except OSError as exc:
                raise place.refused(f"Cannot finish {name} in", exc) from exc
            if exists(name, top) and not same(new, name, top):
                raise entries.taken(name)
            with opened_at(new, os.O_RDONLY, top) as fd:
                _check(fd, name, meta)
            entries.describe(name, meta)
            try:
                # link(2) and not rename(2): it never replaces a file that was put there meanwhile.
                with contextlib.suppress(FileExistsError):
                    os.link(new, name, src_dir_fd=top, dst_dir_fd=top, follow_symlinks=False)
                if not same(new, name, top):
                    raise entries.taken(name)
                os.unlink(new, dir_fd=top)
                os.fsync(top)
            except OSError as exc:
                raise place.refused(f"Cannot finish {name} in", exc) from exc

    def discard(self, job: str) -> None:
        """Idempotent."""
        with self._place.open() as top, contextlib.suppress(FileNotFoundError):
            os.unlink(path_of(job), dir_fd=top)

    def stale(self, jobs: frozenset[str]) -> list[str]:
        """What `sweep` would remove, below the pool's directory: files and records that belong to none of `jobs`."""
        with self._place.open() as top:
            found = [path_of(entry) for entry in listed(NEW, top) if entry not in jobs]
            for entry in listed(OURS, top):
                name = entry.removesuffix(".json")
                if name != entry and not exists(name, top) and self._entries.meta(top, name)[0].job not in jobs:
                    found.append(f"{OURS}/{entry}")
        return found

    def sweep(self, jobs: frozenset[str]) -> list[str]:
        """Remove what is stale: its names."""
        removed = []
        with self._place.open() as top:
            for path in self.stale(jobs):
                with contextlib.suppress(OSError):
                    os.unlink(path, dir_fd=top)
                    removed.append(path.rpartition("/")[2])
        return removed


@contextlib.contextmanager
def reopened(path: str) -> Iterator[int]:
    """A volume of any pool, to be read."""
    fd = opened(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _check(fd: int, name: str, meta: Meta) -> None:
    """Raise InvalidState when a new volume isn't what its record is about to say.

    What it was made of may have been written to since it was looked at.
    """
    if meta.format is Format.QCOW2:
        header = qcow2.read(fd, name)
        if wrong := qcow2.unusable(header):
            raise errors.InvalidState(f"{name} can't be used: {wrong}")
        if bool(header.backing) != (meta.backing is not None):
            raise errors.InvalidState(f"{name} can't be used: it was changed while it was made")
