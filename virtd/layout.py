# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directories that virtd works in. systemd-tmpfiles(8) makes them; if that hasn't run or somebody has removed
them, virtd does, with the modes in units/virtd.tmpfiles.

There is no StateDirectory= or the like, because `systemctl clean` deletes what those name: images, definitions and
logs belong to their owners, and /run describes running guests.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from . import files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .paths import Paths

OURS = {  # in /run, where virtd makes everything
    "": 0o755,
    # Children reach their own files by name, and must not see whose else there are.
    "qemu": 0o711,
    "network": 0o711,
    "lxc": 0o700,
    "storage": 0o700,
    "fifos": 0o700,
    "paths": 0o700,
    "quarantine": 0o700,
}
ETC = {"": 0o755, "qemu": 0o755, "network": 0o755, "storage": 0o755, "lxc": 0o755}
LIB = {"": 0o711, "network": 0o711, "images": 0o700, "containers": 0o700}
# Consoles hold what guests print, passwords at times included.
LOG = {"": 0o711, "qemu": 0o700, "network": 0o700, "lxc": 0o700, "storage": 0o700}


def directories(paths: Paths) -> Iterator[tuple[str, int]]:
    """All directories with their modes, parents first."""
    for base, table in ((paths.run, OURS), (paths.etc, ETC), (paths.lib, LIB), (paths.log, LOG)):
        for name, mode in table.items():
            yield f"{base}/{name}".rstrip("/"), mode


def ensure(paths: Paths) -> None:
    """Make all that are missing. If one can't be made, whoever needs it reports that.

    Those in /run get their mode restored; the mode of the others may be their owner's choice.
    """
    for path, mode in directories(paths):
        with contextlib.suppress(OSError):
            files.make_directory(path, mode)
            if path.startswith(paths.run) and os.stat(path).st_mode & 0o7777 != mode:
                os.chmod(path, mode)
