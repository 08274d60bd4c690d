# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who can reach a container's root file system from outside.

The container's root owns all files in it and can make programs setuid; where an idmapped mount shifts IDs, even
setuid to the host's root. Whoever can reach them could run them, and could plant files in directories that are open
to all, such as /tmp. So on every path that leads there, some directory above has to keep everybody but root out, and
nobody else may be able to replace it: see reach.py.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from ... import errors, hostroot, mountinfo, reach
from ...text import word

SEARCH = stat.S_IXGRP | stat.S_IXOTH  # with an ACL the group's bits are its mask, acl(5): all that it grants


def check(root: str, source: str, directory: str) -> None:
    """Refuse a root file system that others can reach. `directory`: a safe place for it. Raises InvalidDefinition."""
    try:
        with reach.reached(root) as found:
            way = _exposed(found)
    except errors.HostError as exc:
        raise errors.InvalidDefinition(
            source, "rootfs", f"expected a directory that only root can exchange; {exc.message}", hint=exc.hint
        ) from exc
    except OSError as exc:
        raise errors.InvalidDefinition(source, "rootfs", f"{root} can't be looked at: {exc.strerror}") from exc
    if way is not None:
        hint = f"Move it into a directory that only root can enter, such as {directory}."
        if way.directory:
            other = f", or move it to {directory}" if way.directory != directory else ""
            hint = f"chmod 700 {word(way.directory)}{other}."
        raise errors.InvalidDefinition(
            source, "rootfs", f"expected a directory that nobody but root can reach; {way.why}", hint=hint
        )


class Exposed(NamedTuple):
    """`why` is for a person; mode 0700 on `directory` would close it, "" if that would lock out others as well."""

    why: str
    directory: str


def _exposed(found: reach.Reached) -> Exposed | None:
    """How anybody but root can reach the directory, if at all. Raises OSError."""
    root = found.path
    if not _kept(root):
        above = os.path.dirname(root)
        return Exposed(f"no directory above {root} keeps others out", above if above.count("/") > 1 else "")
    for other in _elsewhere(found):
        if not _kept(os.path.realpath(other)):
            return Exposed(f"others reach files of its as {other}, where they are mounted, too", "")
    return None


def _kept(path: str) -> bool:
    """Whether some directory above it lets nobody but root through."""
    while path != "/":
        path = os.path.dirname(path)
        status = os.stat(hostroot.seen(path))
        if status.st_uid in (0, os.geteuid()) and not status.st_mode & SEARCH:
            return True
    return False


def _elsewhere(directory: reach.Reached) -> list[str]:
    """Where else on the host the directory, or a part of it, is mounted, proc_pid_mountinfo(5)."""
    root = directory.path
    with open(f"/proc/self/fdinfo/{directory.fd}", encoding="ascii") as file:
        ident = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    mounts = mountinfo.mounts()
    own = next((mount for mount in mounts if mount.ident == ident), None)
    if own is None:
        return []
    point, start = own.point.rstrip("/"), own.root.rstrip("/")
    if root != point and not root.startswith(f"{point}/"):
        return []
    target = start + root[len(point) :]  # in the file system itself
    found = []
    for mount in mounts:
        if mount.ident == ident or mount.device != own.device:
            continue
        top, where = mount.root.rstrip("/"), mount.point.rstrip("/")
        if target == top or target.startswith(f"{top}/"):
            found.append(where + target[len(top) :])
            if not _same(found[-1], root):  # hidden below another mount
                found.pop()
        elif top.startswith(f"{target}/"):
            found.append(where)
    return found


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(hostroot.seen(one), hostroot.seen(other))
    except OSError:
        return False
