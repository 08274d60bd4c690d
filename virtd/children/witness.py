# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a child ended if its unit no longer says: from PID 1's entries in the journal, or from the kernel.

After `systemctl reset-failed`, or if somebody stops a unit while virtd is away, systemd forgets the unit with its
exit status. An ExecStopPost= could record it, but would lengthen each stop by a process (at least 25 ms of PID 1's
time, measured on 257); what systemd logs costs nothing. Facts: sd-messages.h, and `journalctl -o verbose _PID=1`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .. import errors
from ..systemd.jobs import Patience
from ..systemd.state import CLD_DUMPED, CLD_EXITED, CLD_KILLED, UnitState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .. import process
    from ..systemd.units import Units

PROCESS_EXIT = "98e322203f7a4ed290d09fe03c09fe15"  # "Main process exited, code=killed, status=9/KILL"; failures only
UNIT_FAILURE = "d9b373ed55a64feb8242e02dbe79a49c"  # "Failed with result 'signal'."
UNIT_SUCCESS = "7ad2d189f7e94e70a38c781354912448"  # "Deactivated successfully."
CODES = {"exited": CLD_EXITED, "killed": CLD_KILLED, "dumped": CLD_DUMPED}
RESTART_LIMIT = 10.0  # seconds
LOOKS = (0.0, 0.05, 0.2, 0.5)  # seconds before each look: the latest entries may not be written yet


class Told(NamedTuple):
    """A journal entry of PID 1 about a unit; `at` in seconds since the epoch."""

    message_id: str
    at: float
    fields: Mapping[str, Any]


async def ended(manager: Units, unit: str, invocation_id: str, seen: process.Seen | None = None) -> UnitState | None:
    """Like Units.ended; what the unit doesn't say about that run is looked up. `seen`: what we have observed
    ourselves.

    If the state is running, somebody has started the unit again.
    """
    patience = Patience(RESTART_LIMIT, f"{unit} is still being stopped")
    while (state := await manager.ended(unit, invocation_id)) is not None:
        if state.running:
            return state
        # A restart passes through this state, and isn't an end until it is known what follows.
        if not state.job and state.active not in ("deactivating", "activating"):
            break
        try:
            await patience.pause()
        except errors.TimedOut:
            break
    if _tells(state, invocation_id):
        return state
    if state is not None and seen is not None and seen.status is not None:
        return by_status(unit, state, seen.at, seen.status)
    if not invocation_id:  # a crash before it was recorded: any run might be meant
        return _known(state)
    for pause in LOOKS:
        await asyncio.sleep(pause)
        try:
            told = await asyncio.to_thread(entries, unit, invocation_id)
        except (ImportError, OSError, ValueError):  # no journal
            break
        if (found := judge(unit, invocation_id, told)) is not None:
            return found
    if seen is not None and seen.status is not None:
        return by_status(unit, state, seen.at, seen.status)
    return _known(state)


def _tells(state: UnitState | None, invocation_id: str) -> bool:
    return state is not None and state.exec_code != 0 and state.invocation_id in ("", invocation_id)


def _known(state: UnitState | None) -> UnitState | None:
    """None for a unit that has ended and doesn't say how its main process did: its "success" is only a default.

    Either it was loaded again from its file after a reset-failed, and never ran, or this is a race in systemd 257 and
    later. With PrivatePIDs=, PID 1 learns of a process from its parent; as long as that hasn't ended, the new process
    counts as nobody's child ("Supervising process 4711 which is not our child"). If such a process ends, and its
    cgroup is found to be empty before the SIGCHLD arrives, its unit becomes "exited", and the status is discarded.
    """
    if state is not None and not state.running and state.exec_code == 0 and state.result in ("", "success"):
        return None
    return state


def by_status(unit: str, state: UnitState | None, at: float, status: int) -> UnitState:
    """The unit's state with what is known from elsewhere: `status` as in waitpid(2)."""
    if os.WIFSIGNALED(status):
        dumped = os.WCOREDUMP(status)
        code, number = CLD_DUMPED if dumped else CLD_KILLED, os.WTERMSIG(status)
        result = "core-dump" if dumped else "signal"
    else:
        code, number = CLD_EXITED, os.WEXITSTATUS(status)
        result = "exit-code" if number else "success"
    base = state if state is not None else _gone(unit)
    if base.result not in ("", "success"):
        result = base.result
    return msgspec.structs.replace(base, result=result, exec_code=code, exec_status=number, exited_at=at)


def judge(unit: str, invocation_id: str, told: Iterable[Told]) -> UnitState | None:
    """What these entries say about the end of the unit's main process; None if they don't mention it.

    A "success" may be an exit status of 0 or a SIGTERM: then `exec_code` is 0, because nobody knows.
    """
    result, code, status, at = "", 0, 0, None
    for entry in told:
        match entry.message_id:
            case x if x == PROCESS_EXIT:
                code, status = CODES.get(str(entry.fields.get("EXIT_CODE")), 0), _status(entry.fields)
                at = entry.at
            case x if x == UNIT_FAILURE:
                result = str(entry.fields.get("UNIT_RESULT", "failed"))
                at = at or entry.at
            case x if x == UNIT_SUCCESS:
                result = "success"
                at = at or entry.at
            case _:
                pass
    if at is None:
        return None
    return msgspec.structs.replace(
        _gone(unit),
        result=result or "failed",
        invocation_id=invocation_id,
        exec_code=code,
        exec_status=status,
        exited_at=at,
    )


def _gone(unit: str) -> UnitState:
    """The state of a unit that PID 1 has forgotten."""
    return UnitState(
        name=unit,
        load="not-found",
        active="inactive",
        sub="dead",
        result="",
        main_pid=0,
        invocation_id="",
        exec_code=0,
        exec_status=0,
        exited_at=None,
        description="",
    )


def _status(fields: Mapping[str, Any]) -> int:
    """Parse EXIT_STATUS: a number, or a signal's name."""
    text = str(fields.get("EXIT_STATUS", ""))
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError, KeyError):
        return int(signal.Signals[f"SIG{text.removeprefix('SIG')}"])
    return 0


def entries(unit: str, invocation_id: str) -> list[Told]:
    """PID 1's entries about that run of the unit. Raises ImportError or OSError. It may take some time."""
    from systemd import journal

    found = []
    with journal.Reader(flags=journal.SYSTEM_ONLY | journal.LOCAL_ONLY) as reader:
        reader.add_match(_PID="1", UNIT=unit, INVOCATION_ID=invocation_id)
        for entry in reader:
            moment = entry.get("_SOURCE_REALTIME_TIMESTAMP") or entry["__REALTIME_TIMESTAMP"]
            found.append(Told(entry_id(entry.get("MESSAGE_ID")), moment.timestamp(), entry))
    return found


def entry_id(value: Any) -> str:
    """A MESSAGE_ID, which systemd-python has turned into a UUID."""
    return str(value or "").replace("-", "")
