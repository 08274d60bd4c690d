# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/unit/host/test_host_model.py with the real parts: systemd, QEMU, the daemon killed in mid-operation.

`make model` tries more of it; VIRTD_EXAMPLES and VIRTD_STEPS say how much.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.doubles.model import ALIVE, NAMES, OPERATIONS, after
from tests.harness import LAB, Lab
from tests.proof.sweep import setup

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live


class Refused(Exception):
    """virtd said no."""


class Agent:
    """tests/proof/sweep/agent.py in the lab."""

    def __init__(self, lab: Lab) -> None:
        command = f"cd {setup.INSIDE} && exec python3 -m tests.proof.sweep.agent"
        self._process = subprocess.Popen(
            [LAB, "exec", lab.name, "--", "sh", "-c", command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, word: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([word, arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "refused" in answer:
            raise Refused(answer["refused"])
        assert "broken" not in answer, f"{word} {arguments}: {answer['broken']}"
        return answer["value"]

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(60)


@pytest.fixture
def agent(lab: Lab) -> Iterator[Agent]:
    setup.install(lab)
    agent = Agent(lab)
    yield agent
    agent.close()


def test_any_sequence_of_operations_kills_and_deaths(agent: Agent) -> None:
    class Domains(RuleBasedStateMachine):
        """`expected`: state and PID of each domain that is defined."""

        def __init__(self) -> None:
            super().__init__()
            self.expected: dict[str, tuple[str, int]] = {}
            for name in agent("look"):
                for operation in ("Stop", "Undefine"):
                    agent("do", operation=operation, name=name)
            for name in ("web1", "web2"):
                for operation in ("Define", "Start"):
                    agent("do", operation=operation, name=name)
            self.expected = self.found()

        def found(self) -> dict[str, tuple[str, int]]:
            return {name: (state, pid) for name, (state, pid) in agent("look").items()}

        def settle(self, name: str, *allowed: str) -> None:
            """Nothing but `name` has changed, and that is in an allowed state, as the same process if it lives."""
            found = self.found()
            state, pid = found.get(name, ("", 0))
            before = self.expected.get(name, ("", 0))
            assert state in allowed, f"{name} is {state}, not {' or '.join(allowed)}"
            if before[0] in ALIVE and state in ALIVE:
                assert pid == before[1], f"{name} has become another process"
            others = [{k: v for k, v in seen.items() if k != name} for seen in (found, self.expected)]
            assert others[0] == others[1]
            self.expected = found

        @rule(operation=OPERATIONS, name=NAMES)
        def do(self, operation: str, name: str) -> None:
            state = self.expected.get(name, ("", 0))[0]
            try:
                wanted = after(operation, state)
            except LookupError:
                with pytest.raises(Refused):
                    agent("do", operation=operation.capitalize(), name=name)
                return
            agent("do", operation=operation.capitalize(), name=name)
            self.settle(name, wanted)

        @rule(operation=OPERATIONS, name=NAMES, milliseconds=st.integers(0, 120))
        def do_and_kill(self, operation: str, name: str, milliseconds: int) -> None:
            """The next daemon finds the domain as before, or as after."""
            state = self.expected.get(name, ("", 0))[0]
            allowed = {state}
            try:
                allowed.add(after(operation, state))
                if operation in ("start", "undefine") and state == "crashed":
                    # Rolled back, which is later than the crash; or its record is gone, and its definition not yet.
                    allowed.add("stopped")
            except LookupError:
                pass
            agent("do_and_kill", operation=operation.capitalize(), name=name, after=milliseconds / 1000)
            self.settle(name, *allowed)

        @rule(name=NAMES, away=st.booleans())
        def a_guest_dies(self, name: str, away: bool) -> None:
            if self.expected.get(name, ("", 0))[0] in ALIVE:
                agent("die", name=name, away=away)
                self.settle(name, "crashed")

        @rule(away=st.booleans())
        def somebody_meddles_with_a_network(self, away: bool) -> None:
            agent("meddle", away=away)

        @rule()
        def restart(self) -> None:
            agent("restart")

        @invariant()
        def everything_agrees(self) -> None:
            assert self.found() == self.expected

    run_state_machine_as_test(
        Domains,
        settings=settings(
            max_examples=int(os.environ.get("VIRTD_EXAMPLES", "2")),
            stateful_step_count=int(os.environ.get("VIRTD_STEPS", "10")),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to find a shorter sequence would take hours
            print_blob=True,
        ),
    )
