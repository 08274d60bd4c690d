# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of containers when the daemon is killed at each step of an operation on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles import fake_lxc
from tests.doubles.fake_units import Unit
from tests.doubles.whole_host import ROOT, SLOTS, SteppingOs, World, nothing_left, on_loop, until
from virtd import errors
from virtd.drivers.lxc import cgroup, create, execs, first, prerequisites, starting, unpack
from virtd.drivers.lxc.container import Container

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.doubles.cuts import Cuts
    from virtd.host import Host
    from virtd.systemd.state import UnitState
    from virtd.systemd.transient import UnitSpec


UNIT = "virtd-lxc-web1.service"
CONTAINER_SLOTS = [slot.replace("qemu/", "lxc/") for slot in SLOTS]
ENDING = "systemd/systemd"  # what an init is called that knows SIGRTMIN+3 and SIGRTMIN+5


def frozen(group: cgroup.Group) -> bool:
    """As soon as it is asked for: there is no kernel behind it."""
    with open(f"{group.path}/cgroup.freeze") as file:
        return file.read() == "1"


class Site:
    """A world with LXC in it. Containers share the host's IDs here, since tests may not run as root."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.world = World(directory, patch, **options)
        self.root = f"{directory}/root"
        for path in (self.world.paths.etc, self.world.paths.run, self.world.paths.log):
            os.makedirs(f"{path}/lxc")
        os.makedirs(f"{self.root}/usr/lib/systemd")
        os.makedirs(f"{self.root}/sbin")
        self._program(f"{self.root}/usr/lib/{ENDING}", "")
        os.symlink(f"/usr/lib/{ENDING}", f"{self.root}/sbin/init")
        programs = f"{directory}/programs"
        os.mkdir(programs)
        for name in ("lxc-start", "lxc-execute", "lxc-stop"):
            self._program(f"{programs}/{name}", f'exec {sys.executable} -I -S {fake_lxc.__file__} "$@"\n')
        # In a user namespace of its own, which tests needn't be allowed to make: what it unpacks is theirs here.
        with open(f"{programs}/unpack.py", "w") as file:
            file.write(
                f"import json, sys\nsys.path.insert(0, {os.path.dirname(unpack.__file__)!r})\nimport unpack\n"
                "sys.exit(unpack.run(unpack.Job(**json.loads(sys.argv[1]) | {'ids': [], 'shifted': []})))\n"
            )
        here = (sys.executable, "-I", f"{programs}/unpack.py")
        patch.setattr(prerequisites, "unpacker", lambda job: (*here, job))
        patch.setattr("virtd.children.programs.PLACES", (programs,))
        self._program(f"{programs}/common.seccomp", "")
        patch.setattr(prerequisites, "SECCOMP", (f"{programs}/common.seccomp",))
        # No namespace of PIDs: the monitor's child is believed to be the first of one.
        real = first.status_of
        patch.setattr(first, "status_of", lambda pid: real(pid) | {"NSpid": f"{pid} 1"})
        self._groups = f"{directory}/group"
        patch.setattr(cgroup, "of", self._group)
        patch.setattr(cgroup.Group, "frozen", frozen)
        signal_init, freeze = Container.signal_init, Container.freeze

        def signalled(machine: Container, name: str) -> None:
            self.world.step(f"signal {name}")
            signal_init(machine, name)

        async def stand_still(machine: Container, *, on: bool) -> None:
            self.world.step(f"freeze {on}")
            await freeze(machine, on=on)

        patch.setattr(Container, "signal_init", signalled)
        patch.setattr(Container, "freeze", stand_still)
        patch.setattr(starting, "os", SteppingOs(self.world))
        patch.setattr(create, "os", Unowned(self.world))

    def _program(self, path: str, script: str) -> None:
        with open(path, "w") as file:
            file.write(f"#!/bin/sh\n{script}")
        os.chmod(path, 0o755)

    def _group(self, monitor: int, _unit: str) -> cgroup.Group | None:
        """A control group of its own for each monitor."""
        if not monitor:
            return None
        path = f"{self._groups}-{monitor}"
        if not os.path.exists(path):
            os.mkdir(path)
            with open(f"{path}/cgroup.freeze", "w") as file:
                file.write("0")
        return cgroup.Group(path)

    async def define(self, host: Host, more: str = "", name: str = "web1") -> None:
        text = f'name = "{name}"\nrootfs = "{self.root}"\nprivileged = true\n{more}'
        await host.containers.define(text, "test", check=False, by=ROOT)

    def type(self, line: str) -> None:
        self.world.type("web1", line, "lxc")

    async def says(self, word: str) -> None:
        self.type(f"echo {word}")
        await until(lambda: self.world.console("web1", "lxc").endswith(f"{word}\n"), word)

    async def holds(self, host: Host, where: str) -> dict[str, Any]:
        """Check that it is complete in whatever state it is in: its description."""
        info = await host.containers.info("web1")
        assert not info["problems"], where
        if info["state"] in ("running", "paused"):
            assert self.world.slots() == CONTAINER_SLOTS, where
            machine = host.containers.driver.find("web1")
            # A daemon that was killed right after the unit's start is followed before there is a first program.
            await until(machine.init, "its first program")
            info = await host.containers.info("web1")
            assert machine.child is not None
            assert machine.child.pid == self.world.units.process("web1", "lxc").pid, where
            assert info["pid"] == first.find(machine.monitor), where
            assert os.listdir(f"{self.world.paths.run}/lxc/web1"), where
        else:
            assert info["state"] in ("stopped", "crashed"), where
            assert self.world.slots() == [], where
            assert self.world.units.units == {}, where
            assert os.listdir(f"{self.world.paths.run}/lxc") in ([], ["web1.json"]), where
        return dict(info)


class Unowned(SteppingOs):
    """The os module for tests that don't run as root: no file can be given to others."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_args: None) if name == "chown" else super().__getattr__(name)


async def tidied(host: Host) -> None:
    """Wait until the daemon has done what it does in the background at its start."""
    driver = host.containers.driver
    await driver.certain()
    await until(lambda: not driver._tasks, "what was left to be removed")


async def each_step(
    cuts: Cuts,
    work: Callable[[Host], Awaitable[Any]],
    after: Callable[[Site, Host, dict[str, Any], str, int], Awaitable[None]],
    *,
    running: bool = True,
    before: Callable[[Host], Awaitable[Any]] | None = None,
    ends: bool = False,
    more: str = "",
) -> list[str]:
    """Kill the daemon before every visible step of `work`; the next one finds the container whole, and then `after`
    looks at it and at the PID that it had. `ends`: it does by itself, however far `work` has come. The steps.
    """
    for root, patch in cuts:
        site = Site(root, patch)
        world = site.world
        with contextlib.closing(world):
            pid = 0
            async with world.daemon() as host:
                await site.define(host, more)
                await tidied(host)
                if running:
                    pid = (await host.containers.start("web1", by=ROOT))["pid"]
                    await site.says("before")
                if before is not None:
                    await before(host)
                await cuts.cut(world, work(host))
            async with world.daemon() as host:
                await tidied(host)
                machine = host.containers.driver.machines.get("web1")
                if machine is not None and (ends or _is_finished(machine)):
                    await asyncio.wait_for(machine.over.wait(), 20)
                where = cuts.where
                info = await site.holds(host, where) if machine is not None else {}
                await after(site, host, info, where, pid)
                assert (await host.check_all(repair=False, by=ROOT))["differences"] == [], where
                if info.get("state") in ("running", "paused"):
                    await host.containers.thaw("web1", by=ROOT)
                    await site.says("after")
                    await host.containers.stop("web1", by=ROOT)
                    nothing_left(world, driver="lxc")
    return cuts.seen


def _is_finished(machine: Container) -> bool:
    """Whether the next daemon has finished what was asked."""
    return machine.request is not None and machine.request.verb != "reboot"


@on_loop
async def test_killed_at_every_step_of_a_shutdown(cuts: Cuts) -> None:
    async def shutdown(host: Host) -> None:
        await host.containers.shutdown("web1", 20, by=ROOT)

    async def after(_site: Site, _host: Host, info: dict[str, Any], where: str, pid: int) -> None:
        if info["state"] == "running":
            assert info["pid"] == pid, where
        else:
            assert (info["exit"]["cause"], info["exit"]["by"]) == ("shutdown", "root"), where

    seen = await each_step(cuts, shutdown, after)
    assert "signal SIGRTMIN+3" in seen


@on_loop
async def test_killed_at_every_step_of_a_reboot(cuts: Cuts) -> None:
    """It has rebooted once or not at all, and still has its unit, its slots and its console."""

    async def reboot(host: Host) -> None:
        await host.containers.reboot("web1", 20, by=ROOT)

    async def after(site: Site, host: Host, info: dict[str, Any], where: str, pid: int) -> None:
        assert info["state"] == "running", where
        said = site.world.paths.stderr_log("lxc", "web1")
        with open(said) as file:
            lives = file.read().count('Started "init"')
        assert lives in (1, 2), where
        assert (info["pid"] == pid) is (lives == 1), where

    seen = await each_step(cuts, reboot, after)
    assert "signal SIGRTMIN+5" in seen


@pytest.mark.parametrize("on", [True, False])
@on_loop
async def test_killed_at_every_step_of_a_freeze(cuts: Cuts, on: bool) -> None:
    """The kernel knows its state; a record that was cut off may not."""

    async def change(host: Host) -> None:
        await (host.containers.freeze if on else host.containers.thaw)("web1", by=ROOT)

    async def after(site: Site, host: Host, info: dict[str, Any], where: str, pid: int) -> None:
        frozen = host.containers.driver.find("web1").frozen()
        assert info["state"] == ("paused" if frozen else "running"), where
        assert info["pid"] == pid, where

    async def freeze(host: Host) -> None:
        await host.containers.freeze("web1", by=ROOT)

    seen = await each_step(cuts, change, after, before=None if on else freeze)
    assert f"freeze {on}" in seen


@on_loop
async def test_killed_at_every_step_of_an_end_of_its_own(cuts: Cuts) -> None:
    async def end(host: Host) -> None:
        machine = host.containers.driver.find("web1")
        assert machine.child is not None
        os.write(machine.child.stdin(), b"echo last words\nexit 7\n")
        await machine.over.wait()

    async def after(site: Site, _host: Host, info: dict[str, Any], where: str, _pid: int) -> None:
        ending = info["exit"]
        assert (info["state"], ending["cause"], ending["code"]) == ("crashed", "failed", 7), where
        assert site.world.console("web1", "lxc") == "before\nlast words\n", where

    more = f'command = ["/usr/lib/{ENDING}"]\n'
    seen = await each_step(cuts, end, after, ends=True, more=more)
    assert f"ended {UNIT}" in seen


@on_loop
async def test_killed_at_every_step_of_an_undefine(cuts: Cuts) -> None:
    async def stop(host: Host) -> None:
        await host.containers.stop("web1", by=ROOT)

    async def undefine(host: Host) -> None:
        await host.containers.undefine("web1", by=ROOT)

    async def after(site: Site, _host: Host, info: dict[str, Any], where: str, _pid: int) -> None:
        assert info or os.listdir(f"{site.world.paths.etc}/lxc") == [], where

    seen = await each_step(cuts, undefine, after, before=stop)
    assert {"remove web1.json", "remove web1.toml"} <= set(seen)


@on_loop
async def test_killed_at_every_step_of_a_create(cuts: Cuts, tmp_path: Path) -> None:
    """A complete root file system with its definition, or nothing."""

    async def create_it(host: Host) -> None:
        await host.containers.create("made", str(image), by=ROOT)

    async def after(site: Site, host: Host, _info: dict[str, Any], where: str, _pid: int) -> None:
        assert site.world.units.units == {}, where
        assert os.listdir(f"{site.world.paths.run}/lxc") == [], where
        made = Path(site.world.lxc.directory)
        there = os.listdir(made) if made.exists() else []
        if "made" in host.containers.driver.machines:
            assert there == ["made"], where
            assert (made / "made/usr/bin/program").read_bytes() == b"whole", where
            await host.containers.undefine("made", by=ROOT)
        else:
            assert there == [], where
        await host.containers.undefine("web1", by=ROOT)

    image = tmp_path / "image"
    (image / "usr/bin").mkdir(parents=True)
    (image / "usr/bin/program").write_bytes(b"whole")
    seen = await each_step(cuts, create_it, after, running=False)
    assert {"write made.creating", "write made.toml", "start virtd-create-lxc-made.service"} <= set(seen)


@on_loop
async def test_a_container_that_is_made_while_the_daemon_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host that had none: what the daemon before has left is removed, and nothing else."""
    site = Site(tmp_path, monkeypatch)
    image = tmp_path / "image"
    (image / "usr").mkdir(parents=True)
    try:
        async with site.world.daemon(reconcile=False) as host:
            making = asyncio.ensure_future(host.containers.create("made", str(image), by=ROOT))
            for _ in range(20):
                await asyncio.sleep(0)
            await host.reconcile()
            assert (await making)["name"] == "made"
            assert os.listdir(site.world.lxc.directory) == ["made"]
            await host.containers.undefine("made", by=ROOT)
    finally:
        site.world.close()


@on_loop
async def test_a_start_that_pid_1_carries_out_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It re-executes itself: what makes a container, or runs in one, isn't left to itself."""
    site = Site(tmp_path, monkeypatch)
    units = site.world.units
    image = tmp_path / "image"
    (image / "usr").mkdir(parents=True)
    started = []

    async def start(spec: UnitSpec, *_: Any) -> UnitState:
        started.append(spec.name)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # noqa: ASYNC220
        units.units[spec.name] = Unit(spec, process)
        raise errors.HostError("systemd refused to start it: disconnected from message bus without replying")

    try:
        async with site.world.daemon() as host:
            await site.define(host)
            await host.containers.start("web1", by=ROOT)
            monkeypatch.setattr(units, "start", start)
            monkeypatch.setattr(prerequisites, "program", lambda name: name)
            with pytest.raises(errors.HostError, match="without replying"):
                await host.containers.create("made", str(image), by=ROOT)
            with pytest.raises(errors.HostError, match="without replying"):
                await execs.begin(host.containers.driver.machines["web1"], ["true"], {}, terminal=False)
            assert len(started) == 2
            assert {name: unit.process.poll() for name, unit in units.units.items() if name in started} == {}
            assert os.listdir(site.world.lxc.directory) == []
            await host.containers.stop("web1", by=ROOT)
    finally:
        site.world.close()


@on_loop
async def test_a_container_does_not_notice_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including the bytes in its terminal that nobody moved, and a reboot that nobody saw."""
    site = Site(tmp_path, monkeypatch)
    try:
        async with site.world.daemon() as host:
            await site.define(host)
            pid = (await host.containers.start("web1", by=ROOT))["pid"]
            site.type("echo unseen")
        for number in range(3):
            async with site.world.daemon() as host:
                await tidied(host)
                assert (await host.containers.info("web1"))["pid"] == pid
                await site.says(str(number))
        os.kill(pid, signal.SIGHUP)
        await until(lambda: first.status_of(pid).get("State") is None, "its end")
        async with site.world.daemon() as host:
            await tidied(host)
            await until(lambda: host.containers.driver.find("web1").init() not in (None, pid), "another life")
            await site.says("again")
            await site.holds(host, "after a reboot")
            assert site.world.console("web1", "lxc") == "unseen\n0\n1\n2\nagain\n"
            await host.containers.stop("web1", by=ROOT)
            nothing_left(site.world, driver="lxc")
    finally:
        site.world.close()


@on_loop
async def test_lxc_is_faster_than_systemds_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LXC's log reports the first program before virtd knows which process LXC is."""
    site = Site(tmp_path, monkeypatch)
    start = site.world.units.start

    async def late(*args: Any, **options: Any) -> Any:
        state = await start(*args, **options)
        await until(host.containers.driver.find("web1").started.is_set, "the line in LXC's diary")
        return state

    monkeypatch.setattr(site.world.units, "start", late)
    try:
        async with site.world.daemon() as host:
            await site.define(host)
            pid = (await host.containers.start("web1", by=ROOT))["pid"]
            assert pid == first.find(host.containers.driver.find("web1").monitor) != 0
            await host.containers.stop("web1", by=ROOT)
    finally:
        site.world.close()


@on_loop
async def test_an_old_systemd_hangs_up_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 254 it drops all slots when virtd is stopped, but a unit keeps what it was given open."""
    site = Site(tmp_path, monkeypatch, old=True)
    start = site.world.units.start
    held: list[int] = []

    async def keeping(spec: Any, stdio: tuple[int, int, int], **options: Any) -> Any:
        held.extend(os.dup(fd) for fd in stdio)  # none of them is a path
        return await start(spec, stdio, **options)

    monkeypatch.setattr(site.world.units, "start", keeping)
    try:
        async with site.world.daemon() as host:
            await site.define(host, f'command = ["/usr/lib/{ENDING}"]\n')
            pid = (await host.containers.start("web1", by=ROOT))["pid"]
            await site.says("before")
            os.write(held[2], b"echo unread\n")
        site.world.pid1.read()
        for entry in list(site.world.pid1.entries):
            site.world.pid1._remove(entry)
        async with site.world.daemon() as host:
            await tidied(host)
            info = await host.containers.info("web1")
            assert (info["state"], info["pid"]) == ("running", pid)
            assert [problem["text"].split()[1] for problem in info["problems"]] == [
                f"lxc/web1/{slot}" for slot in ("stdin", "stdout", "stderr")
            ]
            # Nobody reads its output; it writes it all the same, and obeys.
            os.write(held[2], b"exit 3\n")
            await until(lambda: not host.containers.driver.find("web1").alive, "its end")
            ending = (await host.containers.info("web1"))["exit"]
            assert (ending["cause"], ending["code"]) == ("failed", 3)
            assert (await host.containers.start("web1", by=ROOT))["changed"] is True
            await site.says("after")
            await host.containers.stop("web1", by=ROOT)
    finally:
        site.world.close()
        for fd in held:
            os.close(fd)
