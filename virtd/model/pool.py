# SPDX-License-Identifier: LGPL-2.1-or-later
"""A storage pool as a person defines it, and the names and sizes of volumes; nothing here looks at the host."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from .. import errors
from . import document, naming, size
from .document import shown
from .drives import Format
from .naming import VOLUME

if TYPE_CHECKING:
    from collections.abc import Callable

LOGICAL = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,126}"
GROUP = r"/dev/[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,126}"
SIZE_MAX = 1 << 62  # an off_t has 63 bits, and QEMU rounds up to clusters
# How the names of jobs begin, which share records, slots and units with pools.
JOB = "job-"

FILE_SYSTEM = r"[a-z0-9][a-z0-9._-]{0,31}"
NFS = frozenset({"nfs", "nfs4"})


class Type(StrEnum):
    """What a pool is made of."""

    DIRECTORY = "directory"
    FILESYSTEM = "filesystem"
    LOGICAL = "logical"


class Preallocation(StrEnum):
    """How much of a new volume's space is allocated from the start, in qemu-img(1)'s terms."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A pool's definition."""

    name: str
    path: str
    type: Type = Type.DIRECTORY
    uuid: str | None = None
    autostart: bool = False
    source: str | None = None
    fstype: str | None = None
    options: str = ""


def parse(text: str, source: str) -> Pool:
    """The definition that `text` (TOML) holds. Raises InvalidDefinition; `source` is the file's name in it."""
    pool = document.decode(text, source, Pool)
    check(pool, source)
    return naming.canonical(pool, pool.uuid)


def check(pool: Pool, source: str) -> None:
    """Everything that a type can't say. Raises InvalidDefinition at the first thing that is wrong."""

    def refuse(key: str, expected: str, hint: str = "") -> errors.InvalidDefinition:
        return errors.InvalidDefinition(source, key, expected, hint=hint)

    naming.check(pool, refuse, ())
    if pool.name.startswith(JOB):
        raise refuse("name", f'expected a name that doesn\'t begin with "{JOB}", got {shown(pool.name)}')
    if not _is_path(pool.path):
        raise refuse("path", f"expected an absolute path without '.', '..' or '//', got {shown(pool.path)}")
    if pool.type is not Type.FILESYSTEM:
        for key in ("source", "fstype", "options"):
            if getattr(pool, key):
                raise refuse(key, f'expected this key with type = "filesystem" only, not with "{pool.type}"')
    match pool.type:
        case Type.DIRECTORY if pool.path == "/":
            raise refuse("path", 'expected a directory of its own, got "/"')
        case Type.LOGICAL if not re.fullmatch(GROUP, pool.path):
            raise refuse("path", f'expected a volume group\'s directory such as "/dev/vg0", got {shown(pool.path)}')
        case Type.FILESYSTEM:
            _check_source(pool, refuse)
        case _:
            pass


def _check_source(pool: Pool, refuse: Callable[[str, str], errors.InvalidDefinition]) -> None:
    """Check what to mount, and how."""
    if pool.source is None:
        raise refuse(
            "source", 'expected what to mount: a device such as "/dev/vdb1" or an export such as "nas:/data"'
        )
    if pool.path.count("/") < 2 or pool.path.startswith(("/dev/", "/proc/", "/sys/", "/run/systemd/")):
        raise refuse("path", f"expected a directory to mount at, two levels deep at least, got {shown(pool.path)}")
    device = _is_path(pool.source) and pool.source.startswith("/dev/")
    export = re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):/[^\s\0]*", pool.source) is not None
    if not device and not export:
        raise refuse(
            "source",
            f'expected a device such as "/dev/vdb1" or an NFS export such as "nas:/data", got {shown(pool.source)}',
        )
    if re.search(r"[\\\s]$", pool.source):
        # It ends a line in one of systemd's files, where a backslash would continue the line.
        raise refuse(
            "source", f"expected a name that ends in neither a backslash nor a space, got {shown(pool.source)}"
        )
    if pool.fstype is not None and not re.fullmatch(FILE_SYSTEM, pool.fstype):
        raise refuse("fstype", f'expected a file system\'s name such as "ext4", got {shown(pool.fstype)}')
    if export and pool.fstype is not None and pool.fstype not in NFS:
        raise refuse("fstype", f'expected "nfs" or "nfs4" for {shown(pool.source)}, got {shown(pool.fstype)}')
    if device and pool.fstype in NFS:
        raise refuse("source", f'expected an export such as "nas:/data" for {pool.fstype}, got {shown(pool.source)}')
    if not re.fullmatch(r"[A-Za-z0-9_=.,:/@+-]*", pool.options):
        raise refuse("options", f'expected mount options such as "noatime,discard", got {shown(pool.options)}')


def _is_path(text: str) -> bool:
    return (
        text.startswith("/")
        and len(text) <= 1023
        and not re.search(r"[\0-\x1f\x7f]", text)
        and (text == "/" or all(part not in ("", ".", "..") for part in text[1:].split("/")))
    )


# Volumes


def check_volume(name: str, kind: Type = Type.DIRECTORY) -> None:
    """Raise InvalidDefinition for what can't be a volume's name: a path, a hidden file, special characters."""
    if not re.fullmatch(LOGICAL if kind is Type.LOGICAL else VOLUME, name):
        raise errors.InvalidDefinition(
            "volume",
            "name",
            "expected a file name of 1 to 127 letters, digits, '.', '_', '+', '@' or '-', the first one a letter, "
            f"a digit or '_', got {shown(name)}",
        )


def is_volume(name: str) -> bool:
    """Whether a file of this name is a volume."""
    return re.fullmatch(VOLUME, name) is not None


def volume_size(value: str | int) -> int:
    """Bytes, a multiple of 512. Raises InvalidDefinition."""
    try:
        number = size.parse(value)
    except ValueError:
        raise errors.InvalidDefinition(
            "volume", "size", f'expected a size such as "10G" or "512MiB", got {shown(value)}'
        ) from None
    if not 0 < number <= SIZE_MAX:
        raise errors.InvalidDefinition(
            "volume", "size", f"expected more than 0 and at most 4096P, got {shown(value)}"
        )
    return -(-number // 512) * 512


def volume_format(word: str) -> Format:
    """Raises InvalidDefinition."""
    if word not in Format.__members__.values():
        raise errors.InvalidDefinition("volume", "format", f'expected "raw" or "qcow2", got {shown(word)}')
    return Format(word)


def preallocation(word: str) -> Preallocation:
    """Raises InvalidDefinition."""
    if word not in Preallocation.__members__.values():
        raise errors.InvalidDefinition(
            "volume", "preallocation", f'expected "off", "metadata", "falloc" or "full", got {shown(word)}'
        )
    return Preallocation(word)
