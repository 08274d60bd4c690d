# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd, the bus or the file system refuses once or for a while: nothing stays behind, and the caller is told.

The real parts' turn is `make sweep SWEEP=--errors`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from tests.doubles.whole_host import ROOT, nothing_left, on_loop, until
from virtd import errors
from virtd.children import ending
from virtd.drivers.qemu import ownership
from virtd.drivers.qemu.monitor import Link, Monitor
from virtd.fdstore import NotifyFailed, Store
from virtd.systemd.bus import BusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doubles.whole_host import World
    from virtd.systemd.transient import UnitSpec

REFUSED = BusError("org.freedesktop.systemd1.UnitMasked", "Unit virtd-qemu.slice is masked.")
TIMED_OUT = errors.TimedOut("org.freedesktop.systemd1 did not answer StartTransientUnit within 60 s")
GONE = BusError("org.freedesktop.DBus.Error.Disconnected", "the D-Bus connection was closed")


@pytest.fixture
def disk(world: World) -> str:
    path = f"{world.paths.root}/disk"
    with open(path, "w"):
        pass
    return path


@pytest.mark.parametrize("error", [REFUSED, TIMED_OUT, GONE], ids=["refused", "timed out", "bus lost"])
@pytest.mark.parametrize("began", [False, True], ids=["unit there not", "unit there"])
@on_loop
async def test_a_start_that_systemd_fails_leaves_nothing(
    world: World, disk: str, monkeypatch: pytest.MonkeyPatch, error: errors.VirtdError, began: bool
) -> None:
    """Also when the unit was started all the same, and only the word of it got lost."""
    real = world.units.start

    async def start(*arguments: Any, **options: Any) -> Any:
        if began:
            await real(*arguments, **options)
        raise error

    async with world.daemon() as host:
        await world.define("web1", more=f'[[disk]]\npath = "{disk}"\nformat = "raw"\n')
        with monkeypatch.context() as patch:
            patch.setattr(world.units, "start", start)
            with pytest.raises(errors.VirtdError) as caught:
                await host.domains.start("web1", by=ROOT)
        assert error.message in str(caught.value)
        info = await host.domains.info("web1")
        assert (info["state"], info["problems"]) == ("stopped", [])
        assert error.message in info["reason"]
        nothing_left(world)
        assert (await host.check_all(repair=False, by=ROOT))["differences"] == []
        assert (await host.domains.start("web1", by=ROOT))["changed"] is True


def _no_message(_world: World, patch: pytest.MonkeyPatch) -> None:
    def tell(_store: Store, text: str, *_fds: int) -> None:
        raise NotifyFailed(f"no room for {text.split()[0]}")

    patch.setattr(Store, "_tell", tell)


def _no_bus(world: World, patch: pytest.MonkeyPatch) -> None:
    async def collect(*_arguments: Any, **_options: Any) -> None:
        raise GONE

    patch.setattr(world.units, "collect", collect)


def _busy_systemd(world: World, patch: pytest.MonkeyPatch) -> None:
    async def collect(*_arguments: Any, **_options: Any) -> None:
        raise errors.TimedOut("systemd did not unload virtd-qemu-web1.service")

    patch.setattr(world.units, "collect", collect)


def _no_removal(_world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("virtd.files.remove_tree", lambda _path: None)


FAULTS = {
    "the notify socket": (_no_message, "no room for FDSTOREREMOVE=1"),
    "the bus": (_no_bus, "the D-Bus connection was closed"),
    "systemd": (_busy_systemd, "did not unload"),
    "a directory": (_no_removal, "can't be removed"),
}


@pytest.mark.parametrize("how", ["stop", "kill", "by itself", "while no daemon was there"])
@pytest.mark.parametrize("what", FAULTS)
@on_loop
async def test_what_cant_be_put_away_is_tried_again(
    world: World, disk: str, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    monkeypatch.setattr(ending, "AGAIN", 0.02)
    fault, words = FAULTS[what]
    async with world.daemon():
        await world.run("web1", more=f'[[disk]]\npath = "{disk}"\nformat = "raw"\n')
        if how != "while no daemon was there":
            await _faulty(world, monkeypatch, fault, words, how)
            return
    world.units.process("web1").kill()
    world.units.process("web1").wait()
    with monkeypatch.context() as patch:
        fault(world, patch)
        async with world.daemon() as host:
            await _told(world, words)
            patch.undo()
            await _over(world, host)


async def _faulty(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[World, pytest.MonkeyPatch], None],
    words: str,
    how: str,
) -> None:
    host = world.host
    assert host is not None
    with monkeypatch.context() as patch:
        fault(world, patch)
        if how == "stop":
            await host.domains.stop("web1", by=ROOT)
        elif how == "kill":
            await host.domains.kill("web1", 9, by=ROOT)
        else:
            world.units.process("web1").kill()
        await _told(world, words)
    await _over(world, host)


async def _told(world: World, words: str) -> None:
    """It has ended, what is left of it is a problem, and until that is mended it isn't started."""
    host = world.host
    assert host is not None
    machine = host.domains.driver.machines["web1"]
    await until(lambda: "leftovers" in machine.problems, "the problem")
    assert words in machine.problems["leftovers"].text
    info = await host.domains.info("web1")
    assert info["state"] in ("stopped", "crashed")
    assert info["exit"] is not None
    with pytest.raises(errors.HostError, match="Cannot start web1 yet"):
        await host.domains.start("web1", by=ROOT)


async def _over(world: World, host: Any) -> None:
    machine = host.domains.driver.machines["web1"]
    await until(lambda: not machine.leftovers, "the end of it")
    assert machine.problems == {}
    nothing_left(world)
    assert (await host.domains.start("web1", by=ROOT))["changed"] is True
    await host.domains.stop("web1", by=ROOT)
    nothing_left(world)


@on_loop
async def test_a_daemon_that_ends_meanwhile_leaves_it_to_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        with monkeypatch.context() as patch:
            _no_message(world, patch)
            await host.domains.stop("web1", by=ROOT)
            assert host.domains.driver.machines["web1"].leftovers
    assert [slot for slot in world.slots() if slot.startswith("qemu/web1/")] != []
    async with world.daemon() as host:
        nothing_left(world)
        assert (await host.domains.info("web1"))["problems"] == []


@on_loop
async def test_a_disk_that_cant_be_given_back_is_told_after_all_others_were(
    world: World, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def chown(path: str, *_ids: int) -> None:
        if (name := os.readlink(path)) == disk:
            raise PermissionError(1, "Operation not permitted", path)
        given.append(name)

    monkeypatch.setattr(os, "chown", chown)
    owners = []
    for path in (disk, world.kernel):
        status = os.stat(path)
        owners.append(ownership.Given(path, status.st_dev, status.st_ino, 0, 0, status.st_uid))
    with pytest.raises(errors.HostError, match=f"{disk} can't be given back: Operation not permitted"):
        ownership.give_back([ownership.Given("/nowhere/disk", 1, 1, 0, 0, 0), *owners])
    assert given == [world.kernel]


@on_loop
async def test_a_monitor_that_is_refused_once_is_connected_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtd.drivers.qemu.guest.LINK_AGAIN", 0.02)
    real = Monitor.connect
    refused: list[Monitor] = []

    async def connect(monitor: Monitor, limit: float, *, made: bool = False) -> None:
        if not refused:
            refused.append(monitor)
            monitor.link = Link.CLOSED
            raise errors.MonitorError("Cannot connect to the QEMU monitor of web1: No buffer space available")
        await real(monitor, limit, made=made)

    async with world.daemon():
        await world.run("web1")
    monkeypatch.setattr(Monitor, "connect", connect)
    async with world.daemon() as host:
        machine = host.domains.driver.machines["web1"]
        await until(lambda: machine.monitor is not None and machine.monitor.link is Link.CONNECTED, "the monitor")
        await until(lambda: machine.problems == {}, "what QEMU does")
        assert refused


@on_loop
async def test_a_start_that_could_not_be_undone_is_as_soon_as_there_is_a_bus(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU runs, and the bus has broken off before anybody was told: nobody else would ever end it."""
    monkeypatch.setattr(ending, "AGAIN", 0.02)
    real = world.units.start

    async def start(spec: UnitSpec, *arguments: Any) -> Any:
        # One that stays when nobody is at the other ends of its pipes, as QEMU does.
        await real(replace(spec, name="virtd-storage-web1.service", argv=("/bin/sleep", "1000")), *arguments)
        world.units.units[spec.name] = world.units.units.pop("virtd-storage-web1.service")
        raise GONE

    async def gone(*_arguments: Any, **_options: Any) -> Any:
        raise GONE

    async with world.daemon() as host:
        await world.define("web1")
        with monkeypatch.context() as patch:
            patch.setattr(world.units, "start", start)
            patch.setattr(world.units, "kill", gone)
            patch.setattr(world.units, "ended", gone)
            with pytest.raises(errors.VirtdError, match="closed"):
                await host.domains.start("web1", by=ROOT)
            await until(lambda: "leftovers" in host.domains.driver.machines["web1"].problems, "the problem")
            assert world.units.process("web1").poll() is None
        await _over(world, host)
