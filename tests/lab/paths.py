# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the lab keeps things. All of it lies outside the checkout, and two environment variables move it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .say import LabError

SOURCE = Path(__file__).resolve().parent
CHECKOUT = SOURCE.parent.parent


def cache_dir() -> Path:
    """Roots, keyed by what they are made of: costs minutes to make again, may be deleted at any time no lab is up."""
    return Path(os.environ.get("VIRTD_LAB_CACHE") or "/var/cache/virtd-lab")


def labs_dir() -> Path:
    """One directory for each lab: its overlay, its state and its console. Must not itself lie on an overlayfs."""
    return Path(os.environ.get("VIRTD_LAB_DIR") or "/var/lib/virtd-lab")


class Lab:
    """The files of one lab; making the object touches nothing.

    state.json holds, as far as `up` has come: `suite`, `root` (the cached root), `created` (epoch seconds), `up_pid`,
    `leader` (PID of the lab's PID 1 as the host sees it) with `leader_start`, `cgroup`, `ready` (bool).
    """

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}", name):
            raise LabError(f"{name!r} is no name for a lab: letters, digits and -, at most 32, no - in front")
        self.name = name
        self.dir = labs_dir() / name
        self.upper = self.dir / "upper"
        self.work = self.dir / "work"
        self.root = self.dir / "root"
        self.console = self.dir / "console.log"
        self.state_file = self.dir / "state.json"

    def read(self) -> dict[str, Any]:
        """The state, empty when there is none (yet)."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def write(self, **changes: Any) -> dict[str, Any]:
        """Merges `changes` into the state, in one rename so that a reader sees the old or the new."""
        state = self.read() | changes
        temporary = self.dir / "state.json.new"
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        temporary.rename(self.state_file)
        return state


def all_labs() -> list[Lab]:
    """Every lab that left a directory, whatever its condition, by name."""
    try:
        names = sorted(entry.name for entry in labs_dir().iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    return [Lab(name) for name in names]


def start_time(pid: int) -> int:
    """The kernel's start time of a process in clock ticks since boot, 0 when there is none: tells a reused PID."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
