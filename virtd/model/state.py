# SPDX-License-Identifier: LGPL-2.1-or-later
"""The states of objects, and the operations that make sense in each."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from .. import errors
from ..hints import do

E = TypeVar("E", bound=StrEnum)


def known(word: str, otherwise: E) -> E:
    """The member of that name; a word of a newer version counts as `otherwise`, so that nothing is given up."""
    kind = type(otherwise)
    return kind(word) if word in kind.__members__.values() else otherwise


class State(StrEnum):
    """What a domain or a container is doing. Every state comes with a reason (short text) and a time since when."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"  # asked to shut down, or ending
    CRASHED = "crashed"  # ended abnormally

    @classmethod
    def of(cls, word: str) -> State:
        """The state of that name; one of a newer version counts as running."""
        return known(word, cls.RUNNING)


class Activity(StrEnum):
    """Whether a network or a pool is in use; "starting" and "stopping" are on record while the steps are taken."""

    INACTIVE = "inactive"
    STARTING = "starting"
    ACTIVE = "active"
    STOPPING = "stopping"

    @classmethod
    def of(cls, word: str) -> Activity:
        """The state of that name; one of a newer version counts as active."""
        return known(word, cls.ACTIVE)


class Cause(StrEnum):
    """Why a child ended."""

    GUEST_SHUTDOWN = "guest-shutdown"
    SHUTDOWN = "shutdown"
    STOP = "stop"
    KILLED = "killed"
    OOM = "oom"
    PANIC = "panic"
    FAILED = "failed"
    EXITED = "exited"
    HOST_SHUTDOWN = "host-shutdown"
    UNKNOWN = "unknown"


ALIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.STOPPING})

_ALLOWED: dict[str, frozenset[State]] = {
    "shut down": frozenset({State.RUNNING, State.STOPPING}),
    "reboot": frozenset({State.RUNNING}),
    "suspend": frozenset({State.RUNNING, State.STOPPING, State.PAUSED}),
    "resume": frozenset({State.RUNNING, State.STOPPING, State.PAUSED}),
    "freeze": frozenset({State.RUNNING, State.STOPPING, State.PAUSED}),
    "thaw": frozenset({State.RUNNING, State.STOPPING, State.PAUSED}),
    "run a command in": frozenset({State.RUNNING, State.STOPPING}),
    "send a signal to": ALIVE,
    "attach to the console of": ALIVE,
    "undefine": frozenset({State.STOPPED, State.CRASHED}),
    "remove the state of": frozenset({State.STOPPED, State.CRASHED}),
}


def require(operation: str, name: str, state: State, noun: str = "domain") -> None:
    """Raise InvalidState when `operation` (a verb, as in "reboot") makes no sense in `state`.

    `noun` is what the object is called.
    """
    if state in _ALLOWED[operation]:
        return
    if state in ALIVE and State.STOPPED in _ALLOWED[operation]:
        hint = "Stop it first: " + do("stop", noun, name) + "."
    elif state is State.PAUSED:
        hint = "Resume it first: " + do("resume", noun, name) + "."
    elif state in ALIVE:
        hint = "Wait until it runs: " + do("info", noun, name) + " shows how far it is."
    else:
        hint = "Start it first: " + do("start", noun, name) + "."
    raise errors.InvalidState(f"Cannot {operation} {name}: it is {state}", hint=hint)
