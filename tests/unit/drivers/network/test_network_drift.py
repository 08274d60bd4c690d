# SPDX-License-Identifier: LGPL-2.1-or-later
"""What differs of a network, and for how long it is put back. tests/live/test_network_drift.py asks a real kernel."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest

from tests.doubles.whole_host import ROOT, on_loop, until
from tests.unit.drivers.network.test_network_restarts import Site
from virtd.drivers.network import bridge, links, upkeep
from virtd.drivers.network import prerequisites as network_host
from virtd.drivers.network.kernel import RouteChanged, Way
from virtd.drivers.network.upkeep import LIMIT, PAUSE, WINDOW, Patience
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtd.drivers.network.net import Net
    from virtd.host import Host


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site.make(tmp_path, monkeypatch)
    yield site
    site.world.close()


def file(name: str, text: str) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        (site.kernel.sysfs / "vd-lab" / name).write_text(f"{text}\n")

    return change


async def look(host: Host) -> None:
    """Look at everything, and let the watch look at what that left to it, since the network was busy just then."""
    await host.look()
    await until(lambda: host.networks.driver._upkeep._task is None)


CHANGES: dict[str, Callable[[Site], None]] = {
    "vd-lab: down": file("flags", "0x1002"),
    "vd-lab: ARP is off": file("flags", "0x1083"),
    "vd-lab: MTU 1400 instead of 1500": file("mtu", "1400"),
    "vd-lab: no alias virtd network lab": file("ifalias", "mine"),
    "vd-lab: MAC address 02:00:00:00:00:01 instead of ": file("address", "02:00:00:00:00:01"),
    "vd-lab: no address 10.7.0.1/24": lambda site: site.kernel.addresses["vd-lab"].clear(),
}


@pytest.mark.parametrize("said", CHANGES)
@on_loop
async def test_what_is_changed_is_put_back(site: Site, said: str) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        site.world.messages.clear()
        await look(host)
        assert site.world.messages == []
        CHANGES[said](site)
        await look(host)
        (told,) = site.world.told(Message.NETWORK_PUT_BACK)
        assert said in told["text"]
        assert told["VIRTD_NAME"] == "lab"
        info = await site.info()
        assert info["problems"] == []
        assert len(site.world.messages) == 1
        assert [str(one.address) for one in site.kernel.addresses["vd-lab"]] == ["10.7.0.1"]
        assert not (await host.networks.start("lab", by=ROOT))["changed"]
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_a_route_that_wins_is_a_problem_until_it_goes(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        for route in (Way("10.7.0.0/25", "tun0", 254), Way("", "tun0", 52)):
            site.kernel.routes["10.7.0.254"] = route
            await look(host)
            await look(host)
            (problem,) = (await site.info())["problems"]
            assert "through tun0" in problem["text"]
            assert "ip route get 10.7.0.254" in problem["hint"]
            site.kernel.routes.clear()
            await look(host)
            assert (await site.info())["problems"] == []
        assert len(site.world.told(Message.NETWORK_BRIDGE_LOST)) == 2
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_a_route_that_a_rule_refuses(site: Site) -> None:
    """There is one; to make another would be in vain."""
    (there := Path(network_host.PROC) / "net").mkdir(parents=True)
    (there / "route").write_text("Iface\nvd-lab\t0000070A\t0\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        site.kernel.routes["10.7.0.254"] = None
        await look(host)
        (problem,) = (await site.info())["problems"]
        assert "what is for 10.7.0.254 is refused by a rule of policy routing" in problem["text"]
        assert problem["hint"].startswith("ip rule shows it")
        site.kernel.routes.clear()
        await look(host)
        assert (await site.info())["problems"] == []
        await host.networks.stop("lab", force=False, by=ROOT)


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        (RouteChanged(4, 0, 0, 254), True),
        (RouteChanged(4, 0, 1, 254), True),  # half of the world, as VPNs have it
        (RouteChanged(6, 0, 0, 252), True),
        (RouteChanged(4, 0, 24, 254), False),
        (RouteChanged(6, 0, 0, 255), False),
    ],
)
@on_loop
async def test_who_goes_elsewhere_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, route: RouteChanged, *, asked: bool
) -> None:
    """Another way out may lead through another firewall's rules, which haven't changed."""
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        doubted: list[str] = []
        tended = host.networks.driver._upkeep
        monkeypatch.setattr(tended, "_doubt", doubted.extend)
        tended.heard(route)
        assert doubted == (["lab"] if asked else [])
        file("mtu", "1400")(site)
        await look(host)
        assert doubted[-1:] == ["lab"], "what was put back may be another one to somebody's rules"
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_what_is_changed_again_and_again_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "Patience", lambda: Patience(lambda: 0.0))
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        for _ in range(LIMIT + 3):
            file("mtu", "1400")(site)
            await look(host)
        assert len(site.world.told(Message.NETWORK_PUT_BACK)) == LIMIT
        (problem,) = (await host.status())["problems"]
        assert "MTU 1400 instead of 1500 (put back 5 times" in problem["text"]
        # A person has it put back at once.
        await host.networks.start("lab", by=ROOT)
        assert (await host.status())["problems"] == []
        await host.networks.stop("lab", force=False, by=ROOT)


def test_patience_ends_later_each_time() -> None:
    now = 0.0
    patience = Patience(lambda: now)
    for round_ in range(3):
        for _ in range(LIMIT):
            assert patience.spared == frozenset()
            patience.did("a")
        assert patience.spared == {"a"}
        now += PAUSE * 2**round_ - 1
        assert patience.spared == {"a"}
        now += 1
    for _ in range(10 * LIMIT):  # seldom
        patience.did("b")
        now += WINDOW / 2
    assert patience.spared == frozenset()


MACS = {"vt-a-0": "52:54:00:00:00:0a", "vt-b-0": "52:54:00:00:00:0b"}


async def connect(host: Host) -> None:
    """Connect two guests' taps."""
    for interface, mac in MACS.items():
        user = f"qemu/{interface[3]}"
        await host.networks.driver.interfaces.attach("lab", user=user, interface=interface, mac=mac, uid=os.getuid())


class Somebody:
    """Changes interfaces, while virtd looks and between; what the kernel tells of it comes late, and some at once."""

    def __init__(self, site: Site, seed: int) -> None:
        self.kernel = site.kernel
        self.random = random.Random(seed)
        self.untold: list[tuple[str, int]] = []
        self.done: list[str] = []
        self.left = 0  # changes that are made while virtd looks
        site.kernel.told = lambda name, index: self.untold.append((name, index))
        site.kernel.between = self.meddle

    def meddle(self) -> None:
        if self.left and self.random.random() < 0.2:
            self.left -= 1
            self.change()

    def change(self) -> None:
        with self.kernel.lock:
            self._change()

    def _change(self) -> None:
        kernel, there = self.kernel, set(links.all_names())
        bridges = there & {"vd-lab", "br0"}
        taps = there & MACS.keys()
        chosen: list[tuple[Any, ...]] = [(kernel.delete, name) for name in bridges]
        chosen += [(kernel.make_bridge, name, "02:00:00:00:00:09") for name in {"vd-lab", "br0"} - bridges]
        chosen += [(kernel.rename, one, other) for one in bridges for other in {"vd-lab", "br0"} - bridges]
        chosen += [(kernel.connect, tap, bridge) for tap in taps for bridge in ("", *bridges)]
        chosen += [(kernel.write, "vt-a-0", "address", MACS["vt-b-0"])]
        if "vd-lab" in bridges:
            for what, text in (
                ("address", "02:00:00:00:00:01"),
                ("ifalias", "x"),
                ("flags", "0x1002"),
                ("mtu", "9"),
            ):
                chosen.append((kernel.write, "vd-lab", what, text))
        function, *arguments = self.random.choice(chosen)
        self.done.append(f"{function.__name__} {' '.join(arguments)}")
        function(*arguments)

    def tell(self) -> None:
        told, self.untold = self.untold, []
        for watch in self.kernel.watches:
            for name, index in told:
                watch.link(name, index)

    async def act(self) -> None:
        self.left = self.random.randrange(3)
        for _ in range(self.random.randrange(1, 8)):
            self.change()
            if self.random.random() < 0.4:
                self.tell()
            await asyncio.sleep(self.random.choice((0, 0, 0.005, 0.02)))
        self.left = 0

    async def silence(self, host: Host) -> None:
        """Until all has been told, and virtd has nothing left to do about it."""
        keeper = host.networks.driver._upkeep

        def quiet() -> bool:
            self.tell()
            return keeper._task is None and not keeper._touched

        await until(quiet, "silence")


def settled(site: Site, net: Net, where: str) -> None:
    """virtd has of the last state of things the right view, and has put back what it can."""
    kernel, problem = site.kernel, net.problems.get("bridge")
    ours = links.mac("vd-lab") == net.mac
    if not ours:
        assert problem is not None, where
        assert "replaced by something that isn't virtd's" in problem.text, where
        assert links.read("vd-lab", "ifalias") != "virtd network lab", where
        return
    if problem is not None:  # what was renamed has kept its addresses
        assert links.exists("br0"), where
        assert problem.text.startswith("It isn't as virtd made it: vd-lab: what is for"), where
        assert problem.text.endswith("goes by 10.7.0.0/24 through br0"), where
    assert links.read("vd-lab", "ifalias") == "virtd network lab", where
    assert (links.is_up("vd-lab"), links.mtu("vd-lab")) == (True, 1500), where
    assert [one.address for one in kernel.addresses["vd-lab"]] == ["10.7.0.1"], where
    for port in net.ports:
        name = port.interface
        assert links.mac(name) == bridge.address_of(port) or links.master(name) != "vd-lab", where
        if name in net.connections.refused:
            assert links.master(name) != "vd-lab", where
            assert f"port {name}" in net.problems, where
        else:
            assert links.master(name) == "vd-lab", where
            assert (name, port.mac) in kernel.neighbours, where


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and all the patience in the world."""
    monkeypatch.setattr(upkeep, "QUIET", 0.0)
    monkeypatch.setattr(upkeep, "BUSY", 0.01)
    monkeypatch.setattr(upkeep, "LIMIT", 1 << 30)
    monkeypatch.setattr("virtd.drivers.qemu.nics.sweep", AsyncMock())  # there are no guests


@pytest.mark.parametrize("seed", range(int(os.environ.get("VIRTD_EXAMPLES", "6"))))
@pytest.mark.usefixtures("soon")
@on_loop
async def test_whatever_is_done_in_whatever_order(site: Site, seed: int) -> None:
    """It ends with the right view: after the last word of the kernel, and after an absence; without a later look."""
    somebody = Somebody(site, seed)
    for away in range(3):
        async with site.world.daemon() as host:
            if not away:
                await site.define()
                await host.networks.start("lab", by=ROOT)
                await connect(host)
            net = host.networks.driver.nets["lab"]
            for round_ in range(4):
                await somebody.silence(host)
                settled(site, net, f"seed {seed}, {away}.{round_}: {', '.join(somebody.done)}")
                # The same with all of virtd's again
                for name in set(links.all_names()) - MACS.keys():
                    if name != "vd-lab" or links.mac(name) != net.mac:
                        with somebody.kernel.lock:
                            somebody.kernel.delete(name)
                await somebody.silence(host)
                settled(site, net, f"seed {seed}, {away}.{round_}, cleared: {', '.join(somebody.done)}")
                if net.connections.refused:
                    for interface in MACS:
                        await host.networks.driver.interfaces.detach(interface)
                    await connect(host)
                    await somebody.silence(host)
                # A dnsmasq that went with the bridge is started again after a moment.
                await until(lambda net=net: net.problems == {})
                somebody.done.clear()
                await somebody.act()
        await somebody.act()
    async with site.world.daemon() as host:
        await host.networks.stop("lab", force=True, by=ROOT)


@pytest.mark.usefixtures("soon")
@on_loop
async def test_a_bridge_is_renamed(site: Site) -> None:
    """The kernel tells of the new name only."""
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await look(host)
        number = site.kernel.number("vd-lab")
        site.kernel.rename("vd-lab", "br0")
        site.kernel.watches[0].link("br0", number)
        await until(lambda: links.exists("vd-lab"))
        await host.networks.stop("lab", force=False, by=ROOT)


@pytest.mark.usefixtures("soon")
@on_loop
async def test_a_tap_that_is_refused_stays_out(site: Site) -> None:
    """However it came in again."""
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await connect(host)
        site.kernel.write("vt-a-0", "address", MACS["vt-b-0"])
        for _ in range(2):
            await look(host)
            assert links.master("vt-a-0") == ""
            assert ("vt-b-0", MACS["vt-b-0"]) in site.kernel.neighbours
            (problem,) = (await site.info())["problems"]
            assert "qemu/a gave its interface vt-a-0 another MAC address" in problem["text"]
            site.kernel.connect("vt-a-0", "vd-lab")
        assert len(site.world.told(Message.NETWORK_PORT_REFUSED)) == 1
        await host.networks.stop("lab", force=True, by=ROOT)


@pytest.mark.usefixtures("soon")
@on_loop
async def test_what_happens_while_a_network_is_busy(site: Site) -> None:
    """It is seen when that is over, and not at some later look."""
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        await until(lambda: host.networks.driver._upkeep._task is None)
        async with net.exclusive("test"):
            site.kernel.write("vd-lab", "mtu", "1400")
            await host.look()
            assert links.mtu("vd-lab") == 1400
        await until(lambda: links.mtu("vd-lab") == 1500)
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_an_interface_that_goes_twice(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time its guest may be about to end."""
    now = 100.0
    monkeypatch.setattr(upkeep, "time", SimpleNamespace(monotonic=lambda: now))
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await connect(host)
        for _ in range(2):
            site.kernel.delete("vt-a-0")
            await look(host)
            assert (await host.status())["problems"] == []
            now += upkeep.GRACE + 1
            await look(host)
            (problem,) = (await host.status())["problems"]
            assert "vt-a-0: gone, qemu/a is cut off" in problem["text"]
            await connect(host)
            await look(host)
            assert (await host.status())["problems"] == []
        await host.networks.stop("lab", force=True, by=ROOT)
