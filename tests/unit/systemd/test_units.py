# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of virtd.systemd.units that need no systemd; the rest is tried in tests/live/test_units.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from typing import Any

import pytest

from virtd import connections, errors
from virtd.objects import inventory
from virtd.systemd import jobs, names, units
from virtd.systemd.bus import PATIENCE, BusError
from virtd.systemd.jobs import Jobs, Patience


def test_a_job_can_end_before_it_is_known() -> None:
    async def main() -> None:
        jobs = Jobs("u.service")
        jobs.removed("/job/1", "done")
        assert await jobs.wait("/job/1", 1) == "done"
        waiting = asyncio.create_task(jobs.wait("/job/3", 1))
        await asyncio.sleep(0)
        jobs.removed("/job/2", "failed")
        await asyncio.sleep(0)
        assert not waiting.done()
        jobs.removed("/job/3", "canceled")
        assert await waiting == "canceled"
        with pytest.raises(errors.TimedOut, match=r"u\.service did not end within 0\.01 s"):
            await jobs.wait("/job/4", 0.01)

    asyncio.run(main())


class Rows(list[tuple[Any, ...]]):
    """Stands in for a bus.Table."""

    def rows(self, columns: Sequence[int], keys: Container[str] | None = None) -> list[tuple[Any, ...]]:
        return [tuple(row[column] for column in columns) for row in self if keys is None or row[0] in keys]


class SlowBus:
    """Answers each DumpUnitFileDescriptorStore when it is told to, with the number of the call as the inode."""

    def __init__(self) -> None:
        self.asked = 0
        self.question = asyncio.Event()
        self.answer = asyncio.Semaphore(0)

    async def table(self, *_: Any) -> Rows:
        self.asked += 1
        self.question.set()
        number = self.asked
        await self.answer.acquire()
        return Rows((name, 0, 0, 8, number, 0, 0, "", 0) for name in ("qemu/web1/stdin", "qemu/web2/stdin"))


def test_dumps_are_shared_but_never_with_one_who_came_after_the_question() -> None:
    async def dumps() -> list[Any]:
        bus: Any = SlowBus()
        systemd = units.Units(bus)
        first = asyncio.create_task(systemd.store_dump("virtd.service"))
        await bus.question.wait()
        later = [asyncio.create_task(systemd.store_dump("virtd.service", ["qemu/web2/stdin"])) for _ in range(3)]
        await asyncio.sleep(0)
        later[0].cancel()
        for _ in range(2):
            bus.answer.release()
        answers: list[Any] = await asyncio.gather(first, *later[1:])
        assert bus.asked == 2
        return answers

    web1, web2, device = "qemu/web1/stdin", "qemu/web2/stdin", os.makedev(0, 8)
    assert asyncio.run(dumps()) == [
        [(web1, device, 1), (web2, device, 1)],
        [(web2, device, 2)],
        [(web2, device, 2)],
    ]


class Hanging:
    """A bus, and a systemd that stops a unit at once; it is told after the bus has hung for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.listeners: list[Any] = []

    async def call(self, _destination: str, _path: str, _interface: str, method: str, *_: Any, **__: Any) -> Any:
        return ("/job/1",) if method == "StopUnit" else ()

    async def subscribe(self, _sender: str, _interface: str, _member: str, _path: str, callback: Any) -> Any:
        self.listeners.append(callback)

    async def flush(self) -> None:
        if self.seconds:
            await asyncio.sleep(self.seconds)
            for told in self.listeners:
                told(names.MANAGER_PATH, names.MANAGER, "JobRemoved", (1, "/job/1", "x.service", "done"))


def test_a_job_has_its_time_while_the_bus_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HUNG", 0.02)
    hanging: Any = Hanging(0.05)
    asyncio.run(units.Units(hanging).stop("x.service", timeout=0.01))
    answering: Any = Hanging(0)
    with pytest.raises(errors.TimedOut, match="did not end within"):
        asyncio.run(units.Units(answering).stop("x.service", timeout=0.01))


def test_slow_answers_do_not_use_patience_up() -> None:
    async def ask() -> int:
        patience = Patience(0.005, "it is still there")
        await asyncio.sleep(0.05)  # for an answer
        for count in range(10):
            try:
                await patience.pause()
            except errors.TimedOut:
                return count
        return 10

    assert 1 < asyncio.run(ask()) < 10


def test_a_call_waits_longer_than_a_bus_hangs() -> None:
    """systemd-machined gives up a call after 25 s, at times twice in a row, and nss-systemd after 45 s."""
    shortest = 2 * 45
    assert min(PATIENCE, connections.UNITS_LIMIT + connections.HANG_LIMIT, inventory.RECONCILE_LIMIT) > shortest


class Reexecuting:
    """A bus on which PID 1 re-executes itself when it is first asked: each answer fails with one of `words`."""

    def __init__(self, *words: str) -> None:
        self.words = [f"org.freedesktop.DBus.Error.{word}" for word in words]
        self.calls: list[str] = []

    async def _answer(self, method: str, answer: Any) -> Any:
        self.calls.append(method)
        if self.words:
            raise BusError(self.words.pop(0), "Message recipient disconnected from message bus without replying")
        return answer

    async def call(self, _to: str, _path: str, _interface: str, method: str, *_: Any, **__: Any) -> Any:
        return await self._answer(method, {"Get": ["257"], "ListUnitsByPatterns": [[]]}.get(method, ["/job"]))

    async def table(self, *_: Any) -> Rows:
        rows: Rows = await self._answer("table", Rows())
        return rows


class NoSignals:
    """Jobs that end at once."""

    @contextlib.asynccontextmanager
    async def of(self, _unit: str) -> AsyncIterator[NoSignals]:
        yield self

    async def wait(self, _job: str, _timeout: float) -> str:
        return "done"


AWAY = ("NoReply", "Spawn.ChildExited", "ServiceUnknown")


@pytest.mark.parametrize("words", [AWAY, AWAY[1:]])  # it was asked before it went, or while it is away
@pytest.mark.parametrize(
    "ask",
    [
        lambda systemd: systemd.version(),
        lambda systemd: systemd.list("virtd-*"),
        lambda systemd: systemd.unit_property("a.service", "Id"),
        lambda systemd: systemd.store_count("a.service"),
        lambda systemd: systemd.store_dump("a.service"),
        lambda systemd: systemd.reset_failed("a.service"),
    ],
)
def test_pid_1_is_asked_again_after_it_has_reexecuted_itself(
    ask: Callable[[units.Units], Awaitable[Any]], words: tuple[str, ...]
) -> None:
    bus: Any = Reexecuting(*words)
    asyncio.run(ask(units.Units(bus)))  # type: ignore[arg-type]
    assert len(bus.calls) == len(words) + 1


@pytest.mark.parametrize("words", [("AccessDenied",), ("NoReply", "AccessDenied")])
def test_other_refusals_stand(words: tuple[str, ...]) -> None:
    bus: Any = Reexecuting(*words)
    with pytest.raises(BusError):
        asyncio.run(units.Units(bus).list("virtd-*"))
    assert len(bus.calls) == len(words)


ONCE = [
    ("KillUnit", lambda systemd: systemd.kill("a.service", 15)),
    ("StartTransientUnit", lambda systemd: systemd.start_other("a.mount", ())),
]


@pytest.mark.parametrize(("method", "do"), ONCE)
def test_a_signal_or_a_start_is_not_sent_twice(method: str, do: Callable[[Any], Awaitable[Any]]) -> None:
    bus: Any = Reexecuting(*AWAY)
    with pytest.raises(BusError):
        asyncio.run(do(systemd_of(bus)))  # type: ignore[arg-type]
    assert bus.calls == [method]


@pytest.mark.parametrize(("method", "do"), ONCE)
def test_what_never_arrived_is_sent_again(method: str, do: Callable[[Any], Awaitable[Any]]) -> None:
    """A start or a signal of a moment in which PID 1 isn't on the bus."""
    bus: Any = Reexecuting(*AWAY[1:])
    asyncio.run(do(systemd_of(bus)))  # type: ignore[arg-type]
    assert bus.calls == [method] * len(AWAY)


def systemd_of(bus: Any) -> units.Units:
    """With nobody to signal the ends of jobs."""
    systemd = units.Units(bus)
    systemd._jobs = NoSignals()  # type: ignore[assignment]
    return systemd


@pytest.mark.parametrize(
    ("error", "stands"), [("org.freedesktop.systemd1.AlreadySubscribed", False), ("a.b.AccessDenied", True)]
)
def test_nobody_waits_for_signals_that_systemd_refuses(error: str, stands: bool) -> None:
    left: list[str] = []

    class Refusing:
        flush = None

        async def call(self, *_: Any, **__: Any) -> Any:
            raise BusError(error, "No")

        async def subscribe(self, *_: Any) -> Callable[[], Awaitable[None]]:
            async def unsubscribe() -> None:
                left.append("unsubscribed")

            return unsubscribe

    bus: Any = Refusing()
    signals = jobs.JobSignals(bus)
    if not stands:
        asyncio.run(signals.subscribe())
        return
    with pytest.raises(BusError):
        asyncio.run(signals.subscribe())
    assert left == ["unsubscribed"]
