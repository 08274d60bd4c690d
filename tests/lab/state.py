# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a lab wrote down about itself, and how its running system is found.

`lab exec` needs this module and no other, so it imports nothing that takes time to import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")


class LabError(Exception):
    """The lab cannot do what was asked; the message says what and what to do about it. Ends in exit status 1."""


def labs_directory() -> str:
    """Where the labs are: one directory for each, with its overlay, state and console. Not itself on an overlayfs."""
    return os.environ.get("VIRTD_LAB_DIR") or "/var/lib/virtd-lab"


def directory_of(name: str) -> str:
    """The directory of the lab of that name, there or not. LabError for what can't be a host's and a unit's name."""
    if not name or len(name) > 32 or not set(name) <= _LETTERS or name.startswith("-"):
        raise LabError(f"{name!r} is no name for a lab: letters, digits and -, at most 32, no - in front")
    return f"{labs_directory()}/{name}"


def read_state(directory: str) -> dict[str, str]:
    """The lab's notes, empty when there are none (yet).

    As far as `up` has come: `suite`, `root` (the cached root), `created` (epoch seconds), `cgroup`, `leader` (the PID
    of the lab's PID 1 as the host sees it), `supervisor` (systemd-nspawn's), each with `_start`, its start time in
    clock ticks that tells a reused PID; and `ready`, once all is done.
    """
    try:
        with open(f"{directory}/state", encoding="utf-8") as file:
            return dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
    except OSError:
        return {}


def write_state(directory: str, changes: Mapping[str, object]) -> None:
    """Merges `changes` into the notes with one rename, so that a reader sees the old or the new."""
    merged = read_state(directory) | {key: str(value) for key, value in changes.items()}
    with open(f"{directory}/state.new", "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in merged.items())
    os.rename(f"{directory}/state.new", f"{directory}/state")


def start_time(pid: int) -> str:
    """The kernel's start time of a process in clock ticks since boot; "" when there is none, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def recorded(state: Mapping[str, str], which: str) -> int:
    """The PID noted as `leader` or `supervisor` if that very process still runs, else 0."""
    pid = int(state.get(which, "0"))
    return pid if pid and start_time(pid) == state.get(f"{which}_start") else 0


def leader_of(name: str) -> int:
    """The host's PID of the lab's PID 1, also after a reboot inside it. LabError when the lab isn't up."""
    directory = directory_of(name)
    state = read_state(directory)
    if leader := recorded(state, "leader"):
        return leader
    if supervisor := recorded(state, "supervisor"):
        # systemd-nspawn itself starts a new PID 1 when the system inside reboots; it has no other children.
        try:
            with open(f"/proc/{supervisor}/task/{supervisor}/children", encoding="ascii") as file:
                return int(file.read().split()[0])
        except (OSError, IndexError):
            pass
    if not os.path.isdir(directory):
        raise LabError(f"there is no lab {name}; lab up {name} makes it")
    raise LabError(f"lab {name} is not running; lab down {name} clears it away")
