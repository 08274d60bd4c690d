# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's mounts, from proc_pid_mountinfo(5). Reading it doesn't touch the file systems."""

from __future__ import annotations

import re
from typing import NamedTuple

from . import hostroot

PATH = hostroot.MOUNTS


class Mount(NamedTuple):
    """One mount. `device` is "major:minor"; `root` is the directory in the file system that is mounted at `point`.

    `source` is what mount(8) calls it, and `options` are those of the file system, not of this mount.
    """

    ident: str
    device: str
    root: str
    point: str
    source: str
    options: tuple[str, ...]


def mounts() -> list[Mount]:
    """All mounts, in the order in which they were mounted: a later one at the same point hides an earlier one."""
    found = []
    with open(PATH, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.rstrip("\n").split(" ")
            ident, _, device, root, point = fields[:5]
            _, source, options = fields[fields.index("-", 6) + 1 :][:3]
            found.append(Mount(ident, device, _plain(root), _plain(point), _plain(source), tuple(options.split(","))))
    return found


def _plain(field: str) -> str:
    """Decode the spaces, tabs, line ends and backslashes that the kernel writes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
