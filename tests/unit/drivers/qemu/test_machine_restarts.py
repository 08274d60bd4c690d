# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of guests over restarts and crashes of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, SLOTS, World, nothing_left, on_loop, until
from virtd import errors
from virtd.messages import Message
from virtd.records import Record, Records

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doubles.cuts import Cuts


@on_loop
async def test_a_guest_does_not_notice_restarts(world: World) -> None:
    async with world.daemon():
        pid = await world.run("web1", "print=2000")
    for number in range(3):
        async with world.daemon() as host:
            info = await host.info("web1")
            assert (info["state"], info["pid"], info["id"]) == ("running", pid, 1)
            world.type("web1", f"echo {number}")
            expected = [f"line {line}" for line in range(2000)] + [str(line) for line in range(number + 1)]
            await until(lambda expected=expected: world.console("web1").splitlines() == expected)
            status = await host.status()
            assert (status["recovered"]["objects"], status["recovered"]["adopted"]) == (1, ["web1"])
            assert world.told(Message.ADOPTED)[number]["VIRTD_PID"] == str(pid)
    async with world.daemon() as host:
        assert (await host.shutdown("web1", None, by=ROOT))["changed"] is True
        nothing_left(world)


@on_loop
async def test_pumps_run_before_there_is_a_bus(world: World) -> None:
    async with world.daemon():
        pid = await world.run("web1")
    async with world.daemon(reconcile=False) as host:
        assert (await host.listing())[0]["pid"] == pid
        world.type("web1", "echo early")
        await until(lambda: world.console("web1") == "early\n")


@on_loop
async def test_a_lost_slot_is_reported_and_the_guest_runs_on(world: World) -> None:
    async with world.daemon():
        pid = await world.run("web1")
    for entry in list(world.pid1.entries):
        if entry.name == "qemu/web1/stdin":
            world.pid1.entries.remove(entry)
            os.close(entry.fd)
    async with world.daemon() as host:
        info = await host.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        assert "qemu/web1/stdin" in info["problems"][0]["text"]
        assert world.told(Message.SLOT_LOST)[0]["VIRTD_SLOT"] == "qemu/web1/stdin"
        with pytest.raises(errors.HostError, match="takes no input"):
            await anext(host.open_console("web1", by=ROOT))
        await host.stop("web1", by=ROOT)
        nothing_left(world)


@on_loop
async def test_an_end_that_cannot_be_put_on_record_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit has the exit status until then, whatever becomes of the daemon meanwhile."""
    monkeypatch.setattr("virtd.drivers.recorded.SAVE_AGAIN", 0.01)

    def refuse(_records: Records, record: Record) -> None:
        raise errors.HostError(f"Cannot write {record.name}: No space left on device")

    async with world.daemon():
        pid = await world.run("web1")
    os.kill(pid, signal.SIGKILL)
    world.units.process("web1").wait()  # a signal takes its time, and the daemon rightly says "running" until then
    write = Records.save
    with monkeypatch.context() as full:
        full.setattr(Records, "save", refuse)
        for _ in range(2):  # two daemons, neither of which can write
            async with world.daemon() as host:
                info = await host.info("web1")
                assert (info["state"], info["exit"]["signal"]) == ("crashed", "SIGKILL")
                assert "No space left" in info["problems"][0]["text"]
                assert "virtd-qemu-web1.service" in world.units.units
                assert len(world.slots()) == 5
                with pytest.raises(errors.HostError, match="Cannot start web1 yet: Cannot write web1"):
                    await host.start("web1", by=ROOT)
                with pytest.raises(errors.HostError, match="Cannot undefine web1 yet: Cannot write web1"):
                    await host.undefine("web1", by=ROOT)
        async with world.daemon() as host:
            full.setattr(Records, "save", write)
            await until(lambda: "virtd-qemu-web1.service" not in world.units.units)
            await until(lambda: world.record("web1").unit == "")
            assert (await host.info("web1"))["problems"] == []
            nothing_left(world)
            ending = world.record("web1").exit
            assert ending is not None
            assert ending.signal == "SIGKILL"
            await host.undefine("web1", by=ROOT)


@on_loop
async def test_a_slot_nobody_knows_is_cleared_away(world: World) -> None:
    async with world.daemon() as host:
        reader, writer = os.pipe()
        host.driver._services.store.put("qemu/ghost/stdin", writer)
        os.close(reader)
        os.close(writer)
    async with world.daemon() as host:
        assert world.slots() == []
        assert (await host.status())["recovered"]["rolled_back"] == ["ghost"]
        assert await host.listing() == []
        assert not os.path.exists(world.paths.record("qemu", "ghost"))


@pytest.mark.parametrize("damage", ["cut short", "gone"])
@on_loop
async def test_a_guest_is_rebuilt_without_its_record(world: World, damage: str) -> None:
    async with world.daemon():
        pid = await world.run("web1")
        other = await world.run("web2")
    path = world.paths.record("qemu", "web1")
    if damage == "gone":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    async with world.daemon() as host:
        info = await host.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        assert (await host.info("web2"))["pid"] == other
        assert (await host.status())["recovered"]["rebuilt"] == ["web1"]
        assert bool(world.told(Message.RECORD_QUARANTINED)) == (damage == "cut short")
        world.type("web1", "echo still here")
        await until(lambda: world.console("web1") == "still here\n")
        world.type("web1", "poweroff")
        await host.driver.machines["web1"].over.wait()
        assert (await host.info("web1"))["reason"] == "powered off by itself"
        nothing_left(world)


@on_loop
async def test_a_guest_whose_unit_vanished(world: World) -> None:
    """Somebody collected the unit while virtd was away: nobody saw how it ended, and that is what is said."""
    async with world.daemon():
        await world.run("web1")
    process = world.units.process("web1")
    process.kill()
    process.wait()
    world.units.units.clear()
    async with world.daemon() as host:
        info = await host.info("web1")
        assert (info["state"], info["exit"]["cause"]) == ("crashed", "unknown")
        nothing_left(world)


@on_loop
async def test_another_process_with_the_same_pid_is_not_the_guest(world: World) -> None:
    async with world.daemon():
        await world.run("web1")
    process = world.units.process("web1")
    process.kill()
    process.wait()
    world.units.units.clear()
    path = world.paths.record("qemu", "web1")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace(f'"main_pid": {process.pid}', f'"main_pid": {os.getpid()}'))
    async with world.daemon() as host:
        assert (await host.info("web1"))["state"] == "crashed"


async def crash_everywhere(cuts: Cuts, operation: str, *, running: bool) -> list[str]:
    """Kill the daemon before every visible step of `operation`; see each time what the next daemon makes of it."""
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            pid = 0
            async with world.daemon() as host:
                await world.define("web1")
                if running:
                    pid = await world.run("web1")
                    world.type("web1", "echo before")
                await cuts.cut(world, getattr(host, operation)("web1", by=ROOT))
            async with world.daemon() as host:
                machine = host.driver.machines["web1"]
                if machine.request is not None:  # what was cut off is finished in the background
                    await asyncio.wait_for(machine.over.wait(), 20)
                info = await host.info("web1")
                where = f"{cuts.where}, {world.steps}: {info}"
                if info["state"] == "running":
                    assert world.units.process("web1").pid == info["pid"], where
                    assert world.slots() == SLOTS, where
                    assert not pid or pid == info["pid"], where
                    assert not info["problems"], where
                    world.type("web1", "echo after")
                    await until(lambda world=world: world.console("web1").endswith("after\n"))
                else:
                    assert info["state"] == "stopped", where
                    assert not info["problems"], where
                    assert world.slots() == [], where
                    assert world.units.units == {}, where
                    assert not world.runtime_left("web1"), where
                    if running:
                        assert info["exit"]["cause"] == "stop", where
                        assert world.console("web1") == "before\n", where
                changed = (await host.start("web1", by=ROOT))["changed"]
                assert changed == (info["state"] == "stopped"), where
                assert (await host.stop("web1", by=ROOT))["changed"] is True, where
                nothing_left(world)
    return cuts.seen


@on_loop
async def test_killed_at_every_step_of_a_start(cuts: Cuts) -> None:
    seen = await crash_everywhere(cuts, "start", running=False)
    # It has seen the record, the five slots, the unit, and the record with the PID.
    assert sum("FDSTORE=1" in step for step in seen) == 5
    assert sum(step.startswith("write web1.json") for step in seen) >= 2
    assert "start virtd-qemu-web1.service" in seen


@on_loop
async def test_killed_at_every_step_of_a_stop(cuts: Cuts) -> None:
    seen = await crash_everywhere(cuts, "stop", running=True)
    assert sum("FDSTOREREMOVE=1" in step for step in seen) == 5
    assert "collect virtd-qemu-web1.service" in seen


@on_loop
async def test_killed_at_every_step_of_a_reboot(cuts: Cuts) -> None:
    """The guest is rebooted by the next daemon, or not at all; and its power button is what it was."""
    cuts.wanted = {"qmp set-action", "qmp system_powerdown", "qmp system_reset", "qmp cont"}
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            async with world.daemon() as host:
                pid = await world.run("web1")
                await cuts.cut(world, host.reboot("web1", force=False, timeout=20, by=ROOT))
            async with world.daemon() as host:
                machine = host.driver.machines["web1"]
                await until(lambda machine=machine: machine.request is None)
                where = f"{cuts.where}: {machine.reason}"
                assert (machine.state, (await host.info("web1"))["pid"]) == ("running", pid), where
                assert machine.problems == {}, where
                assert (await host.shutdown("web1", None, by=ROOT))["changed"] is True, where
                assert (await host.info("web1"))["exit"]["cause"] == "shutdown", where
    assert cuts.wanted <= set(cuts.seen)


@on_loop
async def test_killed_at_every_step_of_an_autostart(cuts: Cuts) -> None:
    """Each guest is started once in this boot, by this daemon or the next."""
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            async with world.daemon() as host:
                for name in ("web1", "web2"):
                    await world.define(name, more="autostart = true\n")
                await cuts.cut(world, host.autostart())
            async with world.daemon() as host:
                await host.autostart()
                where = f"{cuts.where}: {await host.listing()}"
                assert [item["state"] for item in await host.listing()] == ["running", "running"], where
                assert host.drivers.get("qemu").troubles() == [], where
                await host.stop("web1", by=ROOT)
            async with world.daemon() as host:
                await host.autostart()
                assert (await host.info("web1"))["state"] == "stopped", where
    assert "write autostarted" in cuts.seen
    assert len(cuts.seen) > 20


@on_loop
async def test_a_reboot_that_was_cut_off_and_is_ignored_is_given_up(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.settings = type(world.settings)(binary=world.settings.binary, shutdown_timeout=0.2)
    async with world.daemon() as host:
        await world.run("web1", "deaf")
        reboot = asyncio.ensure_future(host.reboot("web1", force=False, timeout=600, by=ROOT))
        await until(lambda: "qmp system_powerdown" in world.steps)
        reboot.cancel()
        await asyncio.gather(reboot, return_exceptions=True)
    async with world.daemon() as host:
        machine = host.driver.machines["web1"]
        await until(lambda: "did not shut down" in machine.reason)
        assert machine.problems == {}
        world.type("web1", "poweroff")
        await machine.over.wait()
        assert machine.reason == "powered off by itself"


@on_loop
async def test_what_an_ended_guest_left_in_the_store_is_dropped(world: World) -> None:
    """PID 1 took no message at its end, or an older virtd, which knew nothing of boxes, couldn't see its slots."""
    async with world.daemon() as host:
        await world.run("web1")
        left = {name: os.dup(host.services.store.get(name)) for name in SLOTS}
        await host.stop("web1", by=ROOT)
        assert world.slots() == []
        host.services.store.put_all(left)
        for fd in left.values():
            os.close(fd)
    assert world.slots() == SLOTS
    async with world.daemon() as host:
        assert world.slots() == []
        assert (await host.info("web1"))["state"] == "stopped"
        assert (await host.status())["problems"] == []
        nothing_left(world)
