# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl events: every change of state as it happens, even when virtd is restarted."""

from __future__ import annotations

import json
import sys

from virtd.cli.client import Call
from virtd.cli.exits import OK
from virtd.cli.output import clean
from virtd.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from virtd.cli.client import Parameters, Session
    from virtd.cli.options import Parser


def events(args: argparse.Namespace, session: Session) -> int:
    known: int | None = args.since
    begun = False
    while True:
        try:
            for change in _changes(session, known):
                known = int(change["sequence"])
                if change["change"] == "begun" and begun:
                    continue  # virtd was restarted, and the stream continues where it broke off
                begun = True
                _print(change, as_json=args.json)
            return OK
        except NotFound:
            if not begun:
                raise
        # The log was lost, or a virtd without one has run: the stream begins anew, which must not be overlooked.
        lagged = next(_changes(session, None)) | {"change": "lagged"}
        known = int(lagged["sequence"])
        _print(lagged, as_json=args.json)


def _changes(session: Session, since: int | None) -> Iterator[Parameters]:
    """The replies to Subscribe, across restarts of virtd. Raises NotFound if it can't continue where it was."""
    known = since

    def question(_attempt: int) -> Parameters:
        return {} if known is None else {"since": known}

    with Call(session, "Subscribe", question, more=True) as call:
        while True:
            reply = call.result()
            known = int(reply.parameters["sequence"])
            yield reply.parameters
            if not reply.continues:
                return


def _print(change: Parameters, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(change, separators=(",", ":"), ensure_ascii=False), flush=True)
    elif change["change"] == "lagged":
        print("virtdctl: events are missing here: virtd no longer has them", file=sys.stderr, flush=True)
    elif change["change"] != "begun":
        print(_line(change), flush=True)


def _line(change: Parameters) -> str:
    what = "removed" if change["change"] == "removed" else str(change.get("state"))
    added = " (new)" if change["change"] == "added" else ""
    reason = f": {change['reason']}" if change.get("reason") else ""
    return clean(f"{change['at']} {change['sequence']} {change['kind']} {change['name']} {what}{added}{reason}")


def _options(parser: Parser) -> None:
    parser.add_argument("--since", metavar="N", type=int, help="begin after event N, instead of with the next one")
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {"events": _options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"events": events}
