# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's TPM: what it keeps, and what becomes of swtpm and of machines without one."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, World, nothing_left, on_loop, until
from tests.unit.guests.test_fsck import edit
from virtd import errors
from virtd.children import programs
from virtd.drivers.qemu import swtpm, tpmstate
from virtd.messages import Message
from virtd.replies.guests import Tpm

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

UNIT = "virtd-qemu-web1@tpm.service"
WITH_TPM = "tpm = {}\n"


@pytest.fixture
def world(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(programs, "find", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(swtpm, "GRACE", 0.01)
    return make_world()


def process(world: World) -> subprocess.Popen[bytes]:
    return world.units.units[UNIT].process


def directory(world: World, uuid: str) -> str:
    return world.paths.tpm("web1", uuid)


@on_loop
async def test_what_it_keeps_outlives_the_guest(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", more=WITH_TPM)
        info = await host.domains.info("web1")
        state = directory(world, info["uuid"])
        pid = process(world).pid
        assert info["tpm"] == Tpm(model="crb", version="2.0", state=state, unit=UNIT, pid=pid)
        assert [device["what"] for device in info["hardware"]["devices"] if device["id"] == "tpm0"] == ["crb"]
        spec = world.units.units[UNIT].spec
        assert spec.user == world.units.units["virtd-qemu-web1.service"].spec.user
        assert UNIT in world.units.units["virtd-qemu-web1.service"].spec.after
        assert world.units.history[-2:] == [f"start {UNIT}", "start virtd-qemu-web1.service"]
        if os.geteuid() == 0:
            assert os.stat(state).st_uid == int(spec.user)
        await host.domains.stop("web1", by=ROOT)
        nothing_left(world)
        assert world.units.units == {}
        assert os.stat(state).st_uid == os.geteuid()
        assert (await host.domains.info("web1"))["tpm"]["pid"] is None
        await host.domains.start("web1", by=ROOT)
        await host.domains.stop("web1", by=ROOT)
        await host.domains.undefine("web1", by=ROOT)
        with open(f"{state}/tpm2-00.permall") as file:
            assert file.read() == "on on "


@on_loop
async def test_it_is_removed_on_request(world: World) -> None:
    """With the variables of UEFI, and nothing of another guest that had the name."""
    async with world.daemon() as host:
        await world.run("web1", more=WITH_TPM)
        info = await host.domains.info("web1")
        state, beside = directory(world, info["uuid"]), os.path.dirname(directory(world, info["uuid"]))
        for name in (f"{info['uuid']}.fd", f"{info['uuid']}.secure.fd", "another.fd"):
            open(f"{beside}/{name}", "w").close()
        with pytest.raises(errors.InvalidState, match="Cannot remove the state of web1: it is running") as caught:
            await host.domains.remove_state("web1", by=ROOT)
        assert "virtdctl stop web1" in str(caught.value.hint)
        await host.domains.stop("web1", by=ROOT)
        assert os.listdir(state)
        assert (await host.domains.remove_state("web1", by=ROOT))["changed"] is True
        assert os.listdir(beside) == ["another.fd"]
        assert (await host.domains.remove_state("web1", by=ROOT))["changed"] is False
        os.unlink(f"{beside}/another.fd")
        await host.domains.start("web1", by=ROOT)
        await host.domains.stop("web1", by=ROOT)
        assert (await host.domains.remove_state("web1", by=ROOT))["changed"] is True
        assert not os.path.exists(beside)


@on_loop
async def test_it_ends_before_the_guest(world: World) -> None:
    """A problem, found by whichever daemon is there, and reported once; the guest runs on without it."""
    for seen in (True, False):
        async with world.daemon() as host:
            pid = await world.run("web1", more=WITH_TPM)
            if seen:
                process(world).kill()
                await until(lambda host=host: "tpm" in host.domains.driver.machines["web1"].problems)
        if not seen:
            process(world).kill()
            process(world).wait()
        for _ in range(2):
            async with world.daemon() as host:
                machine = host.domains.driver.machines["web1"]
                await until(lambda machine=machine: "tpm" in machine.problems)
                problem = machine.problems["tpm"]
                assert "Its TPM has ended" in problem.text
                assert f"journalctl -u {UNIT}" in str(problem.hint)
                assert machine.live.record.main_pid == pid
                (difference,) = (await host.check_all(repair=True, by=None))["differences"]
                assert (difference["object"], difference["repaired"]) == ("qemu/web1", False)
        assert len(world.told(Message.TPM_ENDED)) == (1 if seen else 2)
        async with world.daemon() as host:
            await host.domains.stop("web1", by=ROOT)
            assert (await host.status())["problems"] == []
            nothing_left(world)
            assert world.units.units == {}


@on_loop
async def test_its_end_with_the_guest_is_no_problem(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", more=WITH_TPM)
        world.type("web1", "poweroff")
        machine = host.domains.driver.machines["web1"]
        await machine.over.wait()
        assert machine.reason == "powered off by itself"
        assert world.told(Message.TPM_ENDED) == []
        assert world.units.units == {}


@on_loop
async def test_without_swtpm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda _name: None)
    async with world.daemon() as host:
        warnings = (await world.define("web1", more=WITH_TPM))["warnings"]
        assert warnings == ["tpm: swtpm, which emulates it, isn't installed"]
        with pytest.raises(
            errors.InvalidDefinition, match="tpm: swtpm, which emulates it, isn't installed"
        ) as caught:
            await host.domains.start("web1", by=ROOT)
        assert "Debian: swtpm" in str(caught.value.hint)
        assert world.units.history == []


@on_loop
async def test_a_start_that_fails_leaves_neither(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", "fail=1", more=WITH_TPM)
        with pytest.raises(errors.StartFailed, match="Cannot allocate memory"):
            await host.domains.start("web1", by=ROOT)
        assert f"stop {UNIT}" in world.units.history
        assert world.units.units == {}
        nothing_left(world)
        real = world.units.start

        async def start(*args: object, **kwargs: object) -> object:
            raise errors.StartFailed("swtpm can't be executed")

        world.units.start = start  # type: ignore[method-assign, assignment]
        with pytest.raises(errors.StartFailed, match="can't be executed"):
            await host.domains.start("web1", by=ROOT)
        world.units.start = real  # type: ignore[method-assign]
        nothing_left(world)
        assert world.units.units == {}


@on_loop
async def test_a_process_that_was_not_recorded_yet(world: World) -> None:
    async with world.daemon():
        await world.run("web1", more=WITH_TPM)
    pid = process(world).pid
    edit(world.paths.record("qemu", "web1"), f'"pid": {pid}', '"pid": 0')
    async with world.daemon() as host:
        machine = host.domains.driver.machines["web1"]
        await until(lambda: machine.data["tpm"]["pid"] == pid)
        assert machine.problems == {}
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_a_lost_record(world: World) -> None:
    """The machine is rebuilt with its TPM, which its unit's file shows."""
    async with world.daemon():
        pid = await world.run("web1", more=WITH_TPM)
    os.makedirs(world.paths.transient)
    open(f"{world.paths.transient}/{UNIT}", "w").close()
    os.unlink(world.paths.record("qemu", "web1"))
    async with world.daemon() as host:
        info = await host.domains.info("web1")
        assert (info["pid"], info["tpm"]["unit"]) == (pid, UNIT)
        assert process(world).poll() is None
        await host.domains.stop("web1", by=ROOT)
        assert world.units.units == {}
        assert os.stat(info["tpm"]["state"]).st_uid == os.geteuid()


@pytest.mark.parametrize("restart", [True, False])
@on_loop
async def test_one_that_belongs_to_nothing(world: World, restart: bool) -> None:
    """A daemon's start puts it away, and so does fsck."""
    async with world.daemon() as host:
        await world.run("web1", more=WITH_TPM)
        left = world.units.units[UNIT]
        state = (await host.domains.info("web1"))["tpm"]["state"]
        del world.units.units[UNIT]  # nobody puts it away with the guest
        await host.domains.stop("web1", by=ROOT)
        os.chown(state, 12345, 12345)
        world.units.units[UNIT] = left
        (found,) = (await host.check_all(repair=False, by=None))["differences"]
        assert (found["kind"], found["object"], found["repaired"]) == ("unit", "qemu/web1", False)
        assert "web1 doesn't run" in found["text"]
        if not restart:
            (found,) = (await host.check_all(repair=True, by=None))["differences"]
            assert found["repaired"] is True
            assert world.units.units == {}
    if restart:
        os.makedirs(world.paths.transient)
        open(f"{world.paths.transient}/{UNIT}", "w").close()
    async with world.daemon() as host:
        assert world.units.units == {}
        assert os.stat(state).st_uid == os.geteuid()
        assert (await host.check_all(repair=False, by=None))["differences"] == []
    left.process.send_signal(signal.SIGKILL)
    left.process.wait()


def test_only_its_own_files_are_handed_over(tmp_path: Path) -> None:
    state, other = tmp_path / "qemu" / "a" / "u.tpm", tmp_path / "secret"
    tpmstate.hand_over(str(state), os.getuid(), os.getgid())
    assert state.stat().st_mode & 0o777 == 0o700
    other.write_text("secret")
    other.chmod(0o604)
    (state / "tpm2-00.permall").write_text("kept")
    (state / "tpm2-00.volatilestate").symlink_to(other)
    (state / ".lock").hardlink_to(other)
    (state / "TMP2-00.permall").write_text("half")
    (state / "deep" / "er").mkdir(parents=True)
    os.mkfifo(state / "tpm2-00.savestate")
    tpmstate.give_back(str(state))
    assert [path.name for path in state.iterdir()] == ["tpm2-00.permall"]
    assert (state / "tpm2-00.permall").read_text() == "kept"
    assert other.read_text() == "secret"
    assert other.stat().st_mode & 0o777 == 0o604
    tpmstate.give_back(str(tmp_path / "none"))


def test_a_link_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "a" / "u.tpm").symlink_to(tmp_path / "elsewhere")
    for call in (lambda path: tpmstate.hand_over(path, os.getuid(), os.getgid()), tpmstate.give_back):
        with pytest.raises(errors.HostError, match=r"u\.tpm"):
            call(str(tmp_path / "a" / "u.tpm"))
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_whose_it_is(tmp_path: Path) -> None:
    state = tmp_path / "a" / "u.tpm"
    tpmstate.hand_over(str(state), 4711, 4712)
    (state / "tpm2-00.permall").write_text("kept")
    tpmstate.hand_over(str(state), 4713, 4714)
    for path in (state, state / "tpm2-00.permall"):
        assert (path.stat().st_uid, path.stat().st_gid) == (4713, 4714)
    tpmstate.give_back(str(state))
    for path in (state, state / "tpm2-00.permall"):
        assert (path.stat().st_uid, path.stat().st_gid) == (0, 0)
