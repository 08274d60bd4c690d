# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl events: the same stream over restarts of virtd, or word that something is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from virtd.cli.main import main
from virtd.errors import NotFound

if TYPE_CHECKING:
    from tests.doubles.fake_daemon import Call, FakeDaemon


def change(number: int, what: str = "changed") -> dict[str, Any]:
    about = {"kind": "domain", "name": "web1", "state": "running", "reason": "started"}
    if what in ("begun", "lagged"):
        about = {"kind": "", "name": ""}
    return {"sequence": number, "at": "2026-11-23T02:47:54.000001Z", "change": what, **about}


def streaming(daemon: FakeDaemon, *runs: list[dict[str, Any]] | Exception) -> None:
    """Each run of the daemon sends these and goes away; the last ends its stream."""
    left = list(runs)

    def subscribe(call: Call) -> None:
        run = left.pop(0)
        if isinstance(run, Exception):
            raise run
        for item in run[:-1]:
            call.reply(item, continues=True)
        call.reply(run[-1], continues=bool(left))
        if left:
            call.connection.shutdown(2)

    daemon.answers["Subscribe"] = subscribe


def test_it_continues_after_a_restart(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    streaming(daemon, [change(7, "begun"), change(8)], [change(8, "begun"), change(9), change(10)])
    assert main(["events"]) == 0
    assert daemon.asked("Subscribe") == [{}, {"since": 8}]
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["8", "9", "10"]
    assert out.startswith("2026-11-23T02:47:54.000001Z 8 domain web1 running: started\n")
    assert err == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_gap_is_reported(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    gap = NotFound("The events after 8 are no longer on record")
    streaming(daemon, [change(7, "begun"), change(8)], gap, [change(90, "begun")], [change(90, "begun"), change(91)])
    assert main(["events", *(["--json"] if as_json else [])]) == 0
    assert daemon.asked("Subscribe") == [{}, {"since": 8}, {}, {"since": 90}]
    out, err = capsys.readouterr()
    if as_json:
        told = [json.loads(line) for line in out.splitlines()]
        assert [(item["sequence"], item["change"]) for item in told] == [
            (7, "begun"), (8, "changed"), (90, "lagged"), (91, "changed"),
        ]  # fmt: skip
    else:
        assert [line.split()[1] for line in out.splitlines()] == ["8", "91"]
        assert "events are missing here" in err


def test_a_number_that_is_unknown_is_an_error(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["Subscribe"] = NotFound("The events after 3 are no longer on record")
    assert main(["events", "--since=3"]) != 0
    assert "no longer on record" in capsys.readouterr().err
