# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl fsck: whether all sources of information about each object agree."""

from __future__ import annotations

from virtd.cli.client import Call, constant
from virtd.cli.exits import FAILURE, OK
from virtd.cli.output import plural, table, write_json
from virtd.errors import Disconnected

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

WORK = 600.0  # seconds: an object is waited for while an operation on it is under way
AWAY = (
    "Only virtd can compare what it knows. Its start repairs what a crash left: systemctl start virtd. "
    "Until then, see: systemctl list-units 'virtd-*'; systemd-analyze fdstore virtd.service; ls /run/virtd/*"
)


def fsck(args: argparse.Namespace, session: Session) -> int:
    """Exit status 0 if nothing differs (any more), 1 if something does, 3 (in main) without virtd.

    An interrupted repair may be requested again: it begins with a check.
    """
    method = "Repair" if args.repair else "Check"
    try:
        with Call(session, method, constant({}), limit=WORK) as call:
            answer = call.result().parameters
    except Disconnected as exc:
        raise Disconnected(exc.message, hint=AWAY) from exc
    rows = answer.get("differences") or []
    left = [row for row in rows if not row.get("repaired")]
    if args.json:
        write_json(answer, args.json)
        return FAILURE if left else OK
    if not rows:
        print(f"{plural(int(answer.get('objects') or 0), 'object')} checked: no differences.")
        return OK
    shown = [(str(row.get("object") or "-"), str(row.get("kind")), _what(row), str(row.get("text"))) for row in rows]
    table(("OBJECT", "KIND", "REPAIR", "DIFFERENCE"), shown, legend=not args.no_legend)
    if not args.no_legend:
        print(f"\n{_summary(rows, left, repaired=args.repair)}")
    return FAILURE if left else OK


def _what(row: dict[str, object]) -> str:
    if row.get("repaired"):
        return f"done: {row.get('repair')}"
    return str(row.get("repair") or "by a person only")


def _summary(rows: list[dict[str, object]], left: list[dict[str, object]], *, repaired: bool) -> str:
    found = f"{plural(len(rows), 'difference')} found"
    if repaired:
        return f"{found}, {len(rows) - len(left)} repaired."
    can = sum(bool(row.get("repair")) for row in left)
    return f"{found}, {can} of which virtdctl fsck --repair can repair."


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--repair", action="store_true", help="repair what can be repaired without touching anything that runs"
    )
    parser.legend()
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {"fsck": _options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"fsck": fsck}
