# SPDX-License-Identifier: LGPL-2.1-or-later
"""Letting one more user open a file: an entry in its access control list, acl(5), without a change of owner or group.

So several guests, each with a user of its own, can open one file that nobody else may. The list is the extended
attribute `system.posix_acl_access`: version 2 and eight bytes for each entry, all little-endian
(linux/posix_acl_xattr.h). The kernel keeps the file's mode equal to its first and last entries.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NamedTuple

ATTRIBUTE = "system.posix_acl_access"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NOBODY = 0xFFFFFFFF  # the ID of entries that name none
READ, WRITE = 4, 2


class Entry(NamedTuple):
    """An entry as the kernel has it. They are sorted by tag, then by ID."""

    tag: int
    perm: int
    id: int = NOBODY


def grant(path: str, uid: int, *, write: bool = False) -> None:
    """Let `uid` read the file, or write it too. Raises OSError; EOPNOTSUPP where the file system has no such lists.

    The group's bits in the mode that stat(2) shows then are the mask: the most that the list grants anybody.
    """
    entries = [entry for entry in read(path) if (entry.tag, entry.id) != (USER, uid)]
    perm = READ | WRITE if write else READ
    _write(path, [*entries, Entry(USER, perm, uid)], perm)


def revoke(path: str, uid: int) -> None:
    """Undo `grant`; when its last named entry is removed, so is the list. Raises OSError."""
    entries = read(path)
    left = [entry for entry in entries if (entry.tag, entry.id) != (USER, uid)]
    if left == entries:
        return
    if not any(entry.tag in (USER, GROUP) for entry in left):
        _write(path, left)
        return
    # Other names remain in it, so the mask stays as it is.
    os.setxattr(path, ATTRIBUTE, _packed(left))


def read(path: str) -> list[Entry]:
    """The file's list; for a file without one, the three entries that are equivalent to its mode.

    Raises OSError; EOPNOTSUPP where the file system has no such lists.
    """
    try:
        raw = os.getxattr(path, ATTRIBUTE)
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
        mode = stat.S_IMODE(os.stat(path).st_mode)
        return [Entry(USER_OBJ, mode >> 6 & 7), Entry(GROUP_OBJ, mode >> 3 & 7), Entry(OTHER, mode & 7)]
    if len(raw) < 4 or struct.unpack_from("<I", raw)[0] != VERSION:
        raise OSError(errno.EINVAL, "Unknown version of its access control list", path)
    return [Entry(*entry) for entry in struct.iter_unpack("<HHI", raw[4:])]


def _write(path: str, entries: list[Entry], perm: int = READ) -> None:
    """Write a list with the mask that its entries need, of which the new one needs `perm`."""
    mask = next((entry.perm for entry in entries if entry.tag == MASK), None)
    others = [entry for entry in entries if entry.tag != MASK]
    group = next(entry.perm for entry in others if entry.tag == GROUP_OBJ)
    if any(entry.tag in (USER, GROUP) for entry in others):
        if mask is not None and mask & perm != perm:
            # Somebody has masked what other names are granted; our entry would unmask it.
            raise OSError(errno.EOPNOTSUPP, "Its access control list is switched off by its mask", path)
        others.append(Entry(MASK, group | perm if mask is None else mask))
    elif mask is not None:
        others = [Entry(GROUP_OBJ, group & mask) if entry.tag == GROUP_OBJ else entry for entry in others]
    os.setxattr(path, ATTRIBUTE, _packed(others))


def _packed(entries: list[Entry]) -> bytes:
    return struct.pack("<I", VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in sorted(entries))
