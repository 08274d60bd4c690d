# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a guest ended, put together from its unit, QEMU's own words and events, and what was asked of it.

Whatever the guest did before, and whether or not virtd was running, a QEMU with the trace backend "log" (Debian's,
and what upstream builds by default) writes to stderr what ends it: `qemu_system_shutdown_request reason=6`. One
without it (Fedora's and RHEL's have "dtrace" only) shows its exit status, and its events while somebody listens.
Events aren't kept in a file, as they once were: a guest can make 5 MB of them a second.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ... import untrusted
from ...guests import verdict
from ...model.state import Cause, State
from ...records import stamp
from ...systemd.state import signal_name

if TYPE_CHECKING:
    from ...guests.verdict import End, Request
    from ...systemd.state import UnitState

# QEMU's words on stderr. From a PID namespace of its own it can't see who sent the signal.
TERMINATING = r"terminating on signal (\d+)(?: from pid (\d+) \((.*)\))?"
TAIL = 1 << 16  # only the last events matter; a guest can make any number of them

# QEMU's system/trace-events. Up to 7.2, and with -msg timestamp=on, PID and time come before each line.
TRACE = r"(?:\d+@\d+\.\d+:)?qemu_system_(?:(powerdown)_request|shutdown_request reason=(\d+)).*"
# QEMU 11.1 and later say so of an option in command.py that older ones have no replacement for.
OUTDATED = "warning: '-mon' is deprecated"
# ShutdownCause in QEMU's qapi/run-state.json; new ones are added at the end.
REASONS = (
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
    "guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load",
)  # fmt: skip


def is_aside(line: str) -> bool:
    """Whether a line of QEMU's stderr isn't meant for people: a trace, or a complaint about virtd's options."""
    return re.fullmatch(TRACE, line) is not None or OUTDATED in line


def traced(words: str) -> list[dict[str, Any]]:
    """The events that QEMU's stderr shows, in the form of QMP events, since the guest's last reset."""
    found: list[dict[str, Any]] = []
    for line in words.splitlines():
        if re.search(TERMINATING, line) is not None:  # which the trace has no line for
            found.append({"event": "SHUTDOWN", "data": {"reason": "host-signal"}})
            continue
        if (said := re.fullmatch(TRACE, line)) is None:
            continue
        if said[1]:
            found.append({"event": "POWERDOWN", "data": {}})
            continue
        if found and found[-1]["event"] == "SHUTDOWN":  # QEMU stayed and was reset: the guest has begun anew
            found.clear()
        reason = REASONS[int(said[2])] if int(said[2]) < len(REASONS) else ""
        if reason == "guest-panic":
            found.append({"event": "GUEST_PANICKED", "data": {}})
        found.append({"event": "SHUTDOWN", "data": {"reason": reason}})
    return found


def latest(traced: list[dict[str, Any]], heard: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events from QEMU's stderr or from its monitor, whichever lead up to the end.

    stderr doesn't show that a reset ended it (on_reboot = "stop"), and the monitor only what virtd was connected for.
    """
    reset = bool(heard) and heard[-1]["event"] == "SHUTDOWN" and heard[-1]["data"].get("reason") == "guest-reset"
    return heard if reset or not traced else traced


def read_events(stem: str) -> list[dict[str, Any]]:
    """The last events in the file of a QEMU that an older virtd started, without a last incomplete line.

    The file belongs to QEMU, which its guest may have taken over: anything can be in it, or in its place.
    """
    import json  # 1 ms, which no start of the daemon needs to spend

    try:
        lines = untrusted.tail(f"{stem}.out", TAIL).split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(message, dict)
            and isinstance(message.get("event"), str)
            and isinstance(message.setdefault("data", {}), dict)
        ):
            found.append(message)
    return found


class Evidence(verdict.Evidence, frozen=True, kw_only=True):
    """The same, of a QEMU.

    `events` are the names of its events since the guest's last reset, `why` the reason of the last SHUTDOWN or "",
    `sender` " from NAME (PID N)" if QEMU said who sent the signal, and `silent` whether it left no words.
    """

    events: tuple[str, ...]
    why: str
    sender: str
    silent: bool

    @property
    def by_guest(self) -> bool:
        """Whether the guest itself asked QEMU to end."""
        return self.why.startswith("guest-")


R = verdict.Rule
RULES: tuple[verdict.Rule[Evidence], ...] = (
    R("out of memory", lambda e: e.out_of_memory,
      State.CRASHED, Cause.OOM, "killed: out of memory"),
    R("stop", lambda e: e.asked == "stop" and e.killer in (None, "SIGTERM", "SIGKILL"),
      State.STOPPED, Cause.STOP, "stopped by {e.by}", credit=True),
    R("kill", lambda e: e.asked == "kill" and e.killer is not None,
      State.CRASHED, Cause.KILLED, "killed by {e.by}", credit=True),
    R("signal", lambda e: e.killer is not None,
      State.CRASHED, Cause.KILLED, "killed by {e.killer}{e.sender}"),
    # -action panic=exit-failure exits with 1 and says nothing; whatever else makes QEMU exit so, it has words for.
    R("silent panic", lambda e: not e.events and e.code == 1 and e.silent,
      State.CRASHED, Cause.PANIC, "the guest's kernel panicked"),
    R("panic", lambda e: "GUEST_PANICKED" in e.events and (e.why == "guest-panic" or e.code not in (0, None)),
      State.CRASHED, Cause.PANIC, "the guest's kernel panicked"),
    # The unit's ExecStop= has pressed the power button then, and told QEMU to quit if that was in vain.
    R("time limit", lambda e: e.overdue and e.code in (0, None),
      State.STOPPED, Cause.HOST_SHUTDOWN, verdict.OVERDUE),
    R("quit", lambda e: e.why == "host-qmp-quit" and e.asked != "shutdown",
      State.STOPPED, Cause.HOST_SHUTDOWN, "ended through its monitor"),
    R("failure", lambda e: e.code not in (0, None),
      State.CRASHED, Cause.FAILED, "QEMU exited with status {e.code}"),
    R("shutdown", lambda e: e.by_guest and e.asked == "shutdown",
      State.STOPPED, Cause.SHUTDOWN, "shut down by {e.by}", credit=True),
    # The power button, and virtd didn't press it: the unit's ExecStop= did, while the host goes down.
    R("host shutdown", lambda e: e.by_guest and not e.asked and "POWERDOWN" in e.events,
      State.STOPPED, Cause.HOST_SHUTDOWN, "shut down with the host"),
    R("reboot", lambda e: e.why == "guest-reset",
      State.STOPPED, Cause.GUEST_SHUTDOWN, "rebooted itself"),
    # Slow to react to the button, or somebody inside a week later: nobody can tell.
    R("late shutdown", lambda e: e.by_guest and e.asked == "shutdown given up",
      State.STOPPED, Cause.GUEST_SHUTDOWN, "powered off after the shutdown that {e.by} asked for had timed out"),
    R("power-off", lambda e: e.by_guest,
      State.STOPPED, Cause.GUEST_SHUTDOWN, "powered off by itself"),
    R("unseen", lambda e: e.unseen,
      State.CRASHED, Cause.UNKNOWN, "ended, and nobody saw how"),
    R("no status", lambda e: e.code != 0,
      State.STOPPED, Cause.UNKNOWN, "ended"),
    # From here on it ended in good order, and no more than that is known.
    R("quiet shutdown", lambda e: e.asked == "shutdown",
      State.STOPPED, Cause.SHUTDOWN, "shut down by {e.by}", credit=True),
    # Left alone, the unit would have stayed active after its process exited.
    R("stopped unit", lambda e: e.unit is not None and e.unit.active != "active",
      State.STOPPED, Cause.HOST_SHUTDOWN, "shut down with the host"),
    R("quiet end", verdict.otherwise,
      State.STOPPED, Cause.GUEST_SHUTDOWN, "powered off or rebooted by itself"),
)  # fmt: skip


def judge(known: Evidence) -> End:
    """The end of a guest."""
    return verdict.deciding(RULES, known).verdict(known)


def evidence(
    unit: UnitState | None, events: list[dict[str, Any]], request: Request | None, words: str, seen: str
) -> Evidence:
    """What the rules decide on.

    `unit` is None once systemd has forgotten it; `words` are the last that QEMU wrote to stderr in this run, without
    the lines that `traced` reads; `seen` is when virtd noticed the end.
    """
    names = [event["event"] for event in events]
    if "RESET" in names:  # the guest has begun anew with its last reset
        last = len(names) - 1 - names[::-1].index("RESET")
        events, names = events[last + 1 :], names[last + 1 :]
    shutdown = next((event for event in reversed(events) if event["event"] == "SHUTDOWN"), None)
    why = str((shutdown or {}).get("data", {}).get("reason", ""))
    killer, sender = verdict.fatal_signal(unit), ""
    if killer is None and (why == "host-signal" or not why):
        # QEMU catches SIGTERM, SIGINT and SIGHUP and exits with status 0: only its own words tell which it was.
        said = re.search(TERMINATING, words)
        killer = signal_name(int(said[1])) if said else "SIGTERM" if why else None
        sender = f" from {said[3]} (PID {said[2]})" if said and said[2] else ""
    return Evidence(
        unit=unit,
        request=request,
        at=verdict.exited_at(unit, _last(events, seen)),
        code=verdict.exit_status(unit),
        killer=killer,
        events=tuple(names),
        why=why,
        sender=sender,
        silent=not words,
    )


def how(unit: UnitState | None) -> str:
    """How a process ended about which nothing else is known."""
    if (killer := verdict.fatal_signal(unit)) is not None:
        return f"was killed by {killer}"
    return "ended at once" if unit is None else f"exited with status {unit.exec_status}"


def _last(events: list[dict[str, Any]], seen: str) -> str:
    """When QEMU sent its last event, the closest known time to its end; otherwise when the end was seen."""
    for event in reversed(events):
        match event.get("timestamp"):
            case {"seconds": int(seconds), "microseconds": int(micro)} if 0 < seconds < 1 << 35 and 0 <= micro < 1e6:
                return min(stamp(seconds + micro / 1e6), seen)
            case _:
                pass
    return seen
