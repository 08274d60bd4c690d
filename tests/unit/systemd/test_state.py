# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd says of a unit, as a UnitState and in words."""

from __future__ import annotations

from typing import Any

import pytest

from virtd.systemd.state import CLD_DUMPED, CLD_EXITED, CLD_KILLED, UnitState, failure, parse_state

PROPERTIES: dict[str, Any] = {
    "LoadState": "loaded",
    "ActiveState": "failed",
    "SubState": "failed",
    "InvocationID": list(range(16)),
    "Description": "a guest",
    "Job": (0, "/"),
    "MainPID": 0,
    "Result": "exit-code",
    "ExecMainCode": 1,
    "ExecMainStatus": 42,
    "ExecMainExitTimestamp": 0,
}


def test_parsing_a_state() -> None:
    state = parse_state("u.service", PROPERTIES)
    assert state == UnitState(
        name="u.service",
        load="loaded",
        active="failed",
        sub="failed",
        result="exit-code",
        main_pid=0,
        invocation_id="000102030405060708090a0b0c0d0e0f",
        exec_code=CLD_EXITED,
        exec_status=42,
        exited_at=None,
        description="a guest",
    )
    assert not state.running
    assert parse_state("u.service", PROPERTIES | {"MainPID": 7, "InvocationID": []}).running


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (CLD_EXITED, 203, "cannot execute /bin/x: the program is missing or not executable (status 203/EXEC)"),
        (CLD_EXITED, 226, "226/NAMESPACE"),
        (CLD_EXITED, 3, "/bin/x exited with status 3"),
        (CLD_KILLED, 9, "/bin/x was killed by SIGKILL"),
        (CLD_DUMPED, 11, "SIGSEGV"),
        (CLD_KILLED, 99, "signal 99"),
        (0, 0, "systemd could not start the unit: timeout, exit-code"),
    ],
)
def test_failures_in_words(code: int, status: int, words: str) -> None:
    state = parse_state("u.service", PROPERTIES | {"ExecMainCode": code, "ExecMainStatus": status})
    assert words in failure("/bin/x", "timeout", state)


def test_a_failure_without_remains() -> None:
    assert failure("/bin/x", "dependency", None) == "systemd could not start the unit: dependency"
