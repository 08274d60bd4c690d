# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of rules by which the end of a guest is judged: its order decides."""

from __future__ import annotations

import re
from pathlib import Path

from virtd.guests.verdict import Evidence, Request, Rule, deciding, otherwise
from virtd.model.state import Cause, State

INTERNALS = Path(__file__).parents[3] / "docs/internals"
ROW = re.compile(r"\| \d+ \| ([^|]+) \| (stopped|crashed), ([a-z-]+) \|")


def documented(page: str) -> list[tuple[str, str, str]]:
    """The rules that a page lists, in its order: name, state and cause."""
    return [(match[1], match[2], match[3]) for match in ROW.finditer((INTERNALS / page).read_text())]


def evidence(verb: str, code: int | None) -> Evidence:
    request = Request(verb, "ann", "") if verb else None
    return Evidence(unit=None, request=request, at="now", code=code, killer=None)


RULES: tuple[Rule[Evidence], ...] = (
    Rule("stop", lambda e: e.asked == "stop", State.STOPPED, Cause.STOP, "stopped by {e.by}", credit=True),
    Rule("failure", lambda e: bool(e.code), State.CRASHED, Cause.FAILED, "status {e.code}, not {e.by}"),
    Rule("rest", otherwise, State.STOPPED, Cause.UNKNOWN, "ended"),
)


def test_the_first_rule_that_applies_decides() -> None:
    both = evidence("stop", 3)
    assert deciding(RULES, both).name == "stop"
    assert deciding(RULES[::-1], both).name == "rest"
    assert deciding((RULES[1], RULES[0], RULES[2]), both).name == "failure"
    assert deciding(RULES, evidence("", 0)).name == "rest"


def test_a_verdict_names_who_asked_where_the_rule_says_so() -> None:
    known = evidence("stop", 3)
    stop, failure = (rule.verdict(known) for rule in RULES[:2])
    assert (stop.state, stop.reason, stop.exit.by, stop.exit.code) == ("stopped", "stopped by ann", "ann", 3)
    assert (failure.state, failure.reason, failure.exit.by) == ("crashed", "status 3, not ann", None)


def test_what_a_person_is_called_is_no_format() -> None:
    known = Evidence(unit=None, request=Request("stop", "{e.at}", ""), at="now", code=0, killer=None)
    assert RULES[0].verdict(known).reason == "stopped by {e.at}"
