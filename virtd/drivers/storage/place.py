# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory that a pool is in, and the files in it. Everything here may block: see aside.py.

All files are reached from the directory's own descriptor, one name at a time and never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from ... import errors, files
from ...hints import do
from ...reach import Reached, make_directory, opened, reached, require_directory
from .backend import Capacity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...model.pool import Pool

log = logging.getLogger(__name__)

OURS = ".virtd"
NEW = f"{OURS}/new"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Place:
    """One pool's directory. `uid` and `gid`: the guests' user and group."""

    def __init__(self, pool: Pool, uid: int, gid: int) -> None:
        self.pool = pool
        self.path = pool.path
        self.uid = uid
        self.gid = gid

    def build(self) -> bool:
        """Make the directory; False if it exists. Raises HostError."""
        try:
            return make_directory(self.path, 0o700)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {self.path}: {exc.strerror}", hint=files.hint(exc)) from exc

    def prepare(self) -> None:
        """Make our own directories in it. Idempotent. Raises HostError."""
        with self.open() as top:
            try:
                for path in (OURS, NEW):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700, dir_fd=top)
            except OSError as exc:
                raise self.refused("Cannot write to", exc) from exc

    def look(self) -> None:
        """Raise HostError if the pool's directory can't be used."""
        with self.open():
            pass

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """The pool's directory, checked: it is a directory, and belongs to our own user. Raises HostError."""
        path, hint = self.path, do("build", "pool", self.pool.name) + " makes it."
        try:
            if os.path.islink(path):
                raise errors.HostError(f"{path} is no directory", hint="A symbolic link isn't followed.")
            with reached(path) as found:
                if found.status.st_uid == self.uid != os.geteuid():
                    # Earlier versions let the guests' user own it, as it did /var/lib/virtd/images.
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

    def capacity(self) -> Capacity:
        """How large the file system is, and how full."""
        with self.open() as top:
            found = os.fstatvfs(top)
        unit = found.f_frsize
        return Capacity(found.f_blocks * unit, (found.f_blocks - found.f_bfree) * unit, found.f_bavail * unit)

    def refused(self, doing: str, exc: OSError) -> errors.HostError:
        """The error for what the file system refused; `doing` is as in "Cannot write to"."""
        return errors.HostError(f"{doing} pool {self.pool.name} ({self.path}): {exc.strerror}", hint=files.hint(exc))


# Files in an open directory `top`


@contextlib.contextmanager
def opened_at(path: str, flags: int, top: int) -> Iterator[int]:
    """Open `path` below `top`; a symbolic link as its last part is refused."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=top)
    try:
        yield fd
    finally:
        os.close(fd)


def exists(name: str, top: int) -> bool:
    try:
        os.stat(name, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def same(one: str, other: str, top: int) -> bool:
    """Whether both names are links to one file."""
    a, b = (os.stat(path, dir_fd=top, follow_symlinks=False) for path in (one, other))
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def listed(path: str, top: int) -> list[str]:
    """The names in a directory below `top`, sorted; none if it doesn't exist."""
    try:
        with opened_at(path, _DIRECTORY, top) as fd:
            return sorted(os.listdir(fd))
    except FileNotFoundError:
        return []
