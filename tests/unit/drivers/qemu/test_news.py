# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU tells by itself: all of it is understood, and a guest that makes it tell much costs a bounded amount."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd.allowance import Allowance
from virtd.drivers.qemu import guest as machines
from virtd.drivers.qemu import news as module
from virtd.drivers.qemu.monitor import Link
from virtd.drivers.qemu.standstill import Standstill
from virtd.messages import Message
from virtd.model.state import State

if TYPE_CHECKING:
    from virtd.drivers.qemu.guest import QemuGuest
    from virtd.records import Record


def of(world: World) -> QemuGuest:
    assert world.host is not None
    return world.host.domains.driver.machines["web1"]


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data}


@on_loop
async def test_a_flood_of_changes_is_summed_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is a record that is synced, signals and lines in the journal: 20 of them, and then a question."""
    monkeypatch.setattr(module, "CATCH_UP", 0.05)
    async with world.daemon():
        await world.run("web1")
        machine = of(world)
        saved = []
        real = machine.shared.records.save

        def save(record: Record) -> None:
            saved.append(record.state)
            real(record)

        monkeypatch.setattr(machine.shared.records, "save", save)
        for _ in range(1000):
            machine.news.on_event(event("STOP"))
            machine.news.on_event(event("RESUME"))
        machine.news.on_event(event("STOP"))
        assert len(saved) <= module.CHANGES + 1
        machine.news.on_event(event("STOP"))
        # QEMU itself was never stopped, and that is what it says when it is asked.
        await until(lambda: not machine.news._asking)
        assert machine.state is State.RUNNING
        assert len(saved) <= module.CHANGES + 3


@on_loop
async def test_reboots_are_told_of_now_and_then(world: World) -> None:
    async with world.daemon():
        await world.run("web1")
        for _ in range(1000):
            of(world).news.on_event(event("RESET", guest=True))
        said = [message["text"] for message in world.messages if "rebooted itself" in message["text"]]
        assert said == ["Domain web1 rebooted itself"] * module.REBOOTS
        of(world).news._reboots = Allowance(1, 0)
        of(world).news.on_event(event("RESET", guest=True))
        said = [message["text"] for message in world.messages if "rebooted itself" in message["text"]]
        assert said[-1] == f"Domain web1 rebooted itself ({1000 - module.REBOOTS} more times that were not logged)"


@on_loop
async def test_a_flood_is_a_problem_until_it_is_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "LINK_AGAIN", 0.05)
    monkeypatch.setattr(machines, "CALM", 0.2)
    async with world.daemon() as host:
        await world.run("web1")
        world.type("web1", "flood 20000")
        machine = of(world)
        await until(lambda: "events" in machine.problems, "the flood to be noticed")
        problems = (await host.status())["problems"]
        assert any("more events than virtd takes" in str(problem) for problem in problems)
        # Commands reach it all the same, and tell what state it is in.
        await host.domains.suspend("web1", by=ROOT)
        assert (await host.domains.info("web1"))["state"] == "paused"
        await until(lambda: "events" not in machine.problems, "the flood to be over")
        assert machine.monitor is not None
        assert machine.monitor.link is Link.CONNECTED
        info = await host.domains.info("web1")
        assert info["events"]["hung_up"] >= 1
        assert info["events"]["taken"] < 20_000
        assert len(world.told(Message.EVENTS_HELD_BACK)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["SHUTDOWN", "RESET", "STOP", "RESUME", "POWERDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR", "SUSPEND"]
)
KEYS = st.sampled_from(["action", "reason", "guest", "device", "node-name", "qom-path"])


class Stub:
    """As much of a machine as the news need."""

    name, alive, state, busy, record = "web1", True, State.RUNNING, False, None

    def __init__(self) -> None:
        self.guest_off = asyncio.Event()
        self.problems: dict[str, Any] = {}
        self.standstill = Standstill(self)  # type: ignore[arg-type]

    def note(self, state: State, _reason: str) -> None:
        self.state = state

    def fields(self) -> dict[str, str]:
        return {}

    def spawn(self, work: Any, _name: str) -> None:
        work.close()


@settings(deadline=None)  # a busy machine
@given(st.lists(st.tuples(NAMES | st.text(max_size=8), st.dictionaries(KEYS | st.text(max_size=4), JSON))))
def test_any_event_is_taken(events: list[tuple[str, dict[str, Any]]]) -> None:
    news = module.News(Stub())  # type: ignore[arg-type]
    with mock.patch("virtd.journal.send"):
        for name, data in events:
            news.on_event({"event": name, "data": data})
    assert news.taken == len(events)
    assert len(news.last) <= 16
    for one in news.last:
        assert set(one["data"]) <= {"reason"}


def test_an_allowance() -> None:
    now = 0.0
    allowance = Allowance(3, 0.5, clock=lambda: now)
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
    now = 2.0
    assert [allowance.take() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
