# SPDX-License-Identifier: LGPL-2.1-or-later
"""`lab exec`: becomes a command inside a lab.

Benchmarks time what they run through this, so it imports as little as it can, forks nothing in Python and replaces
itself by nsenter at once. Measured from the shell to the shell, `lab exec NAME -- true` is some tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import NoReturn

from .paths import Lab, start_time
from .say import LabError

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def leader_of(lab: Lab) -> int:
    """The host's PID of the lab's PID 1, also after a reboot inside it. LabError when the lab isn't up."""
    state = lab.read()
    leader, supervisor = int(state.get("leader", 0)), int(state.get("supervisor", 0))
    if leader and start_time(leader) == state.get("leader_start"):
        return leader
    # systemd-nspawn itself starts a new PID 1 when the system inside reboots; it has no other children.
    if supervisor and start_time(supervisor) == state.get("supervisor_start"):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
            return int(file.read().split()[0])
    if not lab.dir.exists():
        raise LabError(f"there is no lab {lab.name}; lab up {lab.name} makes it")
    raise LabError(f"lab {lab.name} is not running; lab down {lab.name} clears it away")


def command_line(leader: int, command: Sequence[str]) -> list[str]:
    """The nsenter call. The command gets SIGTERM when nsenter is killed, so that an impatient test leaves nothing."""
    enter = ["nsenter", f"--target={leader}", "--all", "--", "setpriv", "--pdeathsig", "TERM", "--"]
    return [*enter, *command]


def environment() -> dict[str, str]:
    """What a root login on the lab's console would have, and nothing of the caller's but the terminal's kind."""
    return {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "USER": "root", "TERM": os.environ.get("TERM", "dumb")}


def join_cgroup(lab: Lab) -> None:
    """Moves this process into a group of the lab's own tree.

    Its place is beside the lab's units: systemd leaves a group alone that it didn't make, so a restart of a unit does
    not take a test's command with it, and `lab down` finds the process.
    """
    base = lab.read().get("cgroup")
    if not base:
        return
    group = f"{base}/payload/lab.exec"
    try:
        os.makedirs(group, exist_ok=True)
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write("0")
    except OSError as error:
        raise LabError(f"lab {lab.name}: cannot join {group}: {error.strerror}") from None


def exec_in(name: str, command: Sequence[str]) -> NoReturn:
    """Replaces this process by `command` in the lab; the terminal and the three streams are passed on as they are."""
    if not command:
        raise LabError("lab exec NAME -- COMMAND...: the command is missing")
    lab = Lab(name)
    leader = leader_of(lab)
    join_cgroup(lab)
    os.chdir("/")
    try:
        os.execvpe("nsenter", command_line(leader, command), environment())
    except FileNotFoundError:
        raise LabError("nsenter is not installed; run tests/lab/lab setup") from None
