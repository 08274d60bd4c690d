# SPDX-License-Identifier: LGPL-2.1-or-later
"""LXC's log, and what it and systemd say about the end of a container."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ...guests import verdict
from ...model.state import Cause, State
from ...systemd.state import signal_name

if TYPE_CHECKING:
    from ...guests.verdict import End, Request
    from ...systemd.state import UnitState

# lxc-start web1 20261124035119.773 NOTICE   start - ../src/lxc/start.c:post_start:2217 - Started "/sbin/init" with
# pid "243"
LINE = r"\S+ \S+ [0-9]{14}\.[0-9]+ ([A-Z]+) +\S+ - \S+ - (.*)"
STARTED = (
    r"""(?:Started ".*" with pid "([0-9]{1,9})"|'.*' started with pid '([0-9]{1,9})')"""  # lxc-start, lxc-execute
)
# The same in LXC 4, 5 and 6, but for the signal's name, which the older ones don't give.
ENDED = r"Child <([0-9]{1,9})> ended on (error|signal) [^(]{0,40}\(([0-9]{1,3})\)"
# It tries to give the container every file of its control group that the kernel may have
# (/sys/kernel/cgroup/delegate), including those of controllers that this host doesn't have.
NOT_THERE = r"No such file or directory - Failed to fchownat\([0-9]+, [a-z_.]+, .*"
LEVELS = {"WARN": "warning", "ERROR": "error", "FATAL": "error", "CRIT": "error", "ALERT": "error"}
HUP, INT = (
    1,
    2,
)  # how the first program of a PID namespace ends by reboot(2): SIGHUP to be started again, SIGINT for good


class Said(NamedTuple):
    """One line of the log: its level for the journal (None: not for the journal), and its text."""

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
    """The errors in the log of a failed start, without their places in LXC's source."""
    said = [read(line) for line in words.splitlines()]
    return [one.words for one in said if one.level == "error"]


class First(NamedTuple):
    """How the container's first program ended: by exit status, or by signal."""

    code: int | None
    signal: int | None


def first(words: str, pid: int) -> First | None:
    """From the end of LXC's log; None if it doesn't say, as for exit status 0."""
    for match in reversed(list(re.finditer(ENDED, words))):
        if not pid or int(match[1]) == pid:
            number = int(match[3])
            return First(number, None) if match[2] == "error" else First(None, number)
    return None


class Evidence(verdict.Evidence, frozen=True, kw_only=True):
    """The same, of a container.

    `first` is what a person calls its first program, `signal` the number of the signal that ended it,
    `lxc_killed` whether LXC itself was killed, and `host_down` whether the unit's ExecStop= has run.
    """

    first: str
    signal: int | None
    lxc_killed: bool
    host_down: bool


R = verdict.Rule
RULES: tuple[verdict.Rule[Evidence], ...] = (
    R("out of memory", lambda e: e.out_of_memory,
      State.CRASHED, Cause.OOM, "killed: out of memory"),
    R("stop", lambda e: e.asked == "stop",
      State.STOPPED, Cause.STOP, "stopped by {e.by}", credit=True),
    R("kill", lambda e: e.asked == "kill" and e.killer is not None,
      State.CRASHED, Cause.KILLED, "killed by {e.by}", credit=True),
    R("shutdown", lambda e: e.asked == "shutdown" and not e.lxc_killed,
      State.STOPPED, Cause.SHUTDOWN, "shut down by {e.by}", credit=True),
    R("time limit", lambda e: e.overdue and e.host_down,
      State.STOPPED, Cause.HOST_SHUTDOWN, verdict.OVERDUE),
    R("host shutdown", lambda e: e.host_down,
      State.STOPPED, Cause.HOST_SHUTDOWN, "shut down with the host"),
    R("LXC killed", lambda e: e.lxc_killed,
      State.CRASHED, Cause.KILLED, "LXC was killed by {e.killer}"),
    R("signal", lambda e: e.killer is not None,
      State.CRASHED, Cause.KILLED, "{e.first} was killed by {e.killer}"),
    R("power-off", lambda e: e.signal == INT,
      State.STOPPED, Cause.GUEST_SHUTDOWN, "powered off by itself"),
    R("reboot", lambda e: e.signal == HUP,
      State.STOPPED, Cause.GUEST_SHUTDOWN, "rebooted itself"),
    R("failure", lambda e: bool(e.code),
      State.CRASHED, Cause.FAILED, "exited with status {e.code}"),
    R("unseen", lambda e: e.unseen,
      State.CRASHED, Cause.UNKNOWN, "ended, and nobody saw how"),
    R("exit", verdict.otherwise,
      State.STOPPED, Cause.EXITED, "{e.first} ended"),
)  # fmt: skip


def judge(known: Evidence) -> End:
    """The end of a container."""
    return verdict.deciding(RULES, known).verdict(known)


def evidence(
    unit: UnitState | None,
    words: str,
    pid: int,
    request: Request | None,
    *,
    command: bool,
    host_down: bool,
    seen: str,
) -> Evidence:
    """What the rules decide on.

    `unit` is None once systemd has forgotten it; `words` are the last that LXC wrote; `pid` is its first program's,
    which is a `command` or else an init; `host_down`: the unit's ExecStop= has run; `seen` is when virtd noticed the
    end.
    """
    how = first(words, pid)
    killer = verdict.fatal_signal(unit)
    lxc_killed = killer is not None
    code: int | None = None
    if how is not None and not lxc_killed:
        code = how.code
        killer = signal_name(how.signal) if how.signal not in (None, HUP, INT) else None
    elif not lxc_killed:
        code = verdict.exit_status(unit)
    return Evidence(
        unit=unit,
        request=request,
        at=verdict.exited_at(unit, seen),
        code=code,
        killer=killer,
        first="its command" if command else "its init",
        signal=how.signal if how is not None else None,
        lxc_killed=lxc_killed,
        host_down=host_down,
    )
