# SPDX-License-Identifier: LGPL-2.1-or-later
"""The quick part of the survival table: `make survival` does all of it, on all suites."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.conftest import SUITE
from tests.proof.survival import runner
from tests.proof.survival.events import EVENTS, Event
from tests.proof.survival.table import Cell, Verdict

pytestmark = pytest.mark.live


def test_nothing_is_lost(packages: dict[str, Path]) -> None:
    cells: dict[str, Cell] = {}

    def told(subject: str, event: Event, cell: Cell) -> None:
        cells[f"{subject}: {event.title}"] = cell

    runner.run(SUITE, packages, told, [event for event in EVENTS if event.quick])
    kept = Verdict.KEPT, Verdict.ABSENT
    assert {name: cell.text for name, cell in cells.items() if cell.verdict not in kept} == {}
