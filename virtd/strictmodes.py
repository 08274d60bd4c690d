# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether only root can change a file that virtd trusts.

Whoever can write a definition can make QEMU open any file, so one that belongs to a user, or that everybody may
write, must not be trusted.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from . import errors, reach
from .text import word

if TYPE_CHECKING:
    from collections.abc import Iterator


def fault(status: os.stat_result) -> str:
    """Who else can write a file with this status, as a sentence; "" if nobody can.

    A directory with the sticky bit is acceptable: others may create files in it, but can't replace root's.
    """
    mode = status.st_mode
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to the user with the ID {status.st_uid}"
    if stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return ""
    if mode & stat.S_IWOTH:
        return "everybody may write it"
    if mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid()):
        return f"the group with the ID {status.st_gid} may write it"
    return ""


def require(path: str, status: os.stat_result) -> None:
    """Raise InvalidDefinition if anybody but root can write the file `path`, which has this status."""
    if wrong := fault(status):
        name = word(path)
        raise errors.InvalidDefinition(
            path, "", f"expected a file that only root can write: {wrong}",
            hint=f"See what is in it, then: chown root: {name}; chmod go-w {name}; systemctl reload virtd.",
        )  # fmt: skip


def require_directories(path: str) -> None:
    """Raise InvalidDefinition if anybody but root can replace the file that the link `path` leads to.

    Raises OSError if it is dangling.
    """
    try:
        with reach.reached(path):
            pass
    except errors.HostError as exc:
        hint = exc.hint or "Keep it where only root can write."
        expected = f"expected a file that only root can write: {exc.message}"
        raise errors.InvalidDefinition(path, "", expected, hint=hint) from exc


def faults_above(path: str) -> Iterator[tuple[str, str]]:
    """The directories above `path`, which contains no links, that anybody but root can write, and who can."""
    while path != "/":
        path = os.path.dirname(path)
        if wrong := fault(os.stat(path)):
            yield path, wrong
