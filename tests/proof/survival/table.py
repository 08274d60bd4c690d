# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run has found, kept as JSON, and the table that is made from it: for a terminal and for the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[3]
RESULTS = Path(__file__).with_name("results.json")
README = TOP / "README.md"
BEGIN = "<!-- survival table: written by `make survival`, not by hand -->"
END = "<!-- end of the survival table -->"


class Verdict(StrEnum):
    """What one event did to a subject; the worst of its findings."""

    KEPT = "kept"
    DEGRADED = "degraded"
    LOST = "lost"
    ABSENT = "absent"


class Finding(NamedTuple):
    """One promise that wasn't held. DEGRADED: `virtdctl status` says so, nothing else suffers; LOST: all others."""

    verdict: Verdict
    what: str


class Cell(NamedTuple):
    """One event, one suite."""

    verdict: Verdict
    what: str = ""

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Cell:
        found = list(dict.fromkeys(findings))
        if not found:
            return cls(Verdict.KEPT)
        worst = Verdict.LOST if any(one.verdict is Verdict.LOST for one in found) else Verdict.DEGRADED
        return cls(worst, ", ".join(one.what for one in found if one.verdict is worst))

    @property
    def text(self) -> str:
        if self.verdict is Verdict.ABSENT:
            return self.what
        return f"{self.verdict} ({self.what})" if self.what else str(self.verdict)


class Results(NamedTuple):
    """All that is known: `systemd` by suite, and cells by subject, event (its title) and suite."""

    systemd: dict[str, str]
    cells: dict[str, dict[str, dict[str, Cell]]]

    def put(self, subject: str, event: str, suite: str, cell: Cell) -> None:
        self.cells.setdefault(subject, {}).setdefault(event, {})[suite] = cell


def load(path: Path = RESULTS) -> Results:
    if not path.exists():
        return Results({}, {})
    stored = json.loads(path.read_text())
    cells = {
        subject: {
            event: {suite: Cell(Verdict(verdict), what) for suite, (verdict, what) in row.items()}
            for event, row in rows.items()
        }
        for subject, rows in stored["cells"].items()
    }
    return Results(stored["systemd"], cells)


def save(results: Results, titles: Sequence[str], path: Path = RESULTS) -> None:
    """Keep what is known of these events, in this order."""
    cells = {
        subject: {title: rows[title] for title in titles if title in rows} for subject, rows in results.cells.items()
    }
    path.write_text(json.dumps({"systemd": results.systemd, "cells": cells}, indent=1) + "\n")


def together(cells: Mapping[str, Cell | None], plurals: Mapping[str, str]) -> str:
    """One cell for all subjects: what is so of all of them, or "kept" and, by name, what differs of some."""
    named: dict[Cell | None, list[str]] = {}
    for subject, cell in cells.items():
        named.setdefault(cell, []).append(plurals[subject])
    if len(named) == 1:
        (cell,) = named
        return cell.text if cell else "not run"
    parts = [str(Verdict.KEPT)] if Cell(Verdict.KEPT) in named else []
    for cell, who in named.items():
        if cell is None:
            parts.append(f"{listed(who)}: not run")
        elif cell.verdict is not Verdict.KEPT:
            parts.append(f"{listed(who)}: {cell.what if cell.verdict is Verdict.DEGRADED else cell.text}")
    return "; ".join(parts)


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def markdown(results: Results, titles: Iterable[str], plurals: Mapping[str, str]) -> str:
    """A row for each of `titles` that was run, in that order, and a column for each suite.

    `plurals` has what each subject is called in a cell; one that no run has had yet is left out.
    """
    suites = sorted(results.systemd, key=lambda suite: int(results.systemd[suite]))
    subjects = {name: rows for name in plurals if (rows := results.cells.get(name))}
    lines = ["| Event | " + " | ".join(f"systemd {results.systemd[suite]}" for suite in suites) + " |"]
    lines.append("|---" * (len(suites) + 1) + "|")
    for title in titles:
        if any(title in rows for rows in subjects.values()):
            row = [{name: rows.get(title, {}).get(suite) for name, rows in subjects.items()} for suite in suites]
            lines.append(f"| {title} | " + " | ".join(together(cells, plurals) for cells in row) + " |")
    return "\n".join(lines)


def in_readme(text: str) -> str:
    """The part of the README between the markers."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def write_readme(table: str, path: Path = README) -> None:
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{path} has no markers for the table")
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
