# SPDX-License-Identifier: LGPL-2.1-or-later
"""Problems that are on record are in the first answer after a restart, before anything has been looked at.

Whoever asks in that moment, a monitoring script after an upgrade say, must not take a host for well that isn't.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.whole_host import ROOT, World, on_loop, until
from tests.unit.drivers.network.test_network_restarts import Site
from tests.unit.drivers.storage.test_storage_restarts import hosted
from virtd.drivers.network import prober
from virtd.drivers.network.kernel import Way
from virtd.drivers.network.obstacles import Obstacle
from virtd.drivers.qemu import standstill
from virtd.drivers.qemu.standstill import Space
from virtd.guests.guestrecord import AGAIN
from virtd.messages import Message
from virtd.objects.protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtd.host import Host
    from virtd.messages import Message as Id


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site.make(tmp_path, monkeypatch)
    yield site
    site.world.close()


async def problems(host: Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await host.status())["problems"]
    return found


async def told_at_once(world: World, message: Id | None = None) -> list[dict[str, Any]]:
    """The problems, which the next daemon tells in its first step, and its second; nothing is new in the journal."""
    assert world.host is None
    before = len(world.told(message)) if message is not None else 0
    async with world.daemon(reconcile=False) as host:
        first = await problems(host)
        assert first != []
    async with world.daemon() as host:
        await host.look()
        assert await problems(host) == first
    assert message is None or len(world.told(message)) == before
    return first


@on_loop
async def test_a_guest_that_stands_still(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstill, "_space_of", lambda path: Space(os.path.dirname(path), 0))
    (tmp_path / "disk").touch()
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{tmp_path}/disk" }}]')
        world.type("web1", "full")
        await host.domains.wait("web1", ["paused"], 20)
        await until(lambda: world.told(Message.GUEST_STOOD_STILL), "the word of it")
        (known,) = await problems(host)
    async with world.daemon(reconcile=False) as host:
        (first,) = await problems(host)
        # Without how much is free, for which the file system would have to be asked.
        assert known["text"].startswith(first["text"])
        assert first["hint"] == "Free some space on its file system, then: virtdctl resume web1."
        assert (await host.domains.info("web1"))["standstill"]["disk"] == "disk[0]"
    async with world.daemon() as host:
        await until(lambda: "free" in host.domains.driver.machines["web1"].problems["standstill"].text)
        assert await problems(host) == [known]
        await host.domains.stop("web1", by=ROOT)
        assert await problems(host) == []
    assert len(world.told(Message.GUEST_STOOD_STILL)) == 1


@on_loop
async def test_a_guest_that_somebody_has_restarted(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        machine = host.domains.driver.machines["web1"]
        assert machine.record is not None
        machine.save(data=machine.record.data | {AGAIN: True})
    (problem,) = await told_at_once(world)
    assert "restarted by somebody" in problem["text"]
    async with world.daemon() as host:
        await host.domains.stop("web1", by=ROOT)
        assert await problems(host) == []


@on_loop
async def test_a_disk_that_was_deleted(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\0" * 512)
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{disk}", format = "raw" }}]')
        os.rename(disk, tmp_path / "kept")
        await host.look()
    (problem,) = await told_at_once(world, Message.DISK_LOST)
    assert f"{disk} was deleted" in problem["text"]
    os.rename(tmp_path / "kept", disk)
    async with world.daemon() as host:
        await host.look()
        assert await problems(host) == []
    async with world.daemon(reconcile=False) as host:
        assert await problems(host) == []
    async with world.daemon() as host:
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_what_a_network_is_not_let_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Obstacle(Problem("dropped", "nft ..."), unheard=False)]
    monkeypatch.setattr(prober, "QUIET", 0.001)
    monkeypatch.setattr(prober, "_find", lambda _ground, _over: found)
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await until(lambda: host.networks.driver.nets["lab"].data.get("obstacles"))
    (problem,) = await told_at_once(site.world, Message.NETWORK_OBSTRUCTED)
    assert problem["text"] == "dropped"


@on_loop
async def test_what_is_wrong_with_a_bridge(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        site.kernel.routes["10.7.0.254"] = Way("10.7.0.0/25", "tun0", 254)
        await host.look()
    (problem,) = await told_at_once(site.world, Message.NETWORK_BRIDGE_LOST)
    assert "through tun0" in problem["text"]
    site.kernel.routes.clear()
    async with site.world.daemon() as host:
        await host.look()
        assert await problems(host) == []
    async with site.world.daemon(reconcile=False) as host:
        assert await problems(host) == []


@on_loop
async def test_a_network_whose_definition_waits(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await site.define('bridge = "br7"')
        (known,) = await problems(host)
        assert "bridge can't be changed while network lab is active" in known["text"]
    assert await told_at_once(site.world, Message.NETWORK_PENDING) == [known]


@on_loop
async def test_a_network_without_its_dnsmasq(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        await net.server.end()
        net.save(unit="", slots={}, main_pid=0, main_start=0)
    async with site.world.daemon(reconcile=False) as host:
        (problem,) = await problems(host)
        assert "no leases and no names" in problem["text"]
    async with site.world.daemon() as host:
        await until(lambda: host.networks.driver.nets["lab"].server.alive)
        await until(lambda: not host.networks.driver.nets["lab"].problems)


@on_loop
async def test_a_guest_that_was_put_out(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        port = {"interface": "vt-web1-0", "user": "qemu/web1", "mac": "52:54:00:00:00:01"}
        net.keep_data(ports=[port], refused=["vt-web1-0"])
    async with site.world.daemon(reconcile=False) as host:
        (problem,) = await problems(host)
        assert "qemu/web1 gave its interface vt-web1-0 another MAC address" in problem["text"]


@on_loop
async def test_a_pool_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosted(tmp_path, monkeypatch) as world:
        async with world.daemon() as host:
            await host.pools.start("p", by=ROOT)
            os.rename(tmp_path / "pool", tmp_path / "away")
            await host.reload(by=ROOT)
        (problem,) = await told_at_once(world)
        assert "Pool p was active and can't be used" in problem["text"]
        os.rename(tmp_path / "away", tmp_path / "pool")
        async with world.daemon() as host:
            await host.pools.driver.certain()
            assert await problems(host) == []
        async with world.daemon(reconcile=False) as host:
            assert await problems(host) == []


@on_loop
async def test_one_that_cannot_be_recalled_costs_no_other_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        await world.run("web2")
        for name in ("web1", "web2"):
            machine = host.domains.driver.machines[name]
            assert machine.record is not None
            machine.save(data=machine.record.data | {AGAIN: True})
        kind = type(machine)
    recall = kind.recall

    def fails(machine: Any) -> None:
        if machine.name == "web1":
            raise RuntimeError("a bug")
        recall(machine)

    monkeypatch.setattr(kind, "recall", fails)
    async with world.daemon() as host:
        told = {one["object"]: one["text"] for one in await problems(host)}
        assert "can't be recalled: a bug" in told["qemu/web1"]
        assert "restarted by somebody" in told["qemu/web2"]
        for name in ("web1", "web2"):
            await host.domains.stop(name, by=ROOT)
