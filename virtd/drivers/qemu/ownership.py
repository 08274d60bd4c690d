# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that a guest's user may not open are given to it while the guest runs, and given back afterwards.

It becomes the owner of what it writes. What it only reads, or shares, may be opened by several guests, each with a
user of its own, so an entry in the file's access control list grants it that. The file's identity, its old and its
new owner are on record before anything is changed. A file is changed by a descriptor, after a check of its identity,
and never by a path alone, which could lead to another file by then.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors, files
from ...reach import Trust, reached
from ...text import word
from . import acl
from .prerequisites import may

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ...reach import Reached
    from ..ids import Range
    from .prerequisites import Account

log = logging.getLogger(__name__)


class Given(msgspec.Struct, frozen=True):
    """A file given to user `to`: its path without links, device and inode, and its owner and group before.

    `ino` is 0 if an older virtd hasn't recorded it. `listed`: it keeps its owner, and its access control list names
    `to`, to write if it `writes`.
    """

    path: str
    dev: int
    ino: int
    uid: int
    gid: int
    to: int
    listed: bool = False
    writes: bool = False


class Leftovers(NamedTuple):
    """How to recognize files that were never given back, perhaps because of a power cut: they belong to an ID of
    `guests` that isn't `running`. They go back to root and `group`.
    """

    guests: Range
    running: set[int]
    group: int


def needed(
    opened: Iterable[tuple[str, bool]], who: Account, left: Leftovers | None = None, shared: Collection[str] = ()
) -> list[Given]:
    """The files that have to be changed for the guest's user to open them.

    `opened`: each path, and whether it is written; `shared`: those that other guests may write to as well. Raises
    HostError for one that others could exchange, or that another guest has.
    """
    found: dict[tuple[int, int], Given] = {}
    for path, writes in sorted(opened, key=lambda one: one[1]):  # what is both read and written is written
        try:
            with reached(path) as file:
                if (one := _needed(file, who, left, writes=writes, alone=path not in shared)) is not None:
                    found[file.identity] = one
        except OSError as exc:
            raise errors.HostError(f"Cannot open {path}: {exc.strerror}", hint=files.hint(exc)) from exc
    return list(found.values())


def _needed(file: Reached, who: Account, left: Leftovers | None, *, writes: bool, alone: bool) -> Given | None:
    uid, gid = file.status.st_uid, file.status.st_gid
    if left is not None and left.guests.holds(uid) and uid not in left.running:
        uid, gid = 0, left.group
    elif may(file.status, who, os.R_OK | os.W_OK if writes else os.R_OK):
        return None
    if (not writes or not alone) and who.own and _can_be_listed(file):
        return Given(file.path, *file.identity, uid, gid, who.uid, listed=True, writes=writes)
    if left is not None and uid in left.running:
        raise errors.HostError(
            f"{file.path} is given to another guest, and its file system has no access control lists",
            hint=f"Let everybody use it: chmod o+r{'w' if writes else ''} {word(file.path)}.",
        )
    return Given(file.path, *file.identity, uid, gid, who.uid)


def _can_be_listed(file: Reached) -> bool:
    try:
        acl.read(file.itself)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True


def hand_over(given: Iterable[Given], who: Account) -> None:
    """Give the files to the guest's user. Raises HostError."""
    for one in given:
        try:
            with reached(one.path) as file:
                if file.identity != (one.dev, one.ino):
                    raise errors.HostError(f"{one.path} was exchanged for another file while the guest was started")
                if one.listed:
                    acl.grant(file.itself, who.uid, write=one.writes)
                else:
                    _chown(file, who.uid, who.gid)
        except OSError as exc:
            what = (
                f"have {who.user} {'write' if one.writes else 'read'} {one.path}"
                if one.listed
                else f"give {one.path} to {who.user}"
            )
            raise errors.HostError(f"Cannot {what}: {exc.strerror}", hint=_hint(one, exc)) from exc


def _hint(one: Given, exc: OSError) -> str:
    """What to do about a file whose owner or list can't be changed: neither is needed if everybody may use it."""
    path, mode = word(one.path), "o+r" if one.listed and not one.writes else "o+rw"
    copy = f"use a copy: cp {path} /var/lib/virtd/images/"
    match exc.errno:
        case errno.EROFS:
            return f"Its file system is read-only: chmod {mode} the file where that can be written, or {copy}."
        case errno.EPERM | errno.EACCES | errno.EOPNOTSUPP | errno.EINVAL:
            return (
                "Its file system has no owners, is another host's, or the file is immutable (chattr -i ends that). "
                f"chmod {mode} {path}, where that can be done, or {copy}."
            )
        case _:
            return files.hint(exc)


def give_back(given: Iterable[Given]) -> None:
    """Give the files back to their former owners, unless somebody else has changed their owners since.

    Idempotent. Raises HostError for the first that can't be given back, after trying all.
    """
    failed = None
    for one in given:
        try:
            # However the path leads there: it is the file that was given, or nothing is done.
            with reached(one.path, Trust.ANYBODY if one.ino else Trust.ROOT) as file:
                if one.ino and file.identity != (one.dev, one.ino):
                    log.warning("%s is another file by now, and isn't given back", one.path)
                elif one.listed:
                    acl.revoke(file.itself, one.to)
                elif file.status.st_uid == one.to:
                    _chown(file, one.uid, one.gid)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it was removed, or what it is on was unmounted
        except OSError as exc:
            failed = failed or errors.HostError(f"{one.path} can't be given back: {exc.strerror}")
        except errors.HostError as exc:
            log.warning("%s isn't given back: %s", one.path, exc)
    if failed is not None:
        raise failed


def check_shown(pid: int, taken: dict[tuple[int, int], tuple[str, bool]]) -> None:
    """Check that a guest's sandbox has the very files that were checked; systemd has found them by their paths.

    Raises StartFailed. Only those who may write to the directories could exchange them, see `reached`; it is checked
    all the same, since a mistake there would show one owner's files to another.
    """
    for identity, (path, _writes) in taken.items():
        try:
            status = os.stat(f"/proc/{pid}/root{path}")
        except FileNotFoundError:
            continue  # it has ended, which others report
        except OSError as exc:
            log.warning("It can't be checked which file the guest has as %s: %s", path, exc.strerror)
            continue
        if (status.st_dev, status.st_ino) != identity:
            raise errors.StartFailed(f"{path} was exchanged for another file while the guest was started")


def _chown(file: Reached, uid: int, gid: int) -> None:
    os.chown(file.itself, uid, gid)


def to_record(given: Iterable[Given]) -> list[dict[str, Any]]:
    """In the form that a guest's record has under "given"."""
    return [msgspec.to_builtins(one) for one in given]


def recorded(data: dict[str, Any], user: int) -> list[Given]:
    """What a guest was given, by its record's data. An older virtd gave all files to one `user` and recorded their
    paths, whose identities are among those of the files that the guest has open.
    """
    if (rows := data.get("given")) is not None:
        return msgspec.convert(rows, list[Given])
    known = {path: (dev, ino) for path, dev, ino, _writes in data.get("images", [])}
    return [Given(path, *known.get(path, (0, 0)), uid, gid, user) for path, uid, gid in data.get("owners", [])]
