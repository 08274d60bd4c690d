# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make survival`, or python -m tests.proof.survival [--suite S] [--only TEXT] [--write] [--from FILE]: the table.

Every event of events.py is done in a lab of each suite, and every promise is checked after it. The
table is printed; with --write (only for a whole run) it goes into results.json and from there into the README.
With --from, the older package is another commit's, made there by `make rpm VERSION=0.1.0`.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[3]))

from tests.harness import build_rpm
from tests.proof.survival import runner, table
from tests.proof.survival.events import EVENTS, Event
from tests.proof.survival.table import Cell, Results, Verdict


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.proof.survival", description="Do every event, and check every promise after it."
    )
    parser.add_argument("--suite", action="append", choices=runner.SUITES, help="just this one; may be repeated")
    parser.add_argument("--only", action="append", metavar="TEXT", help="events whose title has TEXT in it")
    parser.add_argument("--quick", action="store_true", help="the events that `make test` tries")
    parser.add_argument("--write", action="store_true", help="keep the results, and write the README's table")
    parser.add_argument("--parallel", action="store_true", help="all suites at once")
    parser.add_argument("--from", dest="older", type=Path, metavar="FILE", help="the package to upgrade from: 0.1.0")
    options = parser.parse_args()
    events = [
        event
        for event in EVENTS
        if (event.quick or not options.quick)
        and (not options.only or any(text.lower() in event.title.lower() for text in options.only))
    ]
    titles = [event.title for event in EVENTS]
    packages = {"0.1.0": options.older or build_rpm("0.1.0"), "0.1.1": build_rpm("0.1.1")}
    results = table.load() if options.write else Results({}, {})

    def suite(name: str) -> None:
        def told(subject: str, event: Event, cell: Cell) -> None:
            results.put(subject, event.title, name, cell)
            if options.write:
                table.save(results, titles)  # half an hour of results isn't lost by an interruption

        results.systemd[name] = runner.run(name, packages, told, events)

    names = options.suite or list(runner.SUITES)
    with ThreadPoolExecutor(len(names) if options.parallel else 1) as pool:
        list(pool.map(suite, names))
    made = table.markdown(results, titles, runner.plurals())
    print(made)
    if options.write:
        table.save(results, titles)
        table.write_readme(made)
    cells = [cell for rows in results.cells.values() for row in rows.values() for cell in row.values()]
    return 1 if any(cell.verdict is Verdict.LOST for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
