# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of guests over restarts and crashes of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from tests.doubles.whole_host import ROOT, SLOTS, World, nothing_left, on_loop, until
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doubles.cuts import Cuts


@on_loop
async def test_a_guest_does_not_notice_restarts(world: World) -> None:
    async with world.daemon():
        pid = await world.run("web1", "print=2000")
    for number in range(3):
        async with world.daemon() as host:
            info = await host.domains.info("web1")
            assert (info["state"], info["pid"], info["id"]) == ("running", pid, 1)
            world.type("web1", f"echo {number}")
            expected = [f"line {line}" for line in range(2000)] + [str(line) for line in range(number + 1)]
            await until(lambda expected=expected: world.console("web1").splitlines() == expected)
            status = await host.status()
            assert (status["recovered"]["objects"], status["recovered"]["adopted"]) == (1, ["web1"])
            assert world.told(Message.ADOPTED)[number]["VIRTD_PID"] == str(pid)
    async with world.daemon() as host:
        assert (await host.domains.shutdown("web1", None, by=ROOT))["changed"] is True
        nothing_left(world)


@on_loop
async def test_pumps_run_before_there_is_a_bus(world: World) -> None:
    async with world.daemon():
        pid = await world.run("web1")
    async with world.daemon(reconcile=False) as host:
        assert (await host.domains.listing())[0]["pid"] == pid
        world.type("web1", "echo early")
        await until(lambda: world.console("web1") == "early\n")


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
        info = await host.domains.info("web1")
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
        assert (await host.domains.info("web1"))["state"] == "crashed"


@on_loop
async def test_killed_at_every_step_of_a_reboot(cuts: Cuts) -> None:
    """The guest is rebooted by the next daemon, or not at all; and its power button is what it was."""
    cuts.wanted = {"qmp set-action", "qmp system_powerdown", "qmp system_reset", "qmp cont"}
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            async with world.daemon() as host:
                pid = await world.run("web1")
                await cuts.cut(world, host.domains.reboot("web1", force=False, timeout=20, by=ROOT))
            async with world.daemon() as host:
                machine = host.domains.driver.machines["web1"]
                await until(lambda machine=machine: machine.request is None)
                where = f"{cuts.where}: {machine.reason}"
                assert (machine.state, (await host.domains.info("web1"))["pid"]) == ("running", pid), where
                assert machine.problems == {}, where
                assert (await host.domains.shutdown("web1", None, by=ROOT))["changed"] is True, where
                assert (await host.domains.info("web1"))["exit"]["cause"] == "shutdown", where
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
                where = f"{cuts.where}: {await host.domains.listing()}"
                assert [item["state"] for item in await host.domains.listing()] == ["running", "running"], where
                assert host.drivers.get("qemu").troubles() == [], where
                await host.domains.stop("web1", by=ROOT)
            async with world.daemon() as host:
                await host.autostart()
                assert (await host.domains.info("web1"))["state"] == "stopped", where
    assert "write autostarted" in cuts.seen
    assert len(cuts.seen) > 20


@on_loop
async def test_a_reboot_that_was_cut_off_and_is_ignored_is_given_up(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.settings = type(world.settings)(binary=world.settings.binary, shutdown_timeout=0.2)
    async with world.daemon() as host:
        await world.run("web1", "deaf")
        reboot = asyncio.ensure_future(host.domains.reboot("web1", force=False, timeout=600, by=ROOT))
        await until(lambda: "qmp system_powerdown" in world.steps)
        reboot.cancel()
        await asyncio.gather(reboot, return_exceptions=True)
    async with world.daemon() as host:
        machine = host.domains.driver.machines["web1"]
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
        await host.domains.stop("web1", by=ROOT)
        assert world.slots() == []
        host.services.store.put_all(left)
        for fd in left.values():
            os.close(fd)
    assert world.slots() == SLOTS
    async with world.daemon() as host:
        assert world.slots() == []
        assert (await host.domains.info("web1"))["state"] == "stopped"
        assert (await host.status())["problems"] == []
        nothing_left(world)
