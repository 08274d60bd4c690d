# SPDX-License-Identifier: LGPL-2.1-or-later
"""The finished volumes of a directory pool, each with its record. Everything here may block: see aside.py."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from ... import errors, files
from ...hints import do
from ...model import pool as model
from ...model.drives import Format
from .. import qcow2
from .backend import Meta, Volume
from .place import OURS, exists, opened_at

if TYPE_CHECKING:
    from .place import Place

MODE = 0o640


def record(name: str) -> str:
    """Where a volume's record is, below the pool's directory."""
    return f"{OURS}/{name}.json"


class Entries:
    """The volumes in `place`."""

    def __init__(self, place: Place) -> None:
        self._place = place

    # Reading

    def all(self) -> dict[str, Volume]:
        """All of them, by name. A file that disappears meanwhile is left out."""
        with self._place.open() as top:
            found = {}
            for name in sorted(filter(model.is_volume, os.listdir(top))):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                        found[name] = self._read(top, name)
        return found

    def one(self, name: str) -> Volume:
        """Raises NotFound, or InvalidState for what isn't a regular file."""
        path, pool = f"{self._place.path}/{name}", self._place.pool.name
        with self._place.open() as top:
            try:
                status = os.stat(name, dir_fd=top, follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    raise errors.InvalidState(
                        f"{path} is a symbolic link, which could lead out of the pool",
                        hint="Put the file itself there.",
                    )
                if not stat.S_ISREG(status.st_mode):
                    raise errors.InvalidState(f"{path} is no regular file")
                return self._read(top, name)
            except FileNotFoundError:
                raise errors.NotFound(
                    f"There is no volume {name} in pool {pool}", hint=do("list", "volume", pool) + " shows all."
                ) from None
            except OSError as exc:
                raise self._place.refused(f"Cannot read {name} of", exc) from exc

    def _read(self, top: int, name: str) -> Volume:
        meta, trouble = self.meta(top, name)
        with opened_at(name, os.O_RDONLY | os.O_NONBLOCK, top) as fd:
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
            path=f"{self._place.path}/{name}",
            meta=meta,
            capacity=capacity,
            allocation=status.st_blocks * 512,
            identity=(status.st_dev, status.st_ino),
            trouble=meta.damaged or trouble,
        )

    def meta(self, top: int, name: str) -> tuple[Meta, str]:
        """A volume's record, and what is wrong with it, or ""."""
        try:
            with opened_at(record(name), os.O_RDONLY, top) as fd:
                return msgspec.json.decode(os.read(fd, 1 << 16), type=Meta), ""
        except FileNotFoundError:
            return Meta(), ""
        except (OSError, msgspec.MsgspecError) as exc:
            return Meta(), f"{self._place.path}/{record(name)} can't be read: {exc}"

    def require_free(self, name: str) -> None:
        """Raise Exists if the name is taken, by anything in the directory."""
        with self._place.open() as top:
            if exists(name, top):
                raise self.taken(name)

    def taken(self, name: str) -> errors.Exists:
        pool = self._place.pool.name
        return errors.Exists(
            f"There is a volume {name} in pool {pool} already", hint=do("info", "volume", pool, name)
        )

    # Changing

    def describe(self, name: str, meta: Meta) -> None:
        """Write a volume's record."""
        files.write(f"{self._place.path}/{record(name)}", msgspec.json.encode(meta) + b"\n", mode=0o600)

    def own(self, name: str, uid: int) -> None:
        """Give the volume to a user; the group is the guests' in any case."""
        try:
            with self._place.open() as top, opened_at(name, os.O_RDONLY, top) as fd:
                os.fchown(fd, uid, self._place.gid)
                os.fchmod(fd, MODE)
        except OSError as exc:
            raise self._place.refused(f"Cannot change the owner of {name} in", exc) from exc

    def resize(self, name: str, size: int) -> None:
        """Change the size of a raw volume."""
        try:
            with self._place.open() as top, opened_at(name, os.O_WRONLY, top) as fd:
                os.ftruncate(fd, size)
                os.fsync(fd)
        except OSError as exc:
            raise self._place.refused(f"Cannot resize {name} in", exc) from exc

    def delete(self, name: str) -> None:
        """Idempotent."""
        with self._place.open() as top:
            try:
                # The record goes last: until then no other file can be taken for this volume.
                for path in (name, record(name)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path, dir_fd=top)
                os.fsync(top)
            except OSError as exc:
                raise self._place.refused(f"Cannot delete {name} from", exc) from exc
