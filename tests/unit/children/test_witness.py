# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends whose units tell nothing any more, units that somebody else starts again, and what is told too early."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.doubles.fake_units import FakeUnits
from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd import process
from virtd.children import witness
from virtd.drivers.qemu import ends
from virtd.records import now, stamp
from virtd.replies import Reply
from virtd.systemd.state import CLD_DUMPED, CLD_EXITED, CLD_KILLED, UnitState

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT = "virtd-qemu-web1.service"
EXITED = {"EXIT_CODE": "exited", "EXIT_STATUS": "3"}


def killed(number: str = "9", at: float = 100.0) -> list[witness.Told]:
    return [
        witness.Told("39f53479d3a045ac8e11786248231fbf", at - 50, {}),
        witness.Told(witness.PROCESS_EXIT, at, {"EXIT_CODE": "killed", "EXIT_STATUS": number}),
        witness.Told(witness.UNIT_FAILURE, at + 0.1, {"UNIT_RESULT": "signal"}),
    ]


@pytest.mark.parametrize(
    ("told", "code", "status", "result"),
    [
        (killed(), CLD_KILLED, 9, "signal"),
        (killed("KILL"), CLD_KILLED, 9, "signal"),
        (killed("999"), CLD_KILLED, 999, "signal"),
        ([witness.Told(witness.PROCESS_EXIT, 100.0, EXITED)], CLD_EXITED, 3, "failed"),
        ([witness.Told(witness.UNIT_SUCCESS, 100.0, {})], 0, 0, "success"),
        ([witness.Told(witness.UNIT_FAILURE, 100.0, {"UNIT_RESULT": "oom-kill"})], 0, 0, "oom-kill"),
        ([witness.Told(witness.PROCESS_EXIT, 100.0, {"EXIT_CODE": [1], "EXIT_STATUS": None})], 0, 0, "failed"),
    ],
)  # fmt: skip
def test_what_the_journal_says(told: list[witness.Told], code: int, status: int, result: str) -> None:
    found = witness.judge(UNIT, "1" * 32, told)
    assert found is not None
    assert (found.exec_code, found.exec_status, found.result, found.exited_at) == (code, status, result, 100.0)
    assert witness.judge(UNIT, "1" * 32, told[:0]) is None


def test_an_id_as_the_journals_reader_gives_it() -> None:
    import uuid

    assert witness.entry_id(uuid.UUID(witness.PROCESS_EXIT)) == witness.PROCESS_EXIT
    assert witness.entry_id(None) == ""


async def forgotten(world: World, during: Callable[[], None]) -> Reply:
    """A guest ends while virtd is away, and systemd forgets its unit: what is said of it afterwards."""
    async with world.daemon():
        await world.run("web1")
    during()
    unit = world.units.units.pop(UNIT)
    unit.process.wait()
    async with world.daemon() as host:
        return await host.domains.info("web1")


@on_loop
async def test_reset_failed_while_virtd_is_away(world: World) -> None:
    def kill() -> None:
        world.journal[UNIT] = killed(at=1_700_000_000.25)
        world.units.process("web1").kill()

    info = await forgotten(world, kill)
    assert (info["state"], info["reason"]) == ("crashed", "killed by SIGKILL")
    assert (info["exit"]["signal"], info["exit"]["at"]) == ("SIGKILL", stamp(1_700_000_000.25))


@on_loop
async def test_without_a_word_of_the_journal(world: World) -> None:
    info = await forgotten(world, lambda: world.units.process("web1").kill())
    assert (info["state"], info["exit"]["cause"]) == ("crashed", "unknown")


@on_loop
async def test_reset_failed_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd has the unit's file yet, and loads it as one that never ran."""
    async with world.daemon() as host:
        await world.run("web1")
        real = world.units.ended

        async def ended(name: str, *args: Any, **more: Any) -> UnitState | None:
            state = await real(name, *args, **more)
            assert state is not None
            return UnitState(name, "loaded", "inactive", "dead", "success", 0, "", 0, 0, None, "")

        monkeypatch.setattr(world.units, "ended", ended)
        world.journal[UNIT] = killed()
        world.units.process("web1").send_signal(signal.SIGKILL)
        await until(lambda: host.domains.driver.machines["web1"].state == "crashed", "its end")
        assert (await host.domains.info("web1"))["exit"]["signal"] == "SIGKILL"


# systemd 257 and later may lose the status of a process with PrivatePIDs=, see witness._known


def lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PID 1 says of every unit that has ended is that it has."""
    real = world.units.state

    async def state(name: str) -> UnitState | None:
        found = await real(name)
        if found is None or found.running:
            return found
        return msgspec.structs.replace(
            found, active="active", sub="exited", result="success", exec_code=0, exec_status=0, exited_at=None
        )

    async def ended(name: str, *args: Any, **more: Any) -> UnitState | None:
        await FakeUnits.ended(world.units, name, *args, **more)
        return await state(name)

    monkeypatch.setattr(world.units, "state", state)
    monkeypatch.setattr(world.units, "ended", ended)


async def killed_and_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> Reply:
    """A guest is killed, and so is the daemon before PID 1 has told it how: what the next one says."""
    lost(world, monkeypatch)
    async with world.daemon() as host:
        await world.run("web1")
        real = world.units.ended

        async def never(*_args: Any, **_more: Any) -> UnitState | None:
            await asyncio.Event().wait()
            return None

        monkeypatch.setattr(world.units, "ended", never)
        before = now()
        await asyncio.sleep(0)  # the turn in which it is begun to be watched
        world.units.process("web1").kill()
        world.units.process("web1").wait()
        machine = host.domains.driver.machines["web1"]
        await until(lambda: machine.seen is not None, "the sight of it")
    assert world.record("web1").reason == "ending"
    between = now()
    monkeypatch.setattr(world.units, "ended", real)
    async with world.daemon() as host:
        info = await host.domains.info("web1")
    assert before <= info["exit"]["at"] <= between
    assert "seen" not in world.record("web1").data
    return info


@on_loop
async def test_a_status_that_pid_1_has_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtd.process.exit_status", lambda _pidfd: 9)
    info = await killed_and_cut_off(world, monkeypatch)
    assert (info["state"], info["exit"]["signal"], info["exit"]["cause"]) == ("crashed", "SIGKILL", "killed")


@on_loop
async def test_a_status_that_nobody_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel to ask, before 6.15: nothing is made up, but for when it was there is a witness."""

    def unknown(_pidfd: int) -> int:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    monkeypatch.setattr("virtd.process.exit_status", unknown)
    info = await killed_and_cut_off(world, monkeypatch)
    assert (info["state"], info["reason"]) == ("crashed", "ended, and nobody saw how")
    assert (info["exit"]["signal"], info["exit"]["cause"]) == (None, "unknown")


@pytest.mark.parametrize(
    ("status", "code", "number", "result"),
    [
        (9, CLD_KILLED, 9, "signal"),
        (11 | 0x80, CLD_DUMPED, 11, "core-dump"),
        (3 << 8, CLD_EXITED, 3, "exit-code"),
        (0, CLD_EXITED, 0, "success"),
    ],
)
def test_what_the_kernel_says(status: int, code: int, number: int, result: str) -> None:
    found = witness.by_status(UNIT, None, 100.0, status)
    assert (found.exec_code, found.exec_status, found.result, found.exited_at) == (code, number, result, 100.0)


@pytest.mark.parametrize("status", [9, 3 << 8, 0])
def test_the_kernel_is_asked(status: int) -> None:
    child = subprocess.Popen(
        ["sh", "-c", f"kill -9 $$; exit {status >> 8}" if status == 9 else f"exit {status >> 8}"]
    )
    pidfd = os.pidfd_open(child.pid)
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        try:
            assert process.exit_status(pidfd) is None, "nobody has waited for it"
            child.wait()
            assert process.exit_status(pidfd) == status
        except OSError:
            pytest.skip("Linux 6.15 or later")
    finally:
        child.wait()
        os.close(pidfd)


def test_the_diary_has_the_time() -> None:
    events = [
        {"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}, "timestamp": {"seconds": 5, "microseconds": 1}}
    ]
    end = ends.judge(ends.evidence(None, events, None, "", stamp(100.0)))
    assert end.exit.at == stamp(5.000001)
    for lie in (
        {"seconds": 1 << 60, "microseconds": 0},
        {"seconds": 1000, "microseconds": 0},
        {"seconds": "x"},
        7,
        None,
    ):
        end = ends.judge(ends.evidence(None, [events[0] | {"timestamp": lie}], None, "", stamp(100.0)))
        assert end.exit.at == stamp(100.0), lie


# Somebody else starts it again


@pytest.mark.parametrize("away", [False, True])
@on_loop
async def test_a_unit_of_an_older_virtd_that_is_restarted(world: World, *, away: bool) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        if not away:
            await restarted(world)
            await until(lambda: "restarted" in host.domains.driver.machines["web1"].problems, "the word of it")
            await looked_after(world)
    if away:
        await restarted(world)
    for _ in range(2):
        async with world.daemon() as host:
            assert host.domains.driver.machines["web1"].state == "running"
            await looked_after(world)
            assert (await host.domains.start("web1", by=ROOT))["changed"] is False
    async with world.daemon() as host:
        await host.domains.stop("web1", by=ROOT)
        info = await host.domains.info("web1")
        assert (info["state"], info["problems"]) == ("stopped", []), info
        assert (await host.domains.start("web1", by=ROOT))["changed"] is True


async def restarted(world: World) -> None:
    """What systemctl does with a unit that doesn't refuse it."""
    units = world.units
    old, step = units.units[UNIT], units.step
    old.restarting = True
    old.process.kill()
    old.process.wait()
    units.step = lambda _what: None
    await units.start(msgspec.structs.replace(old.spec, name="new"), ("/dev/null", "/dev/null", "/dev/null"))
    units.step = step
    units.units[UNIT] = units.units.pop("new")
    units.units[UNIT].spec = old.spec


async def looked_after(world: World) -> None:
    assert world.host is not None
    info = await world.host.domains.info("web1")
    assert info["state"] == "running"
    assert info["pid"] == world.units.process("web1").pid
    (problem,) = [one for one in info["problems"] if "restarted by somebody" in one["text"]]
    assert problem["hint"] == "virtdctl stop web1, then virtdctl start web1."


# Told too early


@pytest.mark.parametrize("by", ["slots", "unit"])
@on_loop
async def test_what_lacks_a_record_is_not_told_of_before_it_is_known(world: World, by: str) -> None:
    async with world.daemon():
        pid = await world.run("web1")
    os.unlink(world.paths.record("qemu", "web1"))
    if by == "unit":
        os.makedirs(world.paths.transient)
        open(f"{world.paths.transient}/{UNIT}", "w").close()
        world.pid1.store_max = 0
        for entry in world.pid1.entries:
            os.close(entry.fd)
        world.pid1.entries.clear()
        world.pid1.store_max = 1000
    async with world.daemon(reconcile=False) as host:
        assert not host.settled()
        listing = asyncio.ensure_future(host.domains.listing())
        waiting = asyncio.ensure_future(host.domains.wait("web1", ["stopped"], 20))
        await asyncio.sleep(0)
        assert not listing.done()
        await host.reconcile()
        (item,) = await listing
        assert (item["state"], item["pid"]) == ("running", pid)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert host.settled()
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_leftovers_of_nobody_are_no_object(world: World) -> None:
    os.makedirs(world.paths.transient)
    open(f"{world.paths.transient}/virtd-qemu-ghost.service", "w").close()
    async with world.daemon() as host:
        assert await host.domains.listing() == []
        assert host.settled()
