# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users without rights may cost, without a front end: turns, unread replies, shared answers, calls on D-Bus."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.doubles.whole_host import on_loop
from virtd.api import door, limits, sharing
from virtd.sparing import BURST, EVERY, Sparing


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def passes() -> None:
    """Whatever can go on does."""
    for _ in range(5):
        await asyncio.sleep(0)


async def fill(ours: limits.Limits, uid: int, count: int) -> None:
    for _ in range(count):
        (await ours.turn(uid)).leave()


@on_loop
async def test_one_users_flood_is_not_anothers() -> None:
    ours = limits.Limits(Clock())
    await fill(ours, 1000, int(limits.BURST))
    waiting = asyncio.create_task(ours.turn(1000))
    await passes()
    assert not waiting.done()
    await fill(ours, 1001, 10)
    await fill(ours, 0, 10_000)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@on_loop
async def test_a_thousand_users_have_a_share_together() -> None:
    ours = limits.Limits(Clock())
    for uid in range(1, int(limits.ALL_BURST) + 1):
        await fill(ours, uid, 1)
    waiting = asyncio.create_task(ours.turn(5000))
    await passes()
    assert not waiting.done()
    (await ours.turn(0)).leave()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@on_loop
async def test_turns_come_with_time_and_go_round() -> None:
    clock = Clock()
    ours = limits.Limits(clock)
    await fill(ours, 1, int(limits.BURST))
    await fill(ours, 2, int(limits.BURST))
    order: list[int] = []

    async def ask(uid: int) -> None:
        turn = await ours.turn(uid)
        order.append(uid)
        turn.leave()

    tasks = [asyncio.create_task(ask(uid)) for uid in (1, 1, 1, 2, 3)]
    await passes()
    assert order == []
    clock.now += 1
    ours._look()
    await asyncio.gather(*tasks)
    assert order[:3] == [1, 2, 3], "user 1 asked first, and thrice, and is not served thrice before the others"


@on_loop
async def test_calls_at_a_time() -> None:
    ours = limits.Limits(Clock())
    held = [await ours.turn(1) for _ in range(limits.RUNNING)]
    waiting = asyncio.create_task(ours.turn(1))
    given_up = asyncio.create_task(ours.turn(1))
    await passes()
    assert not waiting.done()
    given_up.cancel()
    held[0].leave()
    held[0].leave()
    turn = await waiting
    await asyncio.gather(given_up, return_exceptions=True)
    for one in (*held, turn):
        one.leave()
    assert ours._running == 0
    assert not ours._queue


@on_loop
async def test_one_cancelled_as_it_is_let_in_holds_nothing() -> None:
    ours = limits.Limits(Clock())
    held = [await ours.turn(1) for _ in range(limits.RUNNING)]
    waiting = asyncio.create_task(ours.turn(1))
    await passes()
    held[0].leave()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for one in held:
        one.leave()
    assert ours._running == 0


@on_loop
async def test_large_replies_cost_more() -> None:
    clock = Clock()
    ours = limits.Limits(clock)
    (await ours.turn(1)).leave(int(limits.BURST) * limits.BIG)
    assert ours.user(1).bucket.due(clock.now) > 0


@on_loop
async def test_replies_that_nobody_reads() -> None:
    ours = limits.Limits(Clock())
    ours.unsent(1, 4 * limits.UNSENT)  # the first may be as large as it is
    with pytest.raises(limits.TooMuch):
        ours.unsent(1, 1)
    ours.unsent(1, -4 * limits.UNSENT)
    ours.unsent(1, 1)
    for uid in range(2, 9):
        ours.unsent(uid, limits.UNSENT)
    with pytest.raises(limits.TooMuch):
        ours.unsent(9, 2 * limits.UNSENT)
    ours.unsent(0, 100 * limits.ALL_UNSENT)


@on_loop
async def test_users_are_forgotten() -> None:
    clock = Clock()
    ours = limits.Limits(clock)
    for uid in range(1, 3 * limits.USERS):
        ours.user(uid)
    assert len(ours._users) <= limits.USERS
    while ours.arrives(7):
        pass
    assert ours.arrives(0)
    clock.now += 1
    assert ours.arrives(7)


# Shared answers


@on_loop
async def test_who_asks_at_once_shares_an_answer() -> None:
    ours, found = sharing.Sharing(), 0
    go_on = asyncio.Event()

    async def find() -> int:
        nonlocal found
        found += 1
        await go_on.wait()
        return found

    tasks = [asyncio.create_task(ours.get("key", find)) for _ in range(5)]
    await passes()
    tasks[0].cancel()
    go_on.set()
    assert await asyncio.gather(*tasks[1:]) == [1, 1, 1, 1]
    assert await ours.get("key", find) == 1, "and who asks shortly after"
    assert await ours.get("other", find) == 2
    await ours.close()


@on_loop
async def test_a_failure_is_told_to_all_and_not_kept() -> None:
    ours = sharing.Sharing()

    async def fail() -> int:
        raise LookupError

    async def find() -> int:
        return 7

    results = await asyncio.gather(*(ours.get("key", fail) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [LookupError] * 3
    assert await ours.get("key", find) == 7
    await ours.close()


# The journal


def test_a_few_messages_and_then_how_many(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    ours = Sparing(logging.getLogger("virtd.test"), clock)
    for number in range(1000):
        ours.warning("trouble %d", number)
    assert len(caplog.records) == BURST
    clock.now += EVERY
    ours.warning("%s again", "trouble")
    assert len(caplog.records) == BURST + 1
    assert caplog.messages[-1] == f"trouble again ({1000 - BURST} more like this were suppressed)"


# The door of the bus


class Message:
    def __init__(
        self, sender: str, *, silent: bool = False, size: int = 0, fds: int = 0, interface: str = "x"
    ) -> None:
        self.sender, self.silent, self.size, self.fds, self.interface = sender, silent, size, fds, interface

    def get_sender(self) -> str:
        return self.sender

    def get_interface(self) -> str:
        return self.interface

    def get_flags(self) -> int:
        return int(self.silent)

    def get_body(self) -> Any:
        return self

    def get_size(self) -> int:
        return self.size

    def get_num_unix_fds(self) -> int:
        return self.fds


def a_door() -> tuple[door.Door, list[Any]]:
    refused: list[Any] = []
    return door.Door(refused.append, Clock()), refused


def test_a_connection_has_a_few_calls() -> None:
    ours, refused = a_door()
    assert sum(ours.admits(Message(":1.5")) for _ in range(100_000)) == door.SENDER
    assert 0 < len(refused) <= door.ERRORS, "beyond these nothing is even answered"
    ours.leaves(":1.5")
    assert ours.admits(Message(":1.5"))


def test_a_user_has_a_few_calls_on_all_connections() -> None:
    ours, _ = a_door()
    for number in range(200):
        name = f":1.{number}"
        if ours.admits(Message(name)):
            ours.learns(name, 1000)
    assert ours._users == {1000: 200}, "whose they were was learnt later"
    admitted = [ours.admits(Message(f":1.{number}")) for number in range(200)]
    assert not any(admitted)
    for number in range(200):
        ours.leaves(f":1.{number}")
    assert ours._users == {}
    assert ours._strangers == 0


def test_root_is_never_refused_and_strangers_have_room() -> None:
    ours, _ = a_door()
    assert ours.admits(Message(":1.1"))
    ours.learns(":1.1", 0)
    for number in range(2, 5000):
        ours.admits(Message(f":1.{number}"))
    assert ours._strangers <= door.STRANGERS
    assert all(ours.admits(Message(":1.1", size=1 << 20, silent=True)) for _ in range(1000))


def test_what_a_call_may_be() -> None:
    ours, _ = a_door()
    assert ours.admits(Message(":1.1"))
    ours.learns(":1.1", 1000)
    assert not ours.admits(Message(":1.1", silent=True)), "nobody would see its effect"
    assert not ours.admits(Message(":1.1", size=door.SMALL + 1))
    assert not ours.admits(Message(":1.1", fds=1))
    assert ours.admits(Message(":1.2", size=door.BYTES)), "it may be root's"
    assert not ours.admits(Message(":1.3", size=door.LITTLE + 1))
    assert ours.admits(Message(":1.3", size=door.LITTLE))


def test_pings_are_not_counted_and_limited() -> None:
    ours, _ = a_door()
    pings = [ours.admits(Message(":1.1", interface="org.freedesktop.DBus.Peer")) for _ in range(10_000)]
    assert sum(pings) == door.ERRORS
    assert ours._strangers == 0


def test_connections_are_forgotten() -> None:
    ours, _ = a_door()
    for number in range(10_000):
        name = f":1.{number}"
        assert ours.admits(Message(name))
        ours.learns(name, 1000)
        ours.leaves(name)
    assert len(ours._senders) <= door.KNOWN
    assert ours._users == {}
