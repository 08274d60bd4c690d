# SPDX-License-Identifier: LGPL-2.1-or-later
"""One operation at a time, and who waits too long is told for whom."""

from __future__ import annotations

import asyncio

import pytest

from tests.doubles.whole_host import on_loop
from virtd import errors
from virtd.objects.turns import Turns


@on_loop
async def test_one_after_the_other() -> None:
    turns = Turns("web1")
    order = []

    async def work(number: int) -> None:
        async with turns.take("start"):
            order.append(f"begin {number}")
            await asyncio.sleep(0)
            order.append(f"end {number}")

    await asyncio.gather(*(work(number) for number in range(3)))
    assert order == [f"{what} {number}" for number in range(3) for what in ("begin", "end")]
    assert not turns.taken


@on_loop
async def test_who_waits_too_long_is_told_for_whom() -> None:
    turns = Turns("web1", 0.01)
    async with turns.take("reboot"):
        assert turns.taken
        with pytest.raises(errors.Busy, match=r"Cannot stop web1: it is still busy \(reboot\)"):
            async with turns.take("stop"):
                raise AssertionError


@on_loop
async def test_a_failure_lets_the_next_through() -> None:
    turns = Turns("web1", 0.01)
    with pytest.raises(ZeroDivisionError):
        async with turns.take("start"):
            _ = 1 // 0
    async with turns.take("stop"):
        pass
