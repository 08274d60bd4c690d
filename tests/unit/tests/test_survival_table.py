# SPDX-License-Identifier: LGPL-2.1-or-later
"""The README's table of what survives what is made from the results of a run, and says what it may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proof.survival import runner, table
from tests.proof.survival.events import EVENTS
from tests.proof.survival.table import Cell, Finding, Results, Verdict

TITLES = [event.title for event in EVENTS]


def test_the_readme_has_the_results() -> None:
    made = table.markdown(table.load(), TITLES, runner.plurals())
    assert table.in_readme(table.README.read_text()) == made
    assert table.README.read_text().count(TITLES[0]) == 1, "a second table, outside of the markers"
    assert len(made.splitlines()) == 2 + len(TITLES)


def test_what_the_table_says_depends_on_every_result() -> None:
    results = table.load()
    made = table.markdown(results, TITLES, runner.plurals())
    for subject, rows in results.cells.items():
        for title, row in rows.items():
            for suite in row:
                lost = table.load()
                lost.put(subject, title, suite, Cell(Verdict.LOST, "another PID"))
                changed = table.markdown(lost, TITLES, runner.plurals())
                assert changed != made
                assert f"{runner.plurals()[subject]}: lost (another PID)" in changed


def test_every_event_was_tried_on_every_suite() -> None:
    results = table.load()
    assert set(results.systemd) == set(runner.SUITES)
    assert set(results.cells) == set(runner.plurals())
    for rows in results.cells.values():
        assert list(rows) == TITLES
        for event in EVENTS:
            for suite in runner.SUITES:
                cell = rows[event.title][suite]
                known = int(results.systemd[suite]) >= event.since
                assert (cell.verdict is Verdict.ABSENT) is not known
                assert cell.verdict is not Verdict.LOST or cell.what
                assert cell.verdict is not Verdict.DEGRADED or cell.what


def test_a_cell_is_as_bad_as_the_worst() -> None:
    degraded, lost = Finding(Verdict.DEGRADED, "no console"), Finding(Verdict.LOST, "another PID")
    assert Cell.of([]).text == "kept"
    assert Cell.of([degraded, degraded]).text == "degraded (no console)"
    assert Cell.of([degraded, lost]).text == "lost (another PID)"


PLURALS = {"guest": "guests", "pool": "pools", "container": "containers", "new": "not run yet"}
KEPT, NO_CONSOLE = Cell(Verdict.KEPT), Cell(Verdict.DEGRADED, "no console")
NO_MOUNT = Cell(Verdict.LOST, "no mount")


@pytest.mark.parametrize(
    ("guest", "pool", "container", "text"),
    [
        (KEPT, KEPT, KEPT, "kept"),
        (Cell(Verdict.ABSENT, "no such command"),) * 3 + ("no such command",),
        (NO_CONSOLE, KEPT, NO_CONSOLE, "kept; guests and containers: no console"),
        (NO_CONSOLE, NO_CONSOLE, NO_CONSOLE, "degraded (no console)"),
        (KEPT, NO_MOUNT, NO_CONSOLE, "kept; pools: lost (no mount); containers: no console"),
        (NO_CONSOLE, NO_MOUNT, NO_CONSOLE, "guests and containers: no console; pools: lost (no mount)"),
        (KEPT, None, KEPT, "kept; pools: not run"),
        (None, None, None, "not run"),
    ],
)  # fmt: skip
def test_a_cell_names_what_differs(guest: Cell | None, pool: Cell | None, container: Cell | None, text: str) -> None:
    assert table.together({"guest": guest, "pool": pool, "container": container}, PLURALS) == text


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    results = Results({"trixie": "257", "bookworm": "252"}, {})
    results.put("guest", TITLES[0], "trixie", Cell(Verdict.KEPT))
    results.put("guest", TITLES[0], "bookworm", Cell(Verdict.DEGRADED, "no console"))
    results.put("guest", TITLES[1], "trixie", Cell(Verdict.KEPT))
    table.save(results, TITLES[1::-1], tmp_path / "results.json")
    assert table.load(tmp_path / "results.json") == results
    assert list(table.load(tmp_path / "results.json").cells["guest"]) == TITLES[1::-1]
    table.save(results, TITLES[:1], tmp_path / "results.json")
    results = table.load(tmp_path / "results.json")
    made = table.markdown(results, TITLES, PLURALS).splitlines()
    assert made[0] == "| Event | systemd 252 | systemd 257 |"
    assert made[2:] == [f"| {TITLES[0]} | degraded (no console) | kept |"]
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    table.write_readme("new", readme)
    assert readme.read_text() == f"above\n{table.BEGIN}\nnew\n{table.END}\nbelow\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        table.write_readme("new", readme)
