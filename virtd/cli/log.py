# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl log: a domain's console log, or what QEMU wrote to its stderr, through all rotated files."""

from __future__ import annotations

import sys
from functools import partial

from virtd.cli.client import Call
from virtd.cli.exits import OK
from virtd.cli.follow import UNKNOWN, Cursor, write_all
from virtd.cli.options import line_count
from virtd.cli.output import write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from virtd.cli.client import Parameters, Session
    from virtd.cli.options import Parser

TAIL = 10  # lines that `-f` begins with, like tail(1) and journalctl


def _ask(cursor: Cursor, wait: bool, attempt: int) -> Parameters:  # noqa: FBT001 (bound by partial)
    return cursor.parameters(wait=wait and attempt == 0)


def chunks(session: Session, cursor: Cursor, *, follow: bool, method: str = "Follow") -> Iterator[bytes]:
    """All bytes from `cursor` on: to the end of the newest file, or with `follow` until the guest ends."""
    while True:
        # The first question is where to begin, or after a restart of the daemon whether something was missed: both
        # are answered at once.
        wait = follow and cursor.file is not None
        limit = None if wait else session.patience
        ask = partial(_ask, cursor, wait)
        with Call(session, method, ask, limit=limit) as call:
            moved = cursor.accept(call.result())
        got = False
        while data := cursor.read():
            got = True
            yield data
        if not moved and not got and (cursor.ended or not follow):
            return


def logging(method: str = "Follow") -> Callable[[argparse.Namespace, Session], int]:
    """The command that shows a log by `method`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        lines = args.lines if args.lines is not None else TAIL if args.follow else -1
        cursor = Cursor(args.name, "log" if args.qemu else "console", lines, _say)
        try:
            source = chunks(session, cursor, follow=args.follow, method=method)
            if args.json:
                _as_json(source, cursor, args.json)
            elif sys.stdout.isatty() and not args.raw:
                _shown(source)
            else:
                for data in source:
                    write_all(1, data)
        finally:
            cursor.close()
        return OK

    return run


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shown(source: Iterator[bytes]) -> None:
    """For display: without anything that the terminal would obey."""
    from virtd.cli.filtered import Filter

    shown = Filter()
    try:
        for data in source:
            write_all(1, shown.pass_on(data))
    finally:
        write_all(1, shown.pass_on(b"", last=True))


def _as_json(source: Iterator[bytes], cursor: Cursor, style: str) -> None:
    """One object for each line: its text without the line end, its file, and the offset in it.

    The first line after missing ones also has `skipped`: the number of missing bytes, or null if that isn't known.
    """
    rest = b""
    begun: tuple[str | None, int] | None = None
    skipped = 0
    for data in source:
        position = cursor.offset - len(data)
        at = 0
        if cursor.skipped:
            if begun:  # its end is missing
                _line(rest, begun, style, skipped)
                rest, begun = b"", None
            skipped, cursor.skipped = cursor.skipped, 0
        while (end := data.find(b"\n", at)) >= 0:
            _line(rest + data[at:end], begun or (cursor.file, position + at), style, skipped)
            rest, begun, at, skipped = b"", None, end + 1, 0
        if at < len(data):
            # Rotation may cut a line in two; it belongs to the file in which it begins.
            begun = begun or (cursor.file, position + at)
            rest += data[at:]
    if begun:
        _line(rest, begun, style, skipped)


def _line(line: bytes, place: tuple[str | None, int], style: str, skipped: int) -> None:
    file, offset = place
    shown = {"file": file, "offset": offset, "line": line.removesuffix(b"\r").decode(errors="replace")}
    if skipped:
        shown["skipped"] = skipped if skipped != UNKNOWN else None
    write_json(shown, style)
    sys.stdout.flush()


def options(parser: Parser, noun: str = "domain", what: str = "QEMU itself") -> None:
    parser.name(noun)
    parser.add_argument("-f", "--follow", action="store_true", help="continue as the guest writes, until it ends")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N|all",
        type=line_count,
        help=f"begin with the last N lines (default: all, or {TAIL} with -f)",
    )
    parser.add_argument("--qemu", "--stderr", action="store_true", help=f"show what {what} wrote to its stderr")
    parser.add_argument("--raw", action="store_true", help="print every byte unchanged, also on a terminal")
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {"log": options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"log": logging()}
