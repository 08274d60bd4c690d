# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest of any kind lives through besides what every object does, see objects/test_restarts_common.py."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, nothing_left, on_loop, until
from tests.unit.objects.kinds import NAME, SUPERVISED, Supervised
from virtd import errors
from virtd.messages import Message
from virtd.records import Record, Records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=SUPERVISED, ids=lambda kind: kind.__name__.lower())
def life(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    kind: type[Supervised] = request.param
    with contextlib.closing(kind(tmp_path, monkeypatch)) as life:
        yield life


@on_loop
async def test_a_restart_misses_nothing_of_its_console(life: Supervised) -> None:
    async with life.world.daemon() as host:
        pid = await life.begin(host)
        life.world.type(NAME, "echo unseen", life.driver)
    for number in range(2):
        async with life.world.daemon() as host:
            info = await life.look(host)
            assert (info["state"], life.process().pid) == ("running", pid)
            await life.says(str(number))
            assert life.world.console(NAME, life.driver).splitlines()[:2] == ["before", "unseen"]
    async with life.world.daemon() as host:
        await life.look(host)
        await life.end(host)


@on_loop
async def test_a_lost_slot_is_told_and_it_runs_on(life: Supervised) -> None:
    lost = f"{life.driver}/{NAME}/stdin"
    async with life.world.daemon() as host:
        pid = await life.begin(host)
    for entry in list(life.world.pid1.entries):
        if entry.name == lost:
            life.world.pid1.entries.remove(entry)
            os.close(entry.fd)
    async with life.world.daemon() as host:
        info = await life.of(host).info(NAME)
        assert (info["state"], life.process().pid) == ("running", pid)
        assert lost in info["problems"][0]["text"]
        assert life.world.told(Message.SLOT_LOST)[0]["VIRTD_SLOT"] == lost
        with pytest.raises(errors.HostError, match="takes no input"):
            await anext(life.of(host).open_console(NAME, by=ROOT))
        await life.end(host)


@pytest.mark.parametrize("damage", ["cut short", "gone"])
@on_loop
async def test_it_is_rebuilt_without_its_record(life: Supervised, damage: str) -> None:
    async with life.world.daemon() as host:
        pid = await life.begin(host)
    path = life.world.paths.record(life.driver, NAME)
    if damage == "gone":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    async with life.world.daemon() as host:
        await life.of(host)._guests.certain()
        assert ((await life.of(host).info(NAME))["state"], life.process().pid) == ("running", pid)
        assert len((await host.status())["recovered"]["rebuilt"]) == 1
        assert bool(life.world.told(Message.RECORD_QUARANTINED)) == (damage == "cut short")
        await life.says("after")
        await life.end(host)


@on_loop
async def test_an_end_that_cannot_be_put_on_record_waits_for_it(
    life: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit, a witness, is left alone by a start; what has been said of it isn't taken back."""
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)

    def refuse(_records: Records, record: Record) -> None:
        raise errors.HostError(f"Cannot write {record.name}: No space left on device")

    async with life.world.daemon() as host:
        pid = await life.begin(host)
    os.kill(pid, signal.SIGKILL)
    life.process().wait()
    with monkeypatch.context() as full:
        full.setattr(Records, "save", refuse)
        for _ in range(2):  # two daemons, neither of which can write
            async with life.world.daemon() as host:
                await until(lambda host=host: not life.of(host)._guests.find(NAME).alive, "its end")
                assert life.unit in life.world.units.units
                assert life.world.slots() == life.slots
                for refused in (life.of(host).start, life.of(host).undefine):
                    with pytest.raises(errors.HostError, match=f"{NAME} yet: Cannot write {NAME}"):
                        await refused(NAME, by=ROOT)
    async with life.world.daemon():
        await until(lambda: life.world.record(NAME, life.driver).unit == "", "its record")
        nothing_left(life.world, NAME, life.driver)
        ending = life.world.record(NAME, life.driver).exit
        assert ending is not None
        assert ending.signal == "SIGKILL"
