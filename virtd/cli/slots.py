# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl slots: which descriptors systemd keeps for whom. systemd-analyze fdstore doesn't see into boxes."""

from __future__ import annotations

from virtd.cli.client import Call, constant
from virtd.cli.exits import OK
from virtd.cli.output import plural, table, write_json
from virtd.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from virtd.cli.client import Session
    from virtd.cli.options import Parser


def slots(args: argparse.Namespace, session: Session) -> int:
    with Call(session, "Slots", constant({})) as call:
        answer = call.result().parameters
    rows = [row for row in answer.get("slots") or [] if not args.name or _belongs(str(row.get("name")), args.name)]
    if args.name and not rows:
        raise NotFound(
            f"No slot is kept for {args.name}", hint="virtdctl slots shows all; only running objects have any."
        )
    if args.json:
        write_json(rows, args.json)
        return OK
    shown = [(str(row.get("name")), _entry(row), str(row.get("what"))) for row in rows]
    table(("SLOT", "ENTRY", "WHAT"), shown, legend=not args.no_legend)
    if not args.no_legend:
        entries = len({row.get("kept_as") for row in rows})
        print(f"\n{plural(len(rows), 'slot')} in {entries} of systemd's entries.")
    return OK


def _belongs(slot: str, name: str) -> bool:
    """Whether it belongs to the object `name`: "web1" or "qemu/web1"."""
    return slot.startswith(f"{name}/") or slot.split("/")[1:2] == [name]


def _entry(row: dict[str, object]) -> str:
    return "its own" if row.get("kept_as") == row.get("name") else str(row.get("kept_as"))


def _options(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="only those of this object: web1, or qemu/web1")
    parser.legend()
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {"slots": _options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"slots": slots}
