# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a guest ended, put together from its unit, QEMU's event journal and what was asked of it."""

from __future__ import annotations

import os
import re
from typing import Any

from ...model.state import Cause, State
from ...records import Exit, stamp
from ...units import UnitState, signal_name
from ..guest import End, Request

CLD_EXITED = 1  # siginfo(2); KILLED is 2, DUMPED 3
TERMINATING = r"terminating on signal (\d+) from pid (\d+) \((.*)\)"  # QEMU's own words on stderr
TAIL = 1 << 16  # the last events tell; a guest can make any number of them


def read_events(stem: str) -> list[dict[str, Any]]:
    """The last events that QEMU wrote; a line cut short by its death is left out.

    The file is QEMU's, which its guest may have taken over: anything can be in it.
    """
    import json  # 1 ms, which no start of the daemon needs to spend

    try:
        with open(f"{stem}.out", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            lines = file.read(TAIL).split(b"\n")
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

    `unit` None: systemd knows nothing of it any more; `words`: the last that QEMU wrote to stderr; `seen`: when we
    noticed.
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
    if killer is None and why == "host-signal":
        # QEMU catches SIGTERM, SIGINT and SIGHUP and exits with status 0: only its own words tell which it was.
        said = re.search(TERMINATING, words)
        killer = signal_name(int(said[1])) if said else "SIGTERM"
        sender = f" from {said[3]} (PID {said[2]})" if said else ""
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
    return end(State.STOPPED, "ended", Cause.UNKNOWN)


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
