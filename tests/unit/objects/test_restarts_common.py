# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every kind of object that has a process lives through: restarts and kills of the daemon, at each step."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import on_loop
from tests.unit.objects.kinds import KINDS, Kind
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.doubles.cuts import Cuts


def called(kind: type[Kind]) -> str:
    return kind.__name__.lower()


@pytest.fixture(params=KINDS, ids=called)
def one(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    kind: type[Kind] = request.param
    with contextlib.closing(kind(tmp_path, monkeypatch)) as one:
        yield one


@on_loop
async def test_it_does_not_notice_restarts(one: Kind) -> None:
    async with one.world.daemon() as host:
        await one.define(host)
        assert await one.start(host)
        assert await one.whole(host)
        before = await one.same(host)
    for number in range(2):
        async with one.world.daemon() as host:
            assert await one.whole(host, "after a restart")
            assert await one.same(host) == before
            assert len((await host.status())["recovered"]["adopted"]) == 1
            assert len(one.world.told(Message.ADOPTED)) == (number + 1 if one.announced else 0)
    async with one.world.daemon() as host:
        assert await one.whole(host)
        await one.end(host)


@on_loop
async def test_an_end_that_nobody_saw(one: Kind) -> None:
    async with one.world.daemon() as host:
        await one.define(host)
        await one.start(host)
        assert await one.whole(host)
    process = one.process()
    process.kill()
    process.wait()
    async with one.world.daemon() as host:
        await one.unseen_end(host)


@on_loop
async def test_slots_that_nobody_knows_are_cleared_away(one: Kind) -> None:
    async with one.world.daemon() as host:
        await one.define(host)
        reader, writer = os.pipe()
        ghost = "job-0" if one.driver == "storage" else "ghost"
        host.services.store.put(f"{one.driver}/{ghost}/stdin", writer)
        os.close(reader)
        os.close(writer)
    async with one.world.daemon() as host:
        assert not await one.whole(host)
        assert one.world.slots() == []
        assert len((await host.status())["recovered"]["rolled_back"]) == 1
        assert not os.path.exists(one.world.paths.record(one.driver, ghost))


@pytest.mark.parametrize("operation", ["start", "stop"])
@pytest.mark.parametrize("kind", KINDS, ids=called)
@on_loop
async def test_killed_at_every_step(cuts: Cuts, kind: type[Kind], operation: str) -> None:
    """The next daemon finds it whole, running or not; it can be started and ended."""
    for root, patch in cuts:
        with contextlib.closing(kind(root, patch)) as one:
            pid = 0
            async with one.world.daemon() as host:
                await one.define(host)
                if operation == "stop":
                    await one.start(host)
                    assert await one.whole(host)
                    pid = one.process().pid
                await cuts.cut(one.world, getattr(one, operation)(host))
            one.cut_off()
            steps = one.steps
            async with one.world.daemon() as host:
                where = cuts.where
                running = await one.whole(host, where)
                if running and pid:
                    assert pid == one.process().pid, where
                assert (await host.check_all(repair=False, by=None))["differences"] == [], where
                assert await one.start(host) is not running, where
                assert await one.whole(host, where)
                await one.end(host, where)
    message = "FDSTORE=1" if operation == "start" else "FDSTOREREMOVE=1"
    assert sum(message in step for step in cuts.seen) == 5
    assert steps[operation] <= set(cuts.seen)
