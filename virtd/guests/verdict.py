# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a guest ended: a table of rules; the first one that applies decides.

Each driver collects its own evidence and has its own table. The order is part of the meaning: a rule may assume
that none of those before it applies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import msgspec

from ..model.state import Cause, State
from ..records import Exit, stamp
from ..systemd.state import UnitState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Request(msgspec.Struct, frozen=True):
    """The last request of a person: `verb` (shutdown, stop, kill, reboot), `by` whom, `at` when."""

    verb: str
    by: str
    at: str


class End(msgspec.Struct, frozen=True):
    """The verdict, ready for the record."""

    state: State
    reason: str
    exit: Exit


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of an end.

    `unit` is None once systemd has forgotten it; `at` is when it ended, as records have it; `code` the exit status or
    None; `killer` the name of the signal or None.
    """

    unit: UnitState | None
    request: Request | None
    at: str
    code: int | None
    killer: str | None

    @property
    def asked(self) -> str:
        """The verb of the last request, or ""."""
        return self.request.verb if self.request is not None else ""

    @property
    def by(self) -> str | None:
        """Who made the last request."""
        return self.request.by if self.request is not None else None

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel ended it for want of memory."""
        return self.unit is not None and self.unit.result == "oom-kill"

    @property
    def overdue(self) -> bool:
        """Whether systemd shut it down because its unit's time was up, and nobody had asked for its end."""
        return self.unit is not None and self.unit.result == "timeout" and not self.asked

    @property
    def unseen(self) -> bool:
        """Whether systemd doesn't know how it ended."""
        return self.unit is None or self.unit.unknown


OVERDUE = "shut down by systemd: the time that its unit may run was up (RuntimeMaxSec=)"

E = TypeVar("E", bound=Evidence)


class Rule(NamedTuple, Generic[E]):
    """One line of the table. `reason` is formatted with the evidence as `e`; `credit`: the exit names who asked."""

    name: str
    applies: Callable[[E], bool]
    state: State
    cause: Cause
    reason: str
    credit: bool = False

    def verdict(self, evidence: E) -> End:
        return End(
            self.state,
            self.reason.format(e=evidence),
            Exit(
                cause=self.cause.value,
                at=evidence.at,
                code=evidence.code,
                signal=evidence.killer,
                by=evidence.by if self.credit else None,
            ),
        )


def deciding(rules: Iterable[Rule[E]], evidence: E) -> Rule[E]:
    """The first rule that applies; the last one of a table always does."""
    return next(rule for rule in rules if rule.applies(evidence))


def otherwise(_evidence: Evidence) -> bool:
    """The condition of a table's last rule."""
    return True


def exit_status(unit: UnitState | None) -> int | None:
    """The main process's exit status, if it exited by itself."""
    return unit.exit_code if unit is not None else None


def fatal_signal(unit: UnitState | None) -> str | None:
    """The name of the signal that killed the main process, if one did."""
    return unit.killed_by if unit is not None else None


def exited_at(unit: UnitState | None, otherwise: str) -> str:
    """When the main process ended, as records have it; `otherwise` when systemd doesn't know."""
    return stamp(unit.exited_at) if unit is not None and unit.exited_at else otherwise
