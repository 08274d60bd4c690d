# SPDX-License-Identifier: LGPL-2.1-or-later
"""One object of each kind that has a process, in a host of its own, for what all of them live through."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

from tests import toydriver
from tests.doubles import fake_qemu_img
from tests.doubles.whole_host import ROOT, World, nothing_left, until
from tests.unit.drivers.lxc.test_container_restarts import Site as Lxc
from tests.unit.drivers.network.test_network_restarts import Site as Networks
from tests.unit.drivers.storage.test_storage_restarts import Children, hosted, nothing_unfinished
from virtd.children import programs

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    import pytest

    from virtd.drivers.storage.job import Job as StorageJob
    from virtd.host import Host
    from virtd.host.objects import Objects
    from virtd.replies.guests import GuestInfo

NAME = "web1"


class Kind(Protocol):
    """One object, over the runs of the daemon."""

    driver: str
    announced: bool  # whether the journal has a message of each adoption
    steps: dict[str, set[str]]  # what must be among the steps of its "start" and its "stop", which are cut off
    world: World

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None: ...
    async def define(self, host: Host) -> None:
        """What has to be there before it is started."""

    async def start(self, host: Host) -> bool:
        """Whether that changed anything."""

    async def stop(self, host: Host) -> None: ...
    async def whole(self, host: Host, where: str = "") -> bool:
        """Whether it runs, once that is known; either way with all that belongs to it, and nothing else."""

    async def same(self, host: Host) -> object:
        """What a restart of the daemon must leave as it is."""

    async def end(self, host: Host, where: str = "") -> None:
        """Stop it, and see that nothing is left."""

    async def unseen_end(self, host: Host) -> None:
        """Its process was killed while no daemon was there: see what the next one made of it."""

    def process(self) -> subprocess.Popen[bytes]:
        """Its unit's process."""

    def cut_off(self) -> None:
        """The end of a daemon that was killed."""

    def close(self) -> None: ...


class Supervised:
    """A guest: a domain, a container, or what another driver has. It obeys the line "echo WORD" on its console."""

    driver = "qemu"
    announced = True

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.world = self.make(root, patch)
        self.slots = [f"{self.driver}/{NAME}/{slot}" for slot in ("console.log", "log", "stderr", "stdin", "stdout")]
        self.unit = f"virtd-{self.driver}-{NAME}.service"
        self.steps = {"start": {f"start {self.unit}"}, "stop": {f"collect {self.unit}"}}
        self._spoken: list[str] = []

    def make(self, root: Path, patch: pytest.MonkeyPatch) -> World:
        return World(root, patch)

    def text(self) -> str:
        return self.world.text(NAME)

    def of(self, host: Host) -> Objects[Any]:
        return host.supervised(self.driver)

    async def define(self, host: Host) -> None:
        await self.of(host).define(self.text(), "test", check=False, by=ROOT)

    async def start(self, host: Host) -> bool:
        return bool((await self.of(host).start(NAME, by=ROOT))["changed"])

    async def stop(self, host: Host) -> None:
        await self.of(host).stop(NAME, by=ROOT)

    async def begin(self, host: Host) -> int:
        """Defined and started; the PID of its unit's process."""
        await self.define(host)
        await self.start(host)
        await self.says("before")
        return self.process().pid

    def process(self) -> subprocess.Popen[bytes]:
        return self.world.units.process(NAME, self.driver)

    async def says(self, word: str) -> None:
        self.world.type(NAME, f"echo {word}", self.driver)
        self._spoken.append(f"{word}\n")
        await until(lambda: self.world.console(NAME, self.driver).endswith(f"{word}\n"), word)

    async def look(self, host: Host, where: str = "") -> GuestInfo:
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
        return info

    async def whole(self, host: Host, where: str = "") -> bool:
        info = await self.look(host, where)
        if info["state"] == "running":
            await self.says("here")
            return True
        if self._spoken:  # it ran before, and was stopped
            assert info["exit"]["cause"] == "stop", where
            assert self.world.console(NAME, self.driver) == "".join(self._spoken), where
        return False

    async def same(self, host: Host) -> object:
        info = await self.of(host).info(NAME)
        return info["state"], info["pid"], self.process().pid

    async def end(self, host: Host, where: str = "") -> None:
        assert (await self.of(host).stop(NAME, by=ROOT))["changed"] is True, where
        nothing_left(self.world, NAME, self.driver)

    async def unseen_end(self, host: Host) -> None:
        await self.of(host)._guests.certain()
        info = await self.of(host).info(NAME)
        assert (info["state"], info["exit"]["signal"]) == ("crashed", "SIGKILL")
        nothing_left(self.world, NAME, self.driver)

    def cut_off(self) -> None: ...

    def close(self) -> None:
        self.world.close()


class Domain(Supervised):
    """A guest of QEMU."""


class MeasuredDomain(Domain):
    """One with a TPM, which is another process."""

    def make(self, root: Path, patch: pytest.MonkeyPatch) -> World:
        patch.setattr(programs, "find", lambda name: f"/usr/bin/{name}")
        self.tpm = f"virtd-qemu-{NAME}@tpm.service"
        return super().make(root, patch)

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(root, patch)
        self.steps = {
            "start": {f"start {self.tpm}", f"start {self.unit}"},
            "stop": {f"stop {self.tpm}", f"collect {self.unit}", f"collect {self.tpm}"},
        }

    def text(self) -> str:
        return f"{super().text()}[tpm]\n"

    async def look(self, host: Host, where: str = "") -> GuestInfo:
        info = await super().look(host, where)
        tpm = host.domains.driver.machines[NAME].tpm.described(host.domains.driver.machines[NAME].running_definition)
        assert tpm is not None
        if info["state"] == "running":
            await until(lambda: self._tpm_is_known(host), "the TPM's process")
        elif os.path.exists(tpm.state):
            assert (tpm.pid, os.stat(tpm.state).st_uid) == (None, os.geteuid()), where
        return info

    def _tpm_is_known(self, host: Host) -> bool:
        """Whether it is the one that runs; after a crash systemd is asked in the background."""
        machine = host.domains.driver.machines[NAME]
        described = machine.tpm.described(machine.running_definition)
        process = self.world.units.units[self.tpm].process
        assert process.poll() is None
        return described is not None and described.pid == process.pid

    async def same(self, host: Host) -> object:
        return await super().same(host), self.world.units.units[self.tpm].process.pid

    async def end(self, host: Host, where: str = "") -> None:
        await super().end(host, where)
        assert self.world.units.units == {}, where

    async def unseen_end(self, host: Host) -> None:
        await super().unseen_end(host)
        assert self.world.units.units == {}


class Container(Supervised):
    """A guest of LXC."""

    driver = "lxc"

    def make(self, root: Path, patch: pytest.MonkeyPatch) -> World:
        self._site = Lxc(root, patch)
        return self._site.world

    def text(self) -> str:
        return f'name = "{NAME}"\nrootfs = "{self._site.root}"\nprivileged = true\n'


PROGRAM = """import signal, sys
for line in sys.stdin:
    print(line.removeprefix("echo ").strip(), flush=True)
signal.pause()
"""


class Toy(Supervised):
    """A program of a driver that isn't virtd's."""

    driver = "toy"

    def make(self, root: Path, patch: pytest.MonkeyPatch) -> World:
        toydriver.register(patch)
        world = World(root, patch)
        for base in (world.paths.etc, world.paths.run, world.paths.log):
            os.makedirs(f"{base}/toy")
        (root / "program.py").write_text(PROGRAM)
        self._program = str(root / "program.py")
        return world

    def text(self) -> str:
        return f'name = "{NAME}"\ncommand = ["{sys.executable}", "-I", "-S", "{self._program}"]\n'


class Network:
    """A network with its dnsmasq, "lab"."""

    driver = "network"
    announced = True

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        unit = "virtd-network-lab.service"
        self.steps = {
            "start": {"add_bridge vd-lab", "add_address vd-lab", "nft virtd-lab", f"start {unit}"},
            "stop": {f"stop {unit}", "nft virtd-lab", "delete_link vd-lab"},
        }
        self.site = Networks.make(root, patch)
        self.world = self.site.world

    async def define(self, host: Host) -> None:
        del host
        await self.site.define()

    async def start(self, host: Host) -> bool:
        return bool((await host.networks.start("lab", by=ROOT))["changed"])

    async def stop(self, host: Host) -> None:
        await host.networks.stop("lab", force=False, by=ROOT)

    async def whole(self, host: Host, where: str = "") -> bool:
        await host.networks.driver.certain()
        info = await self.site.info()
        if info["state"] == "active":
            self.site.whole(info, where)
            net = host.networks.driver.nets["lab"]
            assert net.running is not None
            assert not await net.rules.lost(net.running), where  # as the definition says that is in force
            return True
        assert (info["state"], info["problems"]) == ("inactive", []), where
        self.site.nothing(where)
        return False

    async def same(self, host: Host) -> object:
        del host
        return (await self.site.info())["pid"], self.process().pid, dict(self.site.kernel.tables)

    async def end(self, host: Host, where: str = "") -> None:
        await self.stop(host)
        self.site.nothing(where)
        await host.networks.undefine("lab", by=ROOT)
        paths = self.world.paths
        left = [f"{base}/network" for base in (paths.etc, paths.run, paths.lib)]
        assert [name for directory in left for name in os.listdir(directory)] == [], where
        assert (await host.status())["problems"] == [], where

    async def unseen_end(self, host: Host) -> None:
        """Its dnsmasq was killed: there is another one."""
        await host.networks.driver.certain()
        net = host.networks.driver.nets["lab"]
        await until(lambda: net.reason == "dnsmasq was killed by SIGKILL and was started again", "its dnsmasq")
        assert await self.whole(host)

    def process(self) -> subprocess.Popen[bytes]:
        return self.world.units.process("lab", self.driver)

    def cut_off(self) -> None: ...

    def close(self) -> None:
        self.world.close()


class Job:
    """A job of a pool: the making of a volume that doesn't come to its end by itself."""

    driver = "storage"
    announced = False

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.steps: dict[str, set[str]] = {"start": set(), "stop": set()}  # whose names are random
        self._stack = contextlib.ExitStack()
        self.world = self._stack.enter_context(hosted(root, patch))
        self._pool = root / "pool"
        self._children = Children()
        self._children.follow(patch)

    async def define(self, host: Host) -> None:
        await host.pools.start("p", by=ROOT)

    def _under_way(self, host: Host) -> list[StorageJob]:
        return [job for job in host.volumes.driver.jobs if not job.over.is_set()]

    async def start(self, host: Host) -> bool:
        before = {job.name for job in self._under_way(host)}
        answer = await host.volumes.create("p", "new", str(fake_qemu_img.ENDLESS), format="qcow2", token="t", by=ROOT)
        return answer["job"] not in before

    async def stop(self, host: Host) -> None:
        for job in self._under_way(host):
            await host.volumes.cancel(job.name, by=ROOT)

    async def whole(self, host: Host, where: str = "") -> bool:
        await host.volumes.driver.certain()
        # One that has ended is concluded in the background.
        await until(lambda: all(job.child is not None and job.child.alive() for job in self._under_way(host)))
        running = self._under_way(host)
        assert (await host.volumes.listing("p")) == [], where
        if running:
            (job,) = running
            assert self.world.slots() == [
                f"storage/{job.name}/{slot}" for slot in ("console.log", "log", "stderr", "stdin", "stdout")
            ], where
            assert list(self.world.units.units) == [job.unit], where
            assert os.listdir(self._pool / ".virtd/new") == [job.name], where
            assert (job.describe().state, job.describe().pid) == ("running", self.process().pid), where
        else:
            nothing_unfinished(self.world, self._pool)
        return bool(running)

    async def same(self, host: Host) -> object:
        (job,) = self._under_way(host)
        return job.name, job.record.since, self.process().pid

    async def end(self, host: Host, where: str = "") -> None:
        await self.stop(host)
        assert (await host.volumes.jobs())[-1]["error"] == "cancelled by root", where
        nothing_unfinished(self.world, self._pool)

    async def unseen_end(self, host: Host) -> None:
        assert not await self.whole(host)
        assert (await host.volumes.jobs())[-1]["error"] == "it was killed by SIGKILL"

    def process(self) -> subprocess.Popen[bytes]:
        (unit,) = self.world.units.units.values()
        return unit.process

    def cut_off(self) -> None:
        self._children.close()

    def close(self) -> None:
        self._children.close()
        self._stack.close()


SUPERVISED: tuple[type[Supervised], ...] = (Domain, Container, Toy)
KINDS: tuple[type[Kind], ...] = (*SUPERVISED, MeasuredDomain, Network, Job)
