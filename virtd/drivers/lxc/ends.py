# SPDX-License-Identifier: LGPL-2.1-or-later
"""What LXC's log tells of a container, and why one ended."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...guests.guest import End, Request
from ...model.state import Cause, State
from ...records import Exit, stamp
from ...systemd.units import CLD_EXITED, UnitState, signal_name

# lxc-start web1 20261124035119.773 NOTICE   start - ../src/lxc/start.c:post_start:2217 - Started "/sbin/init" with
# pid "243"
LINE = r"\S+ \S+ [0-9]{14}\.[0-9]+ ([A-Z]+) +\S+ - \S+ - (.*)"
STARTED = (
    r"""(?:Started ".*" with pid "([0-9]{1,9})"|'.*' started with pid '([0-9]{1,9})')"""  # lxc-start, lxc-execute
)
# The same in LXC 4, 5 and 6, but for the signal's name, which the older ones don't give.
ENDED = r"Child <([0-9]{1,9})> ended on (error|signal) [^(]{0,40}\(([0-9]{1,3})\)"
# It gives the container all files of its control group that the kernel may have (/sys/kernel/cgroup/delegate), those
# of controllers that this host hasn't, too.
NOT_THERE = r"No such file or directory - Failed to fchownat\([0-9]+, [a-z_.]+, .*"
LEVELS = {"WARN": "warning", "ERROR": "error", "FATAL": "error", "CRIT": "error", "ALERT": "error"}
HUP, INT = (
    1,
    2,
)  # how the first program of a PID namespace ends by reboot(2): SIGHUP to be started again, SIGINT for good


class Said(NamedTuple):
    """One line: its level for the journal (None: not for the journal), and its words."""

    level: str | None
    words: str


def read(line: str) -> Said:
    match = re.fullmatch(LINE, line)
    if match is None:
        return Said("warning", line)
    return Said(LEVELS.get(match[1]) if re.fullmatch(NOT_THERE, match[2]) is None else None, match[2])


def started(words: str) -> int | None:
    """The PID of the container's first program, if it was just started."""
    match = re.fullmatch(STARTED, words)
    return int(match[1] or match[2]) if match else None


def errors_in(words: str) -> list[str]:
    """What a failed start is about: the errors, without where in LXC's source they were found."""
    said = [read(line) for line in words.splitlines()]
    return [one.words for one in said if one.level == "error"]


class First(NamedTuple):
    """How the container's first program ended: by exit status, or by signal."""

    code: int | None
    signal: int | None


def first(words: str, pid: int) -> First | None:
    """From LXC's last words; None when they don't tell. One that ends with status 0 isn't mentioned."""
    for match in reversed(list(re.finditer(ENDED, words))):
        if not pid or int(match[1]) == pid:
            number = int(match[3])
            return First(number, None) if match[2] == "error" else First(None, number)
    return None


def judge(
    unit: UnitState | None,
    words: str,
    pid: int,
    request: Request | None,
    *,
    command: bool,
    host_down: bool,
    seen: str,
) -> End:
    """The end of a container.

    `unit` None: systemd knows nothing of it any more; `words`: the last that LXC wrote; `pid`: its first program;
    `host_down`: the unit's ExecStop has run; `seen`: when we noticed.
    """
    at = stamp(unit.exited_at) if unit is not None and unit.exited_at else seen
    asked = request.verb if request is not None else ""
    by = request.by if request is not None else None
    code: int | None = None
    killer: str | None = None

    def end(state: State, reason: str, cause: Cause, who: str | None = None) -> End:
        return End(state, reason, Exit(cause=cause.value, at=at, code=code, signal=killer, by=who))

    lxc = unit.exec_status if unit is not None and unit.exec_code not in (0, CLD_EXITED) else 0
    how = first(words, pid)
    if how is not None:
        code = how.code
        killer = signal_name(how.signal) if how.signal not in (None, HUP, INT) else None
    elif unit is not None and unit.exec_code == CLD_EXITED:
        code = unit.exec_status
    if lxc:
        killer, code = signal_name(lxc), None
    if unit is not None and unit.result == "oom-kill":
        return end(State.CRASHED, "killed: out of memory", Cause.OOM)
    if asked == "stop":
        return end(State.STOPPED, f"stopped by {by}", Cause.STOP, by)
    if asked == "kill" and killer is not None:
        return end(State.CRASHED, f"killed by {by}", Cause.KILLED, by)
    if asked == "shutdown" and not lxc:
        return end(State.STOPPED, f"shut down by {by}", Cause.SHUTDOWN, by)
    if host_down:
        return end(State.STOPPED, "shut down with the host", Cause.HOST_SHUTDOWN)
    if lxc:
        return end(State.CRASHED, f"LXC was killed by {killer}", Cause.KILLED)
    if killer is not None:
        return end(State.CRASHED, f"{'its command' if command else 'its init'} was killed by {killer}", Cause.KILLED)
    if how is not None and how.signal == INT:
        return end(State.STOPPED, "powered off by itself", Cause.GUEST_SHUTDOWN)
    if how is not None and how.signal == HUP:
        return end(State.STOPPED, "rebooted itself", Cause.GUEST_SHUTDOWN)
    if code:
        return end(State.CRASHED, f"exited with status {code}", Cause.FAILED)
    if unit is None or unit.unknown:
        return end(State.CRASHED, "ended, and nobody saw how", Cause.UNKNOWN)
    return end(State.STOPPED, "its command ended" if command else "its init ended", Cause.EXITED)
