# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a guest ended, put together from its unit, QEMU's own words and events, and what was asked of it.

Whatever the guest has done before, and whether or not virtd was there, a QEMU with the trace backend "log" (Debian's,
and what upstream builds by default) says on stderr what ends it: `qemu_system_shutdown_request reason=6`. One without
it (Fedora's and RHEL's have "dtrace" only) tells by its exit status, and by its events while somebody listens. There
is no diary of all events, for which there was a file once: a guest can make 5 MB of them a second.
"""

from __future__ import annotations

import re
from typing import Any

from ... import untrusted
from ...guests.guest import End, Request
from ...model.state import Cause, State
from ...records import Exit, stamp
from ...systemd.units import CLD_EXITED, UnitState, signal_name

# QEMU's own words on stderr. Who it was it can't see from a PID namespace of its own.
TERMINATING = r"terminating on signal (\d+)(?: from pid (\d+) \((.*)\))?"
TAIL = 1 << 16  # the last events tell; a guest can make any number of them

# trace-events of QEMU's system/; before each line up to 7.2, and with -msg timestamp=on, PID and time.
TRACE = r"(?:\d+@\d+\.\d+:)?qemu_system_(?:(powerdown)_request|shutdown_request reason=(\d+)).*"
# Of QEMU 11.1 and later, about a word of command.py that older ones have no other for.
OUTDATED = "warning: '-mon' is deprecated"
# ShutdownCause of QEMU's qapi/run-state.json, to the end of which new ones are added.
REASONS = (
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
    "guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load",
)  # fmt: skip


def is_aside(line: str) -> bool:
    """Whether a line of QEMU's stderr is for no person: it tells virtd what ends it, or how virtd should call it."""
    return re.fullmatch(TRACE, line) is not None or OUTDATED in line


def traced(words: str) -> list[dict[str, Any]]:
    """The events that QEMU's stderr tells of, in the form of QMP's. Those of the guest's last life only."""
    found: list[dict[str, Any]] = []
    for line in words.splitlines():
        if re.search(TERMINATING, line) is not None:  # which has no line of its own in the trace
            found.append({"event": "SHUTDOWN", "data": {"reason": "host-signal"}})
            continue
        if (said := re.fullmatch(TRACE, line)) is None:
            continue
        if said[1]:
            found.append({"event": "POWERDOWN", "data": {}})
            continue
        if found and found[-1]["event"] == "SHUTDOWN":  # that was kept, and reset: another life
            found.clear()
        reason = REASONS[int(said[2])] if int(said[2]) < len(REASONS) else ""
        if reason == "guest-panic":
            found.append({"event": "GUEST_PANICKED", "data": {}})
        found.append({"event": "SHUTDOWN", "data": {"reason": reason}})
    return found


def latest(traced: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what QEMU said on stderr and on its monitor the one that goes on to the end.

    On stderr it doesn't say that a reset ended it (on_reboot = "stop"), on the monitor only what we were there for.
    """
    reset = bool(told) and told[-1]["event"] == "SHUTDOWN" and told[-1]["data"].get("reason") == "guest-reset"
    return told if reset or not traced else traced


def read_events(stem: str) -> list[dict[str, Any]]:
    """The last events that a QEMU that an older virtd started wrote; a line cut short by its death is left out.

    The file is QEMU's, which its guest may have taken over: anything can be in it, or in its place.
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


def judge(
    unit: UnitState | None, events: list[dict[str, Any]], request: Request | None, words: str, seen: str
) -> End:
    """The end of a guest.

    `unit` None: systemd knows nothing of it any more; `words`: the last that QEMU wrote to stderr in this run,
    without the lines that `traced` reads; `seen`: when we noticed.
    """
    names = [event["event"] for event in events]
    if "RESET" in names:  # what was before the last reset is another life of the guest
        last = len(names) - 1 - names[::-1].index("RESET")
        events, names = events[last + 1 :], names[last + 1 :]
    shutdown = next((event for event in reversed(events) if event["event"] == "SHUTDOWN"), None)
    why = str((shutdown or {}).get("data", {}).get("reason", ""))
    at = stamp(unit.exited_at) if unit is not None and unit.exited_at else _last(events, seen)
    code = unit.exec_status if unit is not None and unit.exec_code == CLD_EXITED else None
    killer, sender = _signal(unit), ""
    if killer is None and (why == "host-signal" or not why):
        # QEMU catches SIGTERM, SIGINT and SIGHUP and exits with status 0: only its own words tell which it was.
        said = re.search(TERMINATING, words)
        killer = signal_name(int(said[1])) if said else "SIGTERM" if why else None
        sender = f" from {said[3]} (PID {said[2]})" if said and said[2] else ""
    asked = request.verb if request is not None else ""
    by = request.by if request is not None else None

    def end(state: State, reason: str, cause: Cause, who: str | None = None) -> End:
        return End(state, reason, Exit(cause=cause.value, at=at, code=code, signal=killer, by=who))

    if unit is not None and unit.result == "oom-kill":
        return end(State.CRASHED, "killed: out of memory", Cause.OOM)
    if asked == "stop" and (killer in (None, "SIGTERM", "SIGKILL")):
        return end(State.STOPPED, f"stopped by {by}", Cause.STOP, by)
    if asked == "kill" and killer is not None:
        return end(State.CRASHED, f"killed by {by}", Cause.KILLED, by)
    if killer is not None:
        return end(State.CRASHED, f"killed by {killer}{sender}", Cause.KILLED)
    if not events and code == 1 and not words:
        # As -action panic=exit-failure has it; whatever else makes it exit so, it has words for.
        return end(State.CRASHED, "the guest's kernel panicked", Cause.PANIC)
    if "GUEST_PANICKED" in names and (why == "guest-panic" or code not in (0, None)):
        return end(State.CRASHED, "the guest's kernel panicked", Cause.PANIC)
    if why == "host-qmp-quit" and asked != "shutdown":
        return end(State.STOPPED, "ended through its monitor", Cause.HOST_SHUTDOWN)
    if code not in (0, None):
        return end(State.CRASHED, f"QEMU exited with status {code}", Cause.FAILED)
    if asked == "shutdown" and why.startswith("guest-"):
        return end(State.STOPPED, f"shut down by {by}", Cause.SHUTDOWN, by)
    if why.startswith("guest-") and "POWERDOWN" in names and not asked:
        # The power button, and not by us: the unit's ExecStop, while the host goes down.
        return end(State.STOPPED, "shut down with the host", Cause.HOST_SHUTDOWN)
    if why == "guest-reset":
        return end(State.STOPPED, "rebooted itself", Cause.GUEST_SHUTDOWN)
    if why.startswith("guest-") and asked == "shutdown given up":
        # Slow to hear the button, or somebody inside a week later: nobody can tell.
        reason = f"powered off after the shutdown that {by} asked for had timed out"
        return end(State.STOPPED, reason, Cause.GUEST_SHUTDOWN)
    if why.startswith("guest-"):
        return end(State.STOPPED, "powered off by itself", Cause.GUEST_SHUTDOWN)
    if unit is None or unit.unknown:
        return end(State.CRASHED, "ended, and nobody saw how", Cause.UNKNOWN)
    if code != 0:
        return end(State.STOPPED, "ended", Cause.UNKNOWN)
    # In good order, and no more than that is known of it.
    if asked == "shutdown":
        return end(State.STOPPED, f"shut down by {by}", Cause.SHUTDOWN, by)
    if unit.active != "active":  # by itself it would have stayed there, and told that it has exited
        return end(State.STOPPED, "shut down with the host", Cause.HOST_SHUTDOWN)
    return end(State.STOPPED, "powered off or rebooted by itself", Cause.GUEST_SHUTDOWN)


def how(unit: UnitState | None) -> str:
    """How a process ended, for one of which nothing else is known."""
    if (killer := _signal(unit)) is not None:
        return f"was killed by {killer}"
    return "ended at once" if unit is None else f"exited with status {unit.exec_status}"


def _last(events: list[dict[str, Any]], seen: str) -> str:
    """When QEMU last told of something, which is the nearest to its end that anybody knows; else when it was seen."""
    for event in reversed(events):
        match event.get("timestamp"):
            case {"seconds": int(seconds), "microseconds": int(micro)} if 0 < seconds < 1 << 35 and 0 <= micro < 1e6:
                return min(stamp(seconds + micro / 1e6), seen)
            case _:
                pass
    return seen


def _signal(unit: UnitState | None) -> str | None:
    if unit is None or unit.exec_code in (0, CLD_EXITED) or not unit.exec_status:
        return None
    return signal_name(unit.exec_status)
