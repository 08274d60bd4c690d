# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every kind of object that runs as a process lives through: restarts and kills of the daemon, at each step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests import toydriver
from tests.doubles.whole_host import ROOT, World, nothing_left, on_loop, until
from tests.unit.drivers.lxc.test_container_restarts import Site
from virtd import errors
from virtd.messages import Message
from virtd.records import Record, Records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.doubles.cuts import Cuts
    from virtd.host import Host
    from virtd.host.objects import Objects
    from virtd.replies.guests import GuestInfo

NAME = "web1"


class Kind(Protocol):
    """One kind of object in a host of its own."""

    driver: str
    world: World

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None: ...
    def text(self) -> str:
        """The definition of one that obeys the line "echo WORD" on its console."""


class Guest:
    """A domain."""

    driver = "qemu"

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.world = World(root, patch)

    def text(self) -> str:
        return self.world.text(NAME)


class Container:
    """A container."""

    driver = "lxc"

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._site = Site(root, patch)
        self.world = self._site.world

    def text(self) -> str:
        return f'name = "{NAME}"\nrootfs = "{self._site.root}"\nprivileged = true\n'


PROGRAM = """import signal, sys
for line in sys.stdin:
    print(line.removeprefix("echo ").strip(), flush=True)
signal.pause()
"""


class Toy:
    """A program of a driver that isn't virtd's."""

    driver = "toy"

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        toydriver.register(patch)
        self.world = World(root, patch)
        for base in (self.world.paths.etc, self.world.paths.run, self.world.paths.log):
            os.makedirs(f"{base}/toy")
        (root / "program.py").write_text(PROGRAM)
        self._program = str(root / "program.py")

    def text(self) -> str:
        return f'name = "{NAME}"\ncommand = ["{sys.executable}", "-I", "-S", "{self._program}"]\n'


KINDS: tuple[type[Kind], ...] = (Guest, Container, Toy)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.lower())


class Life:
    """One object of a kind, over the runs of the daemon."""

    def __init__(self, kind: Kind) -> None:
        self.world = kind.world
        self.driver = kind.driver
        self.text = kind.text()
        self.slots = [f"{self.driver}/{NAME}/{slot}" for slot in ("console.log", "log", "stderr", "stdin", "stdout")]
        self.unit = f"virtd-{self.driver}-{NAME}.service"

    def of(self, host: Host) -> Objects[Any]:
        return host.supervised(self.driver)

    async def define(self, host: Host) -> None:
        await self.of(host).define(self.text, "test", check=False, by=ROOT)

    async def begin(self, host: Host) -> int:
        """Defined and started; the PID of its unit's process."""
        await self.define(host)
        await self.of(host).start(NAME, by=ROOT)
        await self.says("before")
        return self.pid

    @property
    def pid(self) -> int:
        return self.world.units.process(NAME, self.driver).pid

    async def says(self, word: str) -> None:
        self.world.type(NAME, f"echo {word}", self.driver)
        await until(lambda: self.world.console(NAME, self.driver).endswith(f"{word}\n"), word)

    async def whole(self, host: Host, where: str = "") -> GuestInfo:
        """It runs, or it has ended, with all that belongs to that."""
        await self.of(host)._guests.certain()
        machine = self.of(host)._guests.find(NAME)
        if machine.request is not None:  # what was cut off is finished in the background
            await until(machine.over.is_set, "its end")
        await until(lambda: not machine.leftovers, "what it left")
        info = await self.of(host).info(NAME)
        assert not info["problems"], where
        if info["state"] == "running":
            assert self.world.slots() == self.slots, where
            assert self.world.units.units[self.unit].state().running, where
        else:
            assert info["state"] == "stopped", where
            assert self.world.slots() == [], where
            assert self.world.units.units == {}, where
            assert not self.world.runtime_left(NAME, self.driver), where
        assert (await host.check_all(repair=False, by=ROOT))["differences"] == [], where
        return info

    async def end(self, host: Host) -> None:
        assert (await self.of(host).stop(NAME, by=ROOT))["changed"] is True
        nothing_left(self.world, NAME, self.driver)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__.lower())
def life(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    kind: type[Kind] = request.param
    life = Life(kind(tmp_path, monkeypatch))
    yield life
    life.world.close()


@on_loop
async def test_it_does_not_notice_restarts(life: Life) -> None:
    async with life.world.daemon() as host:
        pid = await life.begin(host)
        life.world.type(NAME, "echo unseen", life.driver)
    for number in range(2):
        async with life.world.daemon() as host:
            info = await life.whole(host)
            assert (info["state"], life.pid) == ("running", pid)
            await life.says(str(number))
            assert life.world.console(NAME, life.driver).splitlines()[:2] == ["before", "unseen"]
            assert len(life.world.told(Message.ADOPTED)) == number + 1
            assert len((await host.status())["recovered"]["adopted"]) == 1
    async with life.world.daemon() as host:
        await life.whole(host)
        await life.end(host)


@on_loop
async def test_a_lost_slot_is_told_and_it_runs_on(life: Life) -> None:
    lost = f"{life.driver}/{NAME}/stdin"
    async with life.world.daemon() as host:
        pid = await life.begin(host)
    for entry in list(life.world.pid1.entries):
        if entry.name == lost:
            life.world.pid1.entries.remove(entry)
            os.close(entry.fd)
    async with life.world.daemon() as host:
        info = await life.of(host).info(NAME)
        assert (info["state"], life.pid) == ("running", pid)
        assert lost in info["problems"][0]["text"]
        assert life.world.told(Message.SLOT_LOST)[0]["VIRTD_SLOT"] == lost
        with pytest.raises(errors.HostError, match="takes no input"):
            await anext(life.of(host).open_console(NAME, by=ROOT))
        await life.end(host)


@pytest.mark.parametrize("damage", ["cut short", "gone"])
@on_loop
async def test_it_is_rebuilt_without_its_record(life: Life, damage: str) -> None:
    async with life.world.daemon() as host:
        pid = await life.begin(host)
    path = life.world.paths.record(life.driver, NAME)
    if damage == "gone":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    async with life.world.daemon() as host:
        await life.of(host)._guests.certain()
        assert ((await life.of(host).info(NAME))["state"], life.pid) == ("running", pid)
        assert len((await host.status())["recovered"]["rebuilt"]) == 1
        assert bool(life.world.told(Message.RECORD_QUARANTINED)) == (damage == "cut short")
        await life.says("after")
        await life.end(host)


@on_loop
async def test_an_end_that_nobody_saw(life: Life) -> None:
    async with life.world.daemon() as host:
        await life.begin(host)
    process = life.world.units.process(NAME, life.driver)
    process.kill()
    process.wait()
    async with life.world.daemon() as host:
        await life.of(host)._guests.certain()
        info = await life.of(host).info(NAME)
        assert (info["state"], info["exit"]["signal"]) == ("crashed", "SIGKILL")
        nothing_left(life.world, NAME, life.driver)


@on_loop
async def test_an_end_that_cannot_be_put_on_record_waits_for_it(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its unit, a witness, is left alone by a start; what has been said of it isn't taken back."""
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)

    def refuse(_records: Records, record: Record) -> None:
        raise errors.HostError(f"Cannot write {record.name}: No space left on device")

    async with life.world.daemon() as host:
        pid = await life.begin(host)
    os.kill(pid, signal.SIGKILL)
    life.world.units.process(NAME, life.driver).wait()
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


@on_loop
async def test_slots_that_nobody_knows_are_cleared_away(life: Life) -> None:
    async with life.world.daemon() as host:
        reader, writer = os.pipe()
        life.of(host)
        host.services.store.put(f"{life.driver}/ghost/stdin", writer)
        os.close(reader)
        os.close(writer)
    async with life.world.daemon() as host:
        await life.of(host)._guests.certain()
        assert life.world.slots() == []
        assert len((await host.status())["recovered"]["rolled_back"]) == 1
        assert await life.of(host).listing() == []
        assert not os.path.exists(life.world.paths.record(life.driver, "ghost"))


@kinds
@pytest.mark.parametrize("operation", ["start", "stop"])
@on_loop
async def test_killed_at_every_step(cuts: Cuts, kind: type[Kind], operation: str) -> None:
    """The next daemon finds it whole, running or not; it can be started and ended."""
    for root, patch in cuts:
        life = Life(kind(root, patch))
        with contextlib.closing(life.world):
            pid = 0
            async with life.world.daemon() as host:
                if operation == "stop":
                    pid = await life.begin(host)
                else:
                    await life.define(host)
                await cuts.cut(life.world, getattr(life.of(host), operation)(NAME, by=ROOT))
            async with life.world.daemon() as host:
                where = cuts.where
                info = await life.whole(host, where)
                if info["state"] == "running":
                    assert not pid or pid == life.pid, where
                    await life.says("after")
                elif operation == "stop":
                    assert info["exit"]["cause"] == "stop", where
                    assert life.world.console(NAME, life.driver) == "before\n", where
                changed = (await life.of(host).start(NAME, by=ROOT))["changed"]
                assert changed is (info["state"] == "stopped"), where
                await life.end(host)
    message = "FDSTORE=1" if operation == "start" else "FDSTOREREMOVE=1"
    assert sum(message in step for step in cuts.seen) == 5
    assert f"{'start' if operation == 'start' else 'collect'} {life.unit}" in cuts.seen
