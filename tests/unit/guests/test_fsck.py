# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl fsck against a whole host: each kind of damage is told, and mended where it can be, and guests run on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_units import Unit
from tests.doubles.whole_host import ROOT, SLOTS, World, nothing_left, on_loop, until
from virtd.drivers.qemu import userdb
from virtd.fdstore import NotifyFailed
from virtd.systemd import aliases
from virtd.systemd.transient import UnitSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtd.host import Host


def lose(world: World, slot: str) -> None:
    """PID 1 forgets a descriptor."""
    for entry in [entry for entry in world.pid1.entries if entry.name == slot]:
        world.pid1.entries.remove(entry)
        os.close(entry.fd)


def plant(world: World, slot: str) -> None:
    """Somebody has PID 1 keep a pipe."""
    reader, writer = os.pipe()
    world.pid1._add(slot, writer, poll=False)
    os.close(reader)


def plant_unit(world: World, name: str, *, code: str) -> None:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
    unit = f"virtd-qemu-{name}.service"
    world.units.units[unit] = Unit(UnitSpec(unit, f"Domain {name}", "virtd-qemu.slice", ("/bin/true",)), process)
    if code == "":
        process.wait()


def record(world: World, name: str = "web1") -> str:
    return world.paths.record("qemu", name)


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def edit(path: str, old: str, new: str) -> None:
    with open(path) as file:
        text = file.read()
    assert old in text
    write(path, text.replace(old, new))


def other_pid(world: World) -> None:
    edit(record(world), f'"main_pid": {world.units.process("web1").pid}', '"main_pid": 1')


def swap(world: World, slot: str) -> None:
    lose(world, slot)
    plant(world, slot)


def old_links(world: World) -> None:
    """A start was cut off long ago that had a path which systemd would misread."""
    directory = world.paths.aliases("qemu", "ghost")
    aliases.make(directory, ["/an odd path"])
    os.utime(directory, (0, 0))


def user_of_nobody(world: World) -> None:
    userdb.add(world.paths.userdb, userdb.Named("vm-ghost", 1_900_000_000), "ghost")


# What is done while web1 runs and idle doesn't; words of what is found; whether it can be mended.
DAMAGE: dict[str, tuple[Callable[[World], object], str, bool]] = {
    "a pipe that PID 1 lost": (lambda w: lose(w, "qemu/web1/stdin"), "slot qemu/web1/stdin is missing", True),
    "a log that PID 1 lost": (lambda w: lose(w, "qemu/web1/console.log"), "web1/console.log is missing", True),
    "another pipe": (lambda w: swap(w, "qemu/web1/stdout"), "web1/stdout holds something else", True),
    "two of a name": (lambda w: plant(w, "qemu/web1/stderr"), "web1/stderr holds something else", True),
    "a slot of a stranger": (lambda w: plant(w, "newer/x/y"), "newer/x/y is one that this version", False),
    "a sixth slot": (lambda w: plant(w, "qemu/web1/extra"), "web1/extra is one that this version", False),
    "a slot of nothing": (lambda w: plant(w, "qemu/ghost/stdin"), "and ghost doesn't run", True),
    "a slot of one that is off": (lambda w: plant(w, "qemu/idle/stdin"), "and idle doesn't run", True),
    "no record": (lambda w: os.unlink(record(w)), "web1.json is missing", True),
    "half a record": (lambda w: os.truncate(record(w), 40), "web1.json can't be read", True),
    "another PID": (other_pid, "web1.json says something else of main_pid", True),
    "a record of nothing": (lambda w: write(record(w, "ghost"), "{}"), "ghost.json can't be read", True),
    "a directory": (lambda w: os.makedirs(f"{w.paths.run}/qemu/idle"), "idle is there, and idle", True),
    "a directory of nothing": (lambda w: os.makedirs(f"{w.paths.run}/qemu/ghost/x"), "ghost is there", True),
    "no directory": (lambda w: os.rename(f"{w.paths.run}/qemu/web1", f"{w.paths.run}/x"), "web1 is gone", False),
    "half a file": (lambda w: write(f"{w.paths.run}/qemu/.web1.json.new", "{"), "incomplete file", True),
    "half a definition": (lambda w: write(f"{w.paths.etc}/qemu/.a.toml.new", "x"), "incomplete file", True),
    "a definition": (lambda w: write(f"{w.paths.etc}/qemu/a.toml", w.text("a")), "a.toml was changed", True),
    "a definition less": (lambda w: os.unlink(f"{w.paths.etc}/qemu/idle.toml"), "idle.toml was removed", True),
    "a quarantined record": (lambda w: write(f"{w.paths.quarantine}/qemu-a.1.json", ""), "couldn't be read", True),
    "a unit that has ended": (lambda w: plant_unit(w, "idle", code=""), "has ended, and virtd knows", True),
    "links of nothing": (old_links, "qemu.ghost is of a child that is gone", True),
    "a user of nobody": (user_of_nobody, "has user vm-ghost (1900000000), whom no guest runs as", True),
    "a unit of nothing": (lambda w: plant_unit(w, "ghost", code=""), "has ended, and virtd knows", True),
}


async def two(world: World) -> int:
    """web1 runs and answers, idle is defined: web1's PID."""
    disk = f"{world.paths.root}/disk"
    write(disk, "")
    pid = await world.run("web1", more=f'[[disk]]\npath = "{disk}"\nformat = "raw"\n')
    await world.define("idle")
    return pid


async def check(host: Host, *, repair: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await host.check_all(repair=repair, by=ROOT))["differences"]
    return rows


@pytest.mark.parametrize("what", DAMAGE)
@on_loop
async def test_damage(make_world: Callable[..., World], what: str) -> None:
    world = make_world()
    damage, words, mendable = DAMAGE[what]
    async with world.daemon() as host:
        pid = await two(world)
        assert await check(host) == []
        damage(world)
        rows = await check(host)
        assert len(rows) == 1, rows
        assert words in rows[0]["text"]
        assert rows[0]["text"].endswith(rows[0]["text"].strip())
        assert (bool(rows[0]["repair"]), rows[0]["repaired"]) == (mendable, False)
        assert await check(host) == rows, "looking changes nothing"
        again = await check(host, repair=True)
        assert [(row["text"], row["repaired"]) for row in again] == [(rows[0]["text"], mendable)]
        assert await check(host) == ([] if mendable else rows)
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        world.type("web1", "echo on")
        await until(lambda: world.console("web1") == "on\n")
        if mendable:
            assert [slot for slot in world.slots() if slot.startswith("qemu/")] == SLOTS
    if not mendable:
        return
    async with world.daemon() as host:
        assert await check(host) == []
        assert (await host.domains.info("web1"))["pid"] == pid
        world.type("web1", "echo off")
        await until(lambda: world.console("web1") == "on\noff\n")
        await host.domains.stop("web1", by=ROOT)
        nothing_left(world)
        assert await check(host) == []


@on_loop
async def test_a_process_that_nobody_knows_is_taken_back(world: World) -> None:
    """Its record says that it has ended; its unit and its slots say that it hasn't."""
    async with world.daemon() as host:
        pid = await two(world)
        machine = host.domains.driver.machines["web1"]
        await machine.close()
        del host.domains.driver.machines["web1"]
        os.unlink(record(world))
        rows = await check(host)
        assert {row["kind"] for row in rows} == {"unit", "slot", "directory", "definition", "user"}
        assert {row["object"] for row in rows} == {"qemu/web1", ""}  # a name in /run/userdb that nobody has
        assert all(row["repaired"] for row in await check(host, repair=True))
        assert await check(host) == []
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        world.type("web1", "echo back")
        await until(lambda: world.console("web1") == "back\n")
        await host.domains.stop("web1", by=ROOT)
        nothing_left(world)


@on_loop
async def test_a_guest_that_is_being_started_is_left_alone(world: World) -> None:
    import asyncio

    async with world.daemon() as host:
        await world.define("web1")
        starting = asyncio.ensure_future(host.domains.start("web1", by=ROOT))
        looks = 0
        while not starting.done():  # whatever step it has come to
            assert await check(host, repair=True) == []
            looks += 1
        assert looks
        assert (await starting)["changed"] is True


@on_loop
async def test_a_guest_that_is_just_ending_is_waited_for(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        world.units.process("web1").kill()
        world.units.process("web1").wait()
        assert await check(host, repair=True) == []
        assert (await host.domains.info("web1"))["state"] == "crashed"


@on_loop
async def test_a_pipe_that_is_lost_for_good_is_told_and_not_mended(world: World) -> None:
    async with world.daemon():
        await world.run("web1")
    lose(world, "qemu/web1/stdin")
    async with world.daemon() as host:
        for repair in (False, True):
            rows = await check(host, repair=repair)
            assert [(row["text"], row["repair"]) for row in rows] == [
                ("slot qemu/web1/stdin is missing: systemd doesn't hold it", "")
            ]


@on_loop
async def test_before_systemd_254(make_world: Callable[..., World]) -> None:
    """PID 1 can't be asked what it holds: everything else is compared."""
    world = make_world(old=True)
    async with world.daemon() as host:
        await two(world)
        lose(world, "qemu/web1/stdin")
        assert await check(host) == []
        os.unlink(record(world))
        assert [row["kind"] for row in await check(host, repair=True)] == ["record"]


@on_loop
async def test_one_that_refuses_spares_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as host:
        await two(world)
        plant(world, "qemu/ghost/stdin")
        os.makedirs(f"{world.paths.run}/qemu/idle")

        def refuse(_name: str) -> None:
            raise NotifyFailed("no room")

        monkeypatch.setattr(host.domains.driver.services.store, "expel", refuse)
        rows = await check(host, repair=True)
        assert [(row["object"], row["repaired"]) for row in rows] == [
            ("qemu/ghost", False),
            ("qemu/ghost", False),
            ("qemu/idle", True),
        ]
        assert "could not be repaired: no room" in rows[1]["text"]


@on_loop
async def test_a_start_clears_half_files_away(world: World) -> None:
    for directory in (world.paths.etc, world.paths.run):
        write(f"{directory}/qemu/.web1.new", "half")
    write(f"{world.paths.etc}/qemu/.kept", "a person's")
    async with world.daemon() as host:
        assert await check(host) == []
        assert os.listdir(f"{world.paths.run}/qemu") == []
        assert os.listdir(f"{world.paths.etc}/qemu") == [".kept"]


@on_loop
async def test_a_guest_that_ends_while_it_is_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at it its child is put away, with nobody else's lock held."""
    async with world.daemon() as host:
        await world.run("web1")
        asked = world.units.state

        async def end_it(name: str) -> object:
            state = await asked(name)
            monkeypatch.setattr(world.units, "state", asked)
            world.units.process("web1").kill()
            await until(lambda: host.domains.driver.machines["web1"].child is None)
            return state

        monkeypatch.setattr(world.units, "state", end_it)
        assert await check(host) == []
        assert (await host.domains.info("web1"))["state"] == "crashed"
