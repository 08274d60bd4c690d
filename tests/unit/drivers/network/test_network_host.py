# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks read of the host and of the kernel's messages; the kernel itself is asked in tests/live."""

from __future__ import annotations

import asyncio
import socket
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.doubles.whole_host import until
from virtd import errors
from virtd.drivers.network import firewall, firewalld, guard, kernel, links, netlink, prerequisites, routes, watch
from virtd.drivers.network.kernel import LinkChanged, RouteChanged, RuleChanged
from virtd.model import network as model
from virtd.model import networkchecks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtd.systemd.bus import Bus

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
vd-lab\t0096A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
ROUTES6 = """\
fd000001000000000000000000000000 40 00000000000000000000000000000000 00 {zero} 00000100 00000001 0 0001 eth0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 {zero} 00000100 00000001 0 0001 eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 {zero} ffffffff 00000001 0 200200 lo
fd000001000000000000000000000001 80 00000000000000000000000000000000 00 {zero} 00000000 00000002 0 80200001 eth0
"""


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prerequisites, "PROC", str(tmp_path))
    (tmp_path / "net").mkdir()
    (tmp_path / "net/route").write_text(ROUTES)
    (tmp_path / "net/ipv6_route").write_text(ROUTES6.format(zero="0" * 32))
    for name, value in {
        "ipv4/ip_forward": "0",
        "ipv6/conf/all/forwarding": "0",
        "ipv6/conf/all/accept_ra": "1",
        "ipv6/conf/eth0/accept_ra": "1",
        "ipv6/conf/eth1/accept_ra": "0",
    }.items():
        path = tmp_path / "sys/net" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return tmp_path


def parse(address: str, *, mode: str = "nat", six: str = "") -> model.Network:
    more = f'[ipv6]\naddress = "{six}"\n' if six else ""
    return networkchecks.parse(f'name = "lab"\nmode = "{mode}"\n[ipv4]\naddress = "{address}"\n{more}', "lab.toml")


def test_routes(proc: Path) -> None:
    found = [(str(route.prefix), route.interface, str(route.gateway)) for route in routes.routes()]
    assert found == [
        ("0.0.0.0/0", "eth0", "10.0.0.1"),
        ("10.0.0.0/16", "eth0", "None"),
        ("192.168.150.0/24", "vd-lab", "None"),
        ("fd00:1::/64", "eth0", "None"),
        ("::/0", "", "None"),
    ]
    assert len(routes.routes(1)) == 2


@pytest.mark.parametrize(
    ("address", "six", "key"),
    [("10.0.7.1/16", "", "ipv4.address"), ("10.0.0.1/8", "", "ipv4.address"),
     ("10.9.0.1/24", "fd00:1::1/64", "ipv6.address")],
)  # fmt: skip
def test_a_prefix_that_the_host_reaches_already(proc: Path, address: str, six: str, key: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        routes.check(parse(address, six=six), "lab.toml")
    assert (caught.value.file, caught.value.key) == ("lab.toml", key)
    assert "to which the host has a route through eth0" in caught.value.message


WINS = {
    "\t".join(["*", "0096A8C0", "00000000", "0201", "0", "0", "0", "80FFFFFF"]): "has a route to nowhere",
    "\t".join(["tun0", "0596A8C0", "00000000", "0005", "0", "0", "9", "FFFFFFFF"]): "192.168.150.5/32",
    "\t".join(["eth1", "0096A8C0", "00000000", "0001", "0", "0", "600", "00FFFFFF"]): "through eth1",
    "\t".join(["eth1", "0000000A", "0996A8C0", "0003", "0", "0", "600", "000000FF"]): "router 192.168.150.9",
}
LOSES = [
    "\t".join(["tun0", "00000000", "00000000", "0001", "0", "0", "0", "00000080"]),  # half of everything: a VPN
    "\t".join(["tun0", "00000080", "00000000", "0001", "0", "0", "0", "00000080"]),
    "\t".join(["*", "0000A8C0", "00000000", "0201", "0", "0", "0", "0000FFFF"]),
    "\t".join(["eth1", "0097A8C0", "00000000", "0001", "0", "0", "0", "00FFFFFF"]),
]


@pytest.mark.parametrize("line", WINS)
def test_routes_that_win(proc: Path, line: str) -> None:
    (proc / "net/route").write_text(f"{ROUTES}{line}\n")
    with pytest.raises(errors.InvalidDefinition) as caught:
        routes.check(parse("192.168.150.1/24"), "lab.toml")
    assert WINS[line] in caught.value.message


def test_broader_routes_do_not_count(proc: Path) -> None:
    (proc / "net/route").write_text(ROUTES + "".join(f"{line}\n" for line in LOSES))
    routes.check(parse("192.168.150.1/24"), "lab.toml")
    routes.check(parse("10.0.7.1/24"), "lab.toml")
    assert routes.free_prefix([]) == "192.168.124.1/24"


def test_its_own_bridges_route_is_no_collision(proc: Path) -> None:
    routes.check(parse("192.168.150.1/24"), "lab.toml")


def test_a_free_prefix(proc: Path) -> None:
    import ipaddress

    assert routes.free_prefix([]) == "192.168.124.1/24"
    assert routes.free_prefix([ipaddress.IPv4Network("192.168.0.0/16")]) == "10.200.100.1/24"
    everything = [ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    with pytest.raises(errors.HostError):
        routes.free_prefix(everything)


def test_forwarding_leaves_the_host_its_own_routes(proc: Path) -> None:
    assert prerequisites.allow_forwarding(parse("10.9.0.1/24", mode="isolated")) == []
    assert prerequisites.allow_forwarding(parse("10.9.0.1/24")) == ["net.ipv4.ip_forward=1"]
    changed = prerequisites.allow_forwarding(parse("10.9.0.1/24", six="fd00:2::1/64"))
    # Before it forwards: a kernel that does takes no more advertisements unless told so.
    assert changed == ["net.ipv6.conf.eth0.accept_ra=2", "net.ipv6.conf.all.forwarding=1"]
    assert (proc / "sys/net/ipv6/conf/eth1/accept_ra").read_text() == "0"
    assert prerequisites.allow_forwarding(parse("10.9.0.1/24", six="fd00:2::1/64")) == []


def test_settings_are_named_as_sysctl_has_them() -> None:
    """A dot in an interface's name is a slash there."""
    assert prerequisites.dotted("net/ipv4/ip_forward") == "net.ipv4.ip_forward"
    assert prerequisites.dotted("net/ipv4/conf/br0.100/forwarding") == "net.ipv4.conf.br0/100.forwarding"


def test_advertisements_that_cannot_be_kept(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever setting is refused, the hint names the one that the network needs."""

    def refuse(name: str, value: str) -> None:
        raise errors.HostError(f"Cannot set {name} to {value}: Read-only file system")

    monkeypatch.setattr(prerequisites, "set_sysctl", refuse)
    (proc / "sys/net/ipv4/ip_forward").write_text("1")
    with pytest.raises(errors.HostError, match="eth0/accept_ra") as caught:
        prerequisites.allow_forwarding(parse("10.9.0.1/24", six="fd00:2::1/64"))
    assert "sysctl -w net.ipv6.conf.all.forwarding=1" in str(caught.value.hint)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_notifications_of_the_kernel() -> None:
    """Layouts as include/uapi has them, and not by the code that is tested."""
    deleted, lab = 10 << 8 | 2, struct.pack("=4xHH10sxx", 14, 1, b"virtd-lab\0")
    data = message(deleted, lab) + message(10 << 8 | 15, lab) + message(17, lab)
    assert [watch.table_of(one) for one in netlink.messages(data)] == ["virtd-lab", None, None]
    link = struct.pack("=BxHiIIHH7sx", 0, 1, 7, 0, 0, 11, 3, b"vd-lab\0")
    half = struct.pack("=8BIHH4s", socket.AF_INET, 1, 0, 0, 254, 3, 0, 1, 0, 8, 1, bytes([128, 0, 0, 0]))
    data = message(17, link) + message(24, half) + message(33, bytes(12)) + message(20, bytes(8)) + message(99, link)
    assert [kernel.changed(one) for one in netlink.messages(data)] == [
        LinkChanged("vd-lab", 7),
        RouteChanged(4, 1 << 31, 1, 254),
        RuleChanged(removed=True),
        LinkChanged("", 0),
        None,
    ]


@pytest.mark.parametrize("data", [bytes(64), message(24, b"\2")])
def test_a_notification_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(netlink.NetlinkError):
        [kernel.changed(one) for one in netlink.messages(data)]


def test_attributes_are_read_as_they_are_written() -> None:
    data = netlink.attribute(1, "eth0") + netlink.nested(2, netlink.attribute(3, 4), netlink.attribute(5, b"\6"))
    found = netlink.Attributes(data + b"\xff\0")
    assert (found.text(1), found.within(2), found.text(7), found.number(7)) == (
        "eth0", {3: struct.pack("=I", 4), 5: b"\6"}, "", 0,
    )  # fmt: skip


def test_firewalld_is_told_again_when_the_bus_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus that broke off is no time to ask anybody; what was asked of firewalld meanwhile is asked once more."""
    monkeypatch.setattr(guard, "BUS_RETRY", 0.01)
    buses: list[Any] = []

    class FakeBus:
        def __init__(self) -> None:
            buses.append(self)

        def on_closed(self, callback: Callable[[], None]) -> None:
            self.close = callback

        async def subscribe(self, *_arguments: Any, **_more: Any) -> Any: ...

    class FakeServices:
        async def units(self) -> Any:
            return SimpleNamespace(bus=FakeBus())

    told: list[int] = []

    class FakePieces:
        async def join_firewalld(self) -> None:
            told.append(len(buses))

    async def main() -> None:
        nets = {"lab": SimpleNamespace(active=False, pieces=FakePieces())}
        prober = SimpleNamespace(doubt=lambda _names: None)
        beside = guard.Guard(FakeServices(), nets, {}, lambda *_: None, None, prober, None)  # type: ignore[arg-type]
        following = asyncio.create_task(beside._follow_firewalld())
        try:
            await until(lambda: buses and hasattr(buses[0], "close"))
            await asyncio.sleep(0.05)
            assert told == []
            buses[0].close()
            await until(lambda: told)
            assert told == [2]
        finally:
            following.cancel()
            await beside.close()
            await asyncio.gather(following, return_exceptions=True)

    asyncio.run(main())


def test_firewalld_comes_and_goes() -> None:
    """Either is a reason to look: what one that has ended has refused is no problem any more."""
    handlers: list[Any] = []

    class FakeBus:
        async def subscribe(self, *arguments: Any, **_more: Any) -> Any:
            handlers.append(arguments[-1])

    told: list[str] = []
    asyncio.run(firewalld.watch(cast("Bus", FakeBus()), lambda: told.append("changed")))
    owner, reloaded = handlers
    for name, before, after in (
        (firewalld.NAME, "", ":1.5"),
        ("org.example", ":1.5", ""),
        (firewalld.NAME, ":1.5", ""),
    ):
        owner("/org/freedesktop/DBus", firewalld.DBUS, "NameOwnerChanged", (name, before, after))
    assert len(told) == 2
    reloaded(firewalld.PATH, firewalld.NAME, "Reloaded", ())
    assert len(told) == 3


def test_whose_an_interface_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CLASS", str(tmp_path))
    for name, alias in {
        "vt-web1-0": links.alias_of("lab", "qemu/web1"),
        "eth0": "",
        "x": "virtd network lab",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ifalias").write_text(alias + "\n")
    assert links.ports() == [links.Port("vt-web1-0", "lab", "qemu/web1")]


def test_what_the_kernel_fills_is_no_change_of_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the elements nor, from nft 1.1.7 (or earlier) on, how many there are."""
    empty = {"family": "bridge", "name": "dropped", "table": "virtd-lab", "type": "ifname", "size": 65536}
    filled = empty | {"count": 1, "elem": [{"elem": {"val": "vt-a-0", "counter": {"packets": 3, "bytes": 180}}}]}
    there: list[dict[str, Any]] = []
    monkeypatch.setattr(firewall, "_listed", lambda _what: [{"set": dict(one)} for one in there])
    listings = set()
    for found in (empty, filled, filled | {"count": 2}):
        there[:] = [found]
        listings.add(firewall.listing("lab", "bridge"))
    assert len(listings) == 1
    there[:] = [filled | {"name": "macs"}]
    assert "vt-a-0" in firewall.listing("lab", "bridge")
