# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sweep's operations on networks, pools, volumes and containers: see operations.py."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.proof.sweep import scene
from tests.proof.sweep.operations import Operation, expect
from tests.proof.sweep.scene import HERE, SLOTS, Refused, call, until

if TYPE_CHECKING:
    from collections.abc import Iterator

NETWORK, POOL, VOLUME, BOX = "swept", "swept", "volume", "box"
POOL_PATH = "/srv/swept"
ROOT = "/var/lib/virtd/containers/box"
FIRST_ID = 0x60000000


def state(kind: str, name: str) -> str:
    """The state of an object of org.virtd1.KIND; "" if there is none."""
    try:
        return str(call(f"{kind}.Info", name=name)["object"]["state"])
    except Refused as exc:
        if exc.kind == "NotFound":
            return ""
        raise


def units(pattern: str) -> list[str]:
    listed = scene.systemctl("list-units", "--all", "--plain", "--no-legend", pattern)
    return [line.split()[0] for line in listed.splitlines()]


def processes(driver: str, name: str, *, alive: bool) -> None:
    """Unit, slots and directory are there, or none of them. Raises Broken."""
    slots = {slot.split("/")[2] for slot in scene.dump() if slot.startswith(f"{driver}/")}
    expect(f"slots of {driver}", slots, SLOTS if alive else set())
    expect(f"units of {driver}", units(f"virtd-{driver}-*.service"), [f"virtd-{driver}-{name}.service"] * alive)
    expect(f"the directory of {name}", os.path.isdir(f"/run/virtd/{driver}/{name}"), alive)


class OfNetwork(Operation):
    """A network with NAT and dnsmasq."""

    def prepare(self) -> None:
        if not state("Network", NETWORK):
            text = f'name = "{NETWORK}"\n[ipv4]\naddress = "10.211.7.1/24"\n'
            call("Network.Define", text=text, source="sweep")

    def agreement(self) -> None:
        now = state("Network", NETWORK)
        expect("the network", now, "", "active", "inactive")
        active = now == "active"
        processes("network", NETWORK, alive=active)
        expect("its bridge", os.path.exists(f"/sys/class/net/vd-{NETWORK}"), active)
        tables = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
        expect("its table", f"virtd-{NETWORK}" in tables, active)
        if now:
            expect("its problems", call("Network.Info", name=NETWORK)["object"]["problems"], [])

    def clear(self) -> None:
        with contextlib.suppress(Refused):
            call("Network.Stop", name=NETWORK, force=True)
        with contextlib.suppress(Refused):
            call("Network.Undefine", name=NETWORK)


class NetworkStart(OfNetwork):
    name = "network-start"

    def prepare(self) -> None:
        super().prepare()
        call("Network.Stop", name=NETWORK, force=True)

    def act(self) -> None:
        call("Network.Start", name=NETWORK)

    def again(self) -> None:
        call("Network.Start", name=NETWORK)
        expect("the network", state("Network", NETWORK), "active")


class NetworkStop(OfNetwork):
    name = "network-stop"

    def prepare(self) -> None:
        super().prepare()
        call("Network.Start", name=NETWORK)

    def act(self) -> None:
        call("Network.Stop", name=NETWORK)

    def again(self) -> None:
        call("Network.Stop", name=NETWORK)
        expect("the network", state("Network", NETWORK), "inactive")


class OfPool(Operation):
    """A pool in a directory."""

    def prepare(self) -> None:
        os.makedirs(POOL_PATH, mode=0o711, exist_ok=True)
        if not state("Pool", POOL):
            call("Pool.Define", text=f'name = "{POOL}"\npath = "{POOL_PATH}"\n', source="sweep")

    def agreement(self) -> None:
        expect("the pool", state("Pool", POOL), "", "active", "inactive")
        under_way = [job for job in call("Volume.Jobs")["objects"] if job["state"] in ("running", "waiting")]
        expect("jobs", under_way, [])
        expect("units of jobs", units("virtd-storage-*.service"), [])
        expect("slots of jobs", [slot for slot in scene.dump() if slot.startswith("storage/")], [])
        expect("what was begun", glob.glob(f"{POOL_PATH}/.virtd/new/*"), [])

    def clear(self) -> None:
        for method in ("Stop", "Undefine"):
            with contextlib.suppress(Refused):
                call(f"Pool.{method}", name=POOL)
        shutil.rmtree(POOL_PATH, ignore_errors=True)


class PoolStart(OfPool):
    name = "pool-start"

    def prepare(self) -> None:
        super().prepare()
        call("Pool.Stop", name=POOL)

    def act(self) -> None:
        call("Pool.Start", name=POOL)

    def again(self) -> None:
        self.act()
        expect("the pool", state("Pool", POOL), "active")


class PoolStop(OfPool):
    name = "pool-stop"

    def prepare(self) -> None:
        super().prepare()
        call("Pool.Start", name=POOL)

    def act(self) -> None:
        call("Pool.Stop", name=POOL)

    def again(self) -> None:
        self.act()
        expect("the pool", state("Pool", POOL), "inactive")


class OfVolume(OfPool):
    def prepare(self) -> None:
        super().prepare()
        call("Pool.Start", name=POOL)
        self.token = f"sweep-{time.monotonic_ns()}"

    def volumes(self) -> list[str]:
        return [item["name"] for item in call("Volume.List", pool=POOL)["objects"]]

    def remove(self) -> None:
        if VOLUME in self.volumes():
            call("Volume.Delete", pool=POOL, name=VOLUME)

    def create(self) -> None:
        """With its token a repeated call finds what became of the first. qcow2 is made by a job."""
        done = call("Volume.Create", pool=POOL, name=VOLUME, size="1M", format="qcow2", token=self.token)
        if done["job"]:
            ended = call("Volume.Await", job=done["job"])["object"]
            if ended["state"] == "failed" and ended["error"]:  # as the call would have; it is asked for anew
                self.token += "'"
                raise scene.Refused("JobFailed", ended["error"])
            expect("the job", (ended["state"], ended["error"]), ("done", ""))


class VolumeCreate(OfVolume):
    name = "volume-create"

    def prepare(self) -> None:
        super().prepare()
        self.remove()

    def act(self) -> None:
        self.create()

    def judge(self) -> None:
        expect("volumes", self.volumes(), [], [VOLUME])

    def again(self) -> None:
        if not self.volumes():
            self.create()
        expect("volumes", self.volumes(), [VOLUME])
        info = call("Volume.Info", pool=POOL, name=VOLUME)["object"]
        expect("the volume", (info["format"], info["capacity"]), ("qcow2", 1 << 20))


class VolumeDelete(OfVolume):
    name = "volume-delete"

    def prepare(self) -> None:
        super().prepare()
        if not self.volumes():
            self.create()

    def act(self) -> None:
        call("Volume.Delete", pool=POOL, name=VOLUME)

    def judge(self) -> None:
        expect("volumes", self.volumes(), [], [VOLUME])

    def again(self) -> None:
        self.remove()
        expect("volumes", self.volumes(), [])


class OfContainer(Operation):
    """A container with one small program in it."""

    def prepare(self) -> None:
        if not os.path.exists(ROOT):
            for directory in ("", "/dev", "/proc", "/sys", "/tmp", "/run", "/etc"):
                os.makedirs(f"{ROOT}{directory}")
                os.chown(f"{ROOT}{directory}", FIRST_ID, FIRST_ID)
            shutil.copy(f"{HERE}/box", f"{ROOT}/box")
            os.chown(f"{ROOT}/box", FIRST_ID, FIRST_ID)
            os.chmod(f"{ROOT}/box", 0o755)
        if not state("Container", BOX):
            text = f'name = "{BOX}"\nrootfs = "{ROOT}"\ncommand = ["/box"]\n'
            call("Container.Define", text=text, source="sweep")

    def agreement(self) -> None:
        now = state("Container", BOX)
        expect("the container", now, "", "running", "stopped", "crashed")
        processes("lxc", BOX, alive=now == "running")
        if now:
            expect("its problems", call("Container.Info", name=BOX)["object"]["problems"], [])

    def stop(self) -> None:
        call("Container.Stop", name=BOX)

    def works(self) -> None:
        """It says one line after the other."""
        path = f"/var/log/virtd/lxc/{BOX}.console.log"
        size = os.stat(path).st_size
        until("the container's next line", lambda: os.stat(path).st_size > size, 10)
        with open(path, "rb") as file:
            expect("its lines", set(file.read().splitlines()[:-1]), {b"tick"})

    def clear(self) -> None:
        for method in ("Stop", "Undefine"):
            with contextlib.suppress(Refused):
                call(f"Container.{method}", name=BOX)
        for path in glob.glob(f"/var/log/virtd/lxc/{BOX}.*"):
            os.unlink(path)


class ContainerStart(OfContainer):
    name = "container-start"

    def prepare(self) -> None:
        super().prepare()
        if state("Container", BOX) == "running":
            self.stop()

    def act(self) -> None:
        call("Container.Start", name=BOX)

    def judge(self) -> None:
        expect("the container", state("Container", BOX), "running", "stopped")

    def again(self) -> None:
        self.act()
        expect("the container", state("Container", BOX), "running")
        self.works()


class ContainerStop(OfContainer):
    name = "container-stop"

    def prepare(self) -> None:
        super().prepare()
        if state("Container", BOX) != "running":
            call("Container.Start", name=BOX)
        self.works()

    def act(self) -> None:
        self.stop()

    def judge(self) -> None:
        if state("Container", BOX) == "running":
            self.works()

    def again(self) -> None:
        with contextlib.suppress(Refused):  # it has ended
            self.stop()
        expect("the container", state("Container", BOX), "stopped", "crashed")
        ending: dict[str, Any] | None = call("Container.Info", name=BOX)["object"]["exit"]
        expect("the cause of its end", ending and ending["cause"], "stop")


class ContainerAdoption(OfContainer):
    """The start of a daemon that finds a container running, and a network active."""

    name = "container-adoption"
    start = True

    def prepare(self) -> None:
        super().prepare()
        if state("Container", BOX) != "running":
            call("Container.Start", name=BOX)
        self.pid = call("Container.Info", name=BOX)["object"]["pid"]

    def act(self) -> None:
        until("the adoption", scene.settled)

    def judge(self) -> None:
        expect("the container", call("Container.Info", name=BOX)["object"]["pid"], self.pid)
        self.works()

    def again(self) -> None:
        self.judge()


def other_operations() -> Iterator[Operation]:
    for kind in (
        NetworkStart, NetworkStop, PoolStart, PoolStop, VolumeCreate, VolumeDelete, ContainerStart, ContainerStop,
        ContainerAdoption,
    ):  # fmt: skip
        yield kind()
