# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the lab keeps things. All of it lies outside the checkout, and two environment variables move it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from .state import directory_of, labs_directory

SOURCE = Path(__file__).resolve().parent
CHECKOUT = SOURCE.parent.parent


def cache_dir() -> Path:
    """Roots, keyed by what they are made of: costs a minute to make again, may be deleted while no lab is up."""
    return Path(os.environ.get("VIRTD_LAB_CACHE") or "/var/cache/virtd-lab")


class Lab:
    """The files of one lab; making the object touches nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dir = Path(directory_of(name))
        self.upper = self.dir / "upper"
        self.work = self.dir / "work"
        self.root = self.dir / "root"
        self.console = self.dir / "console.log"
        # What the host knows the lab by: the name of its unit or control group. Labs in another directory than the
        # usual may have the same names.
        mark = f"-{zlib.crc32(bytes(self.dir.parent)):08x}" if os.environ.get("VIRTD_LAB_DIR") else ""
        self.machine = f"virtd-lab-{name}{mark}"


def all_labs() -> list[Lab]:
    """Every lab that left a directory, whatever its condition, by name."""
    try:
        names = sorted(entry.name for entry in os.scandir(labs_directory()) if entry.is_dir())
    except FileNotFoundError:
        return []
    return [Lab(name) for name in names]
