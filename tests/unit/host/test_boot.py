# SPDX-License-Identifier: LGPL-2.1-or-later
"""Autostart: what can't be started yet is tried again for as long as the boot lasts, by whichever daemon there is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, on_loop, until
from virtd import errors
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doubles.whole_host import World
    from virtd.host import Host

BRIDGE = 'name = "late"\nmode = "bridge"\nbridge = "virtd-nosuch0"\nautostart = true\n'


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtd.host.boot.AGAIN", (0.01, 0.01, 0.01))
    monkeypatch.setattr("virtd.host.boot.CALM", 0.01)
    monkeypatch.setattr("virtd.host.boot.RATHER_NOT", 0.01)


async def problems(host: Host) -> dict[str, str]:
    return {row["object"]: row["text"] for row in (await host.status())["problems"]}


def waiting(world: World) -> set[str]:
    try:
        with open(world.paths.waiting, encoding="utf-8") as file:
            return set(json.load(file)["objects"])
    except FileNotFoundError:
        return set()


@on_loop
async def test_what_can_be_started_is(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", "", "autostart = true")
        await world.define("web2", "fail=1", "autostart = true")
        await world.define("web3")
        await host.autostart()
        states = {item["name"]: (item["state"], item["waits"]) for item in await host.domains.listing()}
        assert states == {"web1": ("running", False), "web2": ("stopped", True), "web3": ("stopped", False)}
        assert list(await problems(host)) == ["qemu/web2"]
        assert "Cannot allocate memory" in (await problems(host))["qemu/web2"]
        assert "it is tried again" in (await problems(host))["qemu/web2"]
        assert waiting(world) == {"qemu/web2"}


@on_loop
async def test_what_fails_is_tried_until_it_works(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PID 1 refuses in one moment it may do in the next, and nobody sits there to ask again."""
    refused: list[str] = []

    def step(what: str) -> None:
        if what == "start virtd-qemu-web1.service" and len(refused) < 7:
            refused.append(what)
            raise errors.HostError("systemd refused to start virtd-qemu-web1.service: Connection reset by peer")

    async with world.daemon() as host:
        await world.define("web1", "", "autostart = true")
        monkeypatch.setattr(world.units, "step", step)
        await host.autostart()
        info = await host.domains.info("web1")
        assert (info["waits"], info["reason"].startswith("waits to be autostarted: ")) == (True, True)
        await until(lambda: host.domains.driver.machines["web1"].state == "running")
        assert len(refused) == 7
        await until(lambda: waiting(world) == set())
        assert await problems(host) == {}
        assert len(world.told(Message.AUTOSTARTED_LATE)) == 1


@on_loop
async def test_what_waits_is_told_of_all_the_while(world: World) -> None:
    """Also while it is being tried, and when a further try fails in the same words."""
    told: list[str] = []
    async with world.daemon() as host:
        await world.define("web1", "fail=1", "autostart = true")
        await host.autostart()
        tries = world.units.history.count

        def tried() -> bool:
            told.append(" ".join(problem.text for _name, problem in host.domains.driver.troubles()))
            return tries("start virtd-qemu-web1.service") > 5

        await until(tried)
        assert all("it is tried again" in text for text in told), told


@on_loop
async def test_a_file_that_comes_late(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the definition names may be on a disk that isn't there yet: that is no bad definition."""
    disk = tmp_path_factory.mktemp("late") / "disk.raw"
    async with world.daemon() as host:
        more = f'autostart = true\n[[disk]]\npath = "{disk}"\nformat = "raw"\n'
        await world.define("web1", more=more)
        await host.autostart()
        assert str(disk) in (await problems(host))["qemu/web1"]
    # Another daemon: it waits on, and says so from the beginning.
    async with world.daemon() as host:
        assert (await host.domains.info("web1"))["waits"] is True
        assert str(disk) in (await problems(host))["qemu/web1"]
        await host.autostart()
        assert str(disk) in (await problems(host))["qemu/web1"]
        disk.write_bytes(bytes(1 << 20))
        await until(lambda: host.domains.driver.machines["web1"].state == "running")
        assert await problems(host) == {}
        await host.domains.stop("web1", by=ROOT)
    async with world.daemon() as host:
        await host.autostart()
        assert ((await host.domains.info("web1"))["state"], waiting(world)) == ("stopped", set())


@on_loop
@pytest.mark.parametrize("how", ["stop", "disable", "undefine"])
async def test_nobody_waits_for_what_nobody_wants(world: World, how: str) -> None:
    async with world.daemon() as host:
        await world.define("web1", "fail=1", "autostart = true")
        await host.autostart()
        match how:
            case "stop":
                await host.domains.stop("web1", by=ROOT)
            case "disable":
                await host.domains.set_autostart("web1", False, by=ROOT)
            case _:
                await host.domains.undefine("web1", by=ROOT)
        await until(lambda: waiting(world) == set())
        assert await problems(host) == {}
        tries = world.units.history.count("start virtd-qemu-web1.service")
        host.boot.nudge()
        await until(lambda: not host.boot._waiters)
        assert world.units.history.count("start virtd-qemu-web1.service") == tries
    async with world.daemon() as host:
        await host.autostart()
        assert (await problems(host), world.units.history.count("start virtd-qemu-web1.service")) == ({}, tries)


@on_loop
async def test_a_network_waits_as_well(make_world: Callable[..., World]) -> None:
    world = make_world()
    async with world.daemon() as host:
        await host.networks.define(BRIDGE, "late.toml", check=False, by=ROOT)
        await host.autostart()
        assert (await host.networks.listing())[0]["waits"] is True
        assert "virtd-nosuch0" in (await problems(host))["network/late"]
        await host.networks.stop("late", by=ROOT, force=False)
        assert (await problems(host), (await host.networks.listing())[0]["waits"]) == ({}, False)


@on_loop
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"boot": 1}', b'{"boot": "x", "objects": {"a": 1}}'])
async def test_a_damaged_record_costs_nothing(world: World, content: bytes) -> None:
    async with world.daemon() as host:
        await world.define("web1", "", "autostart = true")
        await host.autostart()
    with open(world.paths.waiting, "wb") as file:
        file.write(content)
    async with world.daemon() as host:
        await host.autostart()
        assert (await host.domains.info("web1"))["state"] == "running"
        assert await problems(host) == {}
