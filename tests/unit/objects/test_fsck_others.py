# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl fsck about networks, pools and jobs: each kind of damage is told, mended, and gone. What runs runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_units import Unit
from tests.doubles.whole_host import ROOT, on_loop, until
from tests.unit.drivers.network.test_network_restarts import Site
from tests.unit.guests.test_fsck import check, edit, lose, plant, write
from virtd.drivers.network.kernel import Address
from virtd.systemd.transient import UnitSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.doubles.whole_host import World
    from virtd.host import Host


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site.make(tmp_path, monkeypatch)
    yield site
    site.world.close()


def net_record(site: Site, name: str = "lab") -> str:
    return site.world.paths.record("network", name)


def runtime(site: Site, name: str = "lab") -> str:
    return site.world.paths.runtime("network", name)


def add_bridge(site: Site, name: str, network: str) -> None:
    for directory in ("bridge", "brif"):
        (site.kernel.sysfs / name / directory).mkdir(parents=True)
    for file, text in (
        ("address", "56:44:00:00:00:00"),
        ("flags", "0x1003"),
        ("ifalias", f"virtd network {network}"),
    ):
        (site.kernel.sysfs / name / file).write_text(f"{text}\n")


def add_tap(site: Site, user: str) -> None:
    (site.kernel.sysfs / "vt1").mkdir()
    (site.kernel.sysfs / "vt1" / "ifalias").write_text(f"virtd network lab for {user}\n")


def down(site: Site) -> None:
    (site.kernel.sysfs / "vd-lab" / "flags").write_text("0x1002\n")


def no_address(site: Site) -> None:
    site.kernel.addresses["vd-lab"].clear()


def no_bridge(site: Site) -> None:
    shutil.rmtree(site.kernel.sysfs / "vd-lab")
    site.kernel.addresses["vd-lab"] = set[Address]()


def other_rules(site: Site) -> None:
    text, number = site.kernel.tables["virtd-lab"]
    site.kernel.tables["virtd-lab"] = f"{text}# more", number + 100


def edit_config(site: Site) -> None:
    with open(f"{runtime(site)}/dnsmasq.conf", "a") as file:
        file.write("log-queries\n")


# What is done to a host with an active network, what is said of it, how often, and whether it can be mended.
NETWORKS: dict[str, tuple[Callable[[Site], None], str, int, bool]] = {
    "a bridge that is down": (down, "vd-lab: down", 1, True),
    "a bridge without its address": (no_address, "vd-lab: no address 10.7.0.1/24", 1, True),
    "no rules": (lambda s: s.kernel.tables.clear(), "aren't those that virtd made", 1, True),
    "other rules": (other_rules, "aren't those that virtd made", 1, True),
    "a slot that PID 1 lost": (lambda s: lose(s.world, "network/lab/stderr"), "stderr is missing", 1, True),
    "another pipe": (lambda s: plant(s.world, "network/lab/stdout"), "holds something else", 1, True),
    "a slot of none": (lambda s: plant(s.world, "network/ghost/stdin"), "and ghost isn't active", 1, True),
    "no record": (lambda s: os.unlink(net_record(s)), "lab.json is missing", 1, True),
    "half a record": (lambda s: os.truncate(net_record(s), 30), "can't be read", 1, True),
    "a record of none": (lambda s: write(net_record(s, "ghost"), "{}"), "ghost.json can't be read", 1, True),
    "a file less": (lambda s: os.unlink(f"{runtime(s)}/dnsmasq.conf"), "isn't as virtd wrote it", 1, True),
    "a file that was edited": (edit_config, "isn't as virtd wrote it", 1, True),
    "a table of none": (lambda s: s.kernel.tables.update({"virtd-x": ("", 7)}), "and x isn't active", 1, True),
    "a bridge of none": (lambda s: add_bridge(s, "vd-x", "ghost"), "bridge vd-x is there", 1, True),
    "a directory of none": (lambda s: os.makedirs(runtime(s, "ghost")), "and ghost isn't active", 1, True),
    "a tap of none": (lambda s: add_tap(s, "qemu/ghost"), "vt1 was made for qemu/ghost, which", 1, True),
    "half a file": (lambda s: write(f"{s.world.paths.run}/network/.lab.json.new", "{"), "incomplete file", 1, True),
    "a definition": (
        lambda s: write(f"{s.world.paths.etc}/network/b.toml", 'name = "b"\n[ipv4]\naddress = "10.9.0.1/24"\n'),
        "hasn't read it yet", 1, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NETWORKS)
@on_loop
async def test_networks(site: Site, what: str) -> None:
    damage, words, count, mendable = NETWORKS[what]
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        pid = site.pid()
        upkeep = host.networks.driver._upkeep
        await until(lambda: upkeep._task is None)  # the look at what was changed before there was a watch
        assert await check(host) == []
        damage(site)
        rows = await check(host)
        assert len(rows) == count, rows
        assert words in rows[0]["text"], rows
        assert (bool(rows[0]["repair"]), rows[0]["repaired"]) == (mendable, False)
        assert await check(host) == rows, "looking changes nothing"
        again = await check(host, repair=True)
        assert [row["repaired"] for row in again] == [mendable], again
        assert await check(host) == []
        site.whole(await site.info(), what)
        if what != "a file that was edited" and what != "a file less":
            assert site.pid() == pid, "dnsmasq was left alone"
        await host.networks.stop("lab", force=False, by=ROOT)
        site.nothing(what)
        assert await check(host) == []


@on_loop
async def test_what_a_stopped_network_left(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        add_bridge(site, "vd-lab", "lab")
        site.kernel.tables["virtd-lab"] = ("", 1)
        plant(site.world, "network/lab/stdin")
        os.makedirs(runtime(site))
        rows = await check(host)
        assert {row["kind"] for row in rows} == {"bridge", "rules", "slot", "directory"}
        assert {row["object"] for row in rows} == {"network/lab"}
        (site.kernel.sysfs / "vd-lab" / "brif" / "eth9").touch()
        rows = await check(host, repair=True)
        assert {(row["kind"], row["repaired"]) for row in rows} == {
            ("bridge", False), ("rules", True), ("slot", True), ("directory", True),
        }  # fmt: skip
        assert "in it are eth9" in next(row["text"] for row in rows if row["kind"] == "bridge")
        (site.kernel.sysfs / "vd-lab" / "brif" / "eth9").unlink()
        assert [row["repaired"] for row in await check(host, repair=True)] == [True]
        site.nothing("after the repair")


@on_loop
async def test_a_tap_of_a_guest_that_runs_is_left_alone(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.world.run("web1")
        add_tap(site, "qemu/web1")
        await site.define()
        await host.networks.start("lab", by=ROOT)
        assert await check(host, repair=True) == []
        await host.domains.stop("web1", by=ROOT)
        assert [row["kind"] for row in await check(host, repair=True)] == ["interface"]
        assert await check(host) == []


# Pools


def pool_directory(world: World) -> str:
    return f"{world.paths.root}/pool"


def job_unit(world: World) -> None:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
    unit = "virtd-storage-job-0a.service"
    world.units.units[unit] = Unit(UnitSpec(unit, "a job", "virtd-storage.slice", ("/bin/true",)), process)


POOLS: dict[str, tuple[Callable[[World], None], str, bool]] = {
    "no record": (lambda w: os.unlink(w.paths.record("storage", "p")), "p.json is missing", True),
    "another state": (
        lambda w: edit(w.paths.record("storage", "p"), '"state": "active"', '"state": "stopping"'),
        "says something else of state",
        True,
    ),
    "half a file": (lambda w: write(f"{w.paths.run}/storage/.p.json.new", "{"), "incomplete file", True),
    "a record of none": (lambda w: write(w.paths.record("storage", "q"), "{}"), "q.json can't be read", True),
    "a job's record of none": (lambda w: write(w.paths.record("storage", "job-1"), "{"), "can't be read", True),
    "a slot of none": (lambda w: plant(w, "storage/job-1/stdin"), "no job job-1 is under way", True),
    "a unit of none": (job_unit, "no job job-0a is under way", True),
    "a volume that nobody fills": (
        lambda w: write(f"{pool_directory(w)}/.virtd/new/job-9", "half"), "was begun, and no job fills it", True,
    ),
    "a description of nothing": (
        lambda w: write(f"{pool_directory(w)}/.virtd/gone.json", "{}"), "was begun, and no job fills it", True,
    ),
    "no directory": (
        lambda w: os.rename(pool_directory(w), f"{pool_directory(w)}.away"), "p is active, and", False,
    ),
}  # fmt: skip


async def a_pool(world: World, host: Host) -> None:
    for directory in (world.paths.etc, world.paths.run, world.paths.log):
        os.makedirs(f"{directory}/storage", exist_ok=True)
    os.makedirs(pool_directory(world))
    text = f'name = "p"\npath = "{pool_directory(world)}"\n'
    await host.pools.define(text, "test", check=False, by=ROOT)
    await host.pools.start("p", by=ROOT)
    await host.volumes.create("p", "v1", size="1M", by=ROOT)


@pytest.mark.parametrize("what", POOLS)
@on_loop
async def test_pools(world: World, what: str) -> None:
    damage, words, mendable = POOLS[what]
    async with world.daemon() as host:
        await a_pool(world, host)
        assert await check(host) == []
        damage(world)
        rows = await check(host)
        assert len(rows) == 1, rows
        assert words in rows[0]["text"], rows
        assert await check(host) == rows, "looking changes nothing"
        again: list[dict[str, Any]] = await check(host, repair=True)
        assert again[0]["repaired"] is mendable, again
        if mendable:
            assert await check(host) == []
            assert [row["name"] for row in await host.volumes.listing("p")] == ["v1"]
        else:
            assert await check(host) == rows, "a directory is nothing that can be mended"
            os.rename(f"{pool_directory(world)}.away", pool_directory(world))
            assert await check(host) == []


@pytest.mark.parametrize("kind", ["network", "storage"])
@on_loop
async def test_a_start_clears_half_files_away(world: World, kind: str) -> None:
    halves = [f"{place}/{kind}/.p.new" for place in (world.paths.run, world.paths.etc)]
    for path in halves:
        write(path, "half")
    write(world.paths.definition(kind, "p"), 'name = "p"\n')  # so that the driver is in use
    async with world.daemon():
        assert [path for path in halves if os.path.exists(path)] == []
