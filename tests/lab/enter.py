# SPDX-License-Identifier: LGPL-2.1-or-later
"""`lab exec`: becomes a command inside a lab.

Benchmarks time what they run through this: it imports next to nothing, forks nothing and replaces itself by nsenter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from .state import LabError, directory_of, leader_of, read_state

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def command_line(leader: int, command: Sequence[str]) -> list[str]:
    """The nsenter call. The command gets SIGTERM when nsenter is killed, so that an impatient test leaves nothing."""
    enter = ["nsenter", f"--target={leader}", "--all", "--", "setpriv", "--pdeathsig", "TERM", "--"]
    return [*enter, *command]


def environment() -> dict[str, str]:
    """What a root login on the lab's console would have, and nothing of the caller's but the terminal's kind."""
    return {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "USER": "root", "TERM": os.environ.get("TERM", "dumb")}


def join_cgroup(name: str) -> None:
    """Moves this process into a group of the lab's own tree.

    Its place is beside the lab's units: systemd leaves a group alone that it didn't make, so a restart of a unit does
    not take a test's command with it, and `lab down` finds the process.
    """
    group = f"{read_state(directory_of(name)).get('cgroup', '')}/payload/lab.exec"
    try:
        os.makedirs(group, exist_ok=True)
        with open(f"{group}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")
    except OSError as error:
        raise LabError(f"lab {name}: cannot join {group}: {error.strerror}") from None


def exec_in(name: str, command: Sequence[str]) -> NoReturn:
    """Replaces this process by `command` in the lab; the terminal and the three streams are passed on as they are."""
    if not command:
        raise LabError("lab exec NAME -- COMMAND...: the command is missing")
    leader = leader_of(name)
    join_cgroup(name)
    os.chdir("/")
    try:
        os.execvpe("nsenter", command_line(leader, command), environment())
    except FileNotFoundError:
        raise LabError("nsenter is not installed; run tests/lab/lab setup") from None
