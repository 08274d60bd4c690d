# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a job is: its state, what it is for, what it runs, and what its record says of that."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ...model.state import known
from .backend import Meta

if TYPE_CHECKING:
    from ...children.hardening import Property

DRIVER = "storage"
TOOL = "tool"  # the verb of a short program that no person has asked for


class State(StrEnum):
    """What a job is doing."""

    RUNNING = "running"
    WAITING = "waiting"  # for its client
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def of(cls, word: str) -> State:
        """The state of that name; a word of a newer version counts as running: its unit will tell."""
        return known(word, cls.RUNNING)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is for, as its record has it.

    `meta`: of the volume that it makes (None: it makes none). `reads` and `writes`: the volumes, "POOL/NAME", that
    nobody may write or use meanwhile.
    """

    verb: str
    pool: str
    volume: str
    by: str
    token: str = ""
    meta: Meta | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    size: int | None = None
    undo: bool = True  # whether a failure removes what it made; otherwise it leaves the volume damaged
    note: str = ""

    def made(self, job: str) -> Meta:
        """The record of the volume that job `job` has made."""
        return msgspec.structs.replace(self.meta or Meta(), job=job)


class Data(msgspec.Struct, frozen=True, omit_defaults=True):
    """The driver's part of a job's record. `cancelled`: by whom; `error`: why it failed. Either may be ""."""

    task: Task
    cancelled: str = ""
    error: str = ""


class Program(NamedTuple):
    """What a job runs: as whom, and in which sandbox.

    `source`: the descriptor that becomes its standard input, and stays the caller's; -1: it reads nothing.
    """

    argv: tuple[str, ...]
    properties: tuple[Property, ...]
    user: str = ""
    group: str = ""
    source: int = -1
