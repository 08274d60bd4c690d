# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only one can have, whichever driver's object it is: addresses, disks, ports; and what the host serves."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_kernel import FakeKernel
from tests.doubles.whole_host import ROOT, World, on_loop
from virtd import errors
from virtd.drivers.network import listening, prerequisites
from virtd.drivers.network.newcomers import LASTING, Newcomers
from virtd.messages import Message
from virtd.model.network import Forward, Protocol
from virtd.objects import conflicts
from virtd.objects.conflicts import Holding, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtd.host import Host
    from virtd.objects.peers import Peers

MAC = "52:54:00:00:00:01"


class Fake:
    """A driver that holds things."""

    def __init__(self, *held: tuple[str, Holding]) -> None:
        self._held = held

    def holdings(self, *, running: bool) -> Iterator[tuple[str, Holding]]:
        yield from self._held if running else (*self._held, ("domain off", conflicts.mac("br0", "52:54:00:00:00:09")))


def peers(*held: tuple[str, Holding]) -> Peers:
    drivers: Any = [object(), Fake(*held)]
    return drivers  # type: ignore[no-any-return]


def test_whoever_runs_has_it() -> None:
    there = peers(("container c", conflicts.mac("br0", MAC)))
    with pytest.raises(
        errors.Busy, match=r"Cannot start domain a: MAC address .* in network lab .* by container c"
    ) as e:
        conflicts.require(there, "domain a", [conflicts.mac("br0", MAC.upper(), "nic[0]", "lab")])
    assert "Stop container c" in str(e.value.hint)
    for fine in (
        conflicts.mac("br1", MAC),  # another network
        conflicts.mac("br0", "52:54:00:00:00:09"),  # of one that is off
        Holding(Kind.INTERFACE, ("br0", MAC)),
    ):
        conflicts.require(there, "domain a", [fine])
    conflicts.require(there, "container c", [conflicts.mac("br0", MAC)])
    (warning,) = conflicts.warnings(there, "domain a", [conflicts.mac("br0", "52:54:00:00:00:09", "nic[1]", "lab")])
    assert warning == (
        "nic[1]: MAC address 52:54:00:00:00:09 in network lab is domain off's as well: "
        "both can't run at the same time"
    )


def test_readers_share() -> None:
    def image(*, shared: bool) -> Holding:
        return Holding(Kind.IMAGE, (1, 2), "", "/a", shared)

    conflicts.require(peers(("domain b", image(shared=True))), "domain a", [image(shared=True)])
    for theirs, mine in ((True, False), (False, True), (False, False)):
        with pytest.raises(errors.Busy, match="/a is in use by domain b"):
            conflicts.require(peers(("domain b", image(shared=theirs))), "domain a", [image(shared=mine)])


def test_twice_in_one_definition() -> None:
    twice = [conflicts.mac("br0", MAC, key, "lab") for key in ("nic[0]", "nic[1]")]
    with pytest.raises(errors.Busy, match=r"\(nic\[1\]\) is in this definition twice"):
        conflicts.require(peers(), "domain a", twice)
    assert len(conflicts.warnings(peers(), "domain a", twice)) == 1


# Domains


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch)
    for directory in (world.paths.etc, world.paths.run, world.paths.log, world.paths.lib):
        os.makedirs(f"{directory}/network")
    monkeypatch.setattr(prerequisites, "dnsmasq", lambda _settings: "/usr/sbin/dnsmasq")
    FakeKernel(world, tmp_path, monkeypatch)
    yield world
    world.close()


@on_loop
async def test_definitions_that_want_the_same(world: World, tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    (tmp_path / "link").symlink_to("disk")

    def disk(name: str) -> str:
        return f'disk = [{{ path = "{tmp_path}/{name}" }}]'

    async with world.daemon() as host:
        await network(world, "lab", 7)
        nic = f'nic = [{{ network = "lab", mac = "{MAC}" }}]'
        assert (await world.define("a", more=f"{disk('disk')}\n{nic}"))["warnings"] == []
        assert (await world.define("a", more=f"{disk('disk')}\n{nic}"))["warnings"] == []
        assert (await world.define("b", more=f"{disk('disk')}\n{nic}"))["warnings"] == [
            f"disk[0]: {tmp_path}/disk is domain a's as well: both can't run at the same time",
            f"nic[0]: MAC address {MAC} in network lab is domain a's as well: both can't run at the same time",
        ]
        await world.define("b")
        await world.define("a", more=disk("disk"))
        await host.domains.start("a", by=ROOT)
        (warning,) = (await world.define("b", more=disk("link")))["warnings"]
        assert warning.startswith(f"disk[0]: {tmp_path}/link is domain a's")
        # Addresses that were made of uuids written by hand.
        for name, last in (("c", "000001"), ("d", "000002")):
            uuid = f'uuid = "00000000-0000-0000-0000-000000{last}"'
            result = await world.define(name, more=f'{uuid}\nnic = [{{ network = "lab" }}, {{ network = "lab" }}]')
        assert [text.partition(" in ")[0] for text in result["warnings"]] == ["nic[0]: MAC address 52:54:00:00:00:02"]


# Networks


async def network(world: World, name: str, second: int, more: str = "", *, check: bool = False) -> list[str]:
    assert world.host is not None
    text = f'name = "{name}"\n[ipv4]\naddress = "10.{second}.0.1/24"\n{more}\n'
    result = await world.host.networks.define(text, "test", check=check, by=ROOT)
    return list(result["warnings"])


def forward(port: int, second: int, protocol: str = "tcp") -> str:
    return f'[[forward]]\nport = {port}\nto = "10.{second}.0.9"\nprotocol = "{protocol}"\n'


@on_loop
async def test_two_networks_that_forward_one_port(world: World) -> None:
    async with world.daemon() as host:
        assert await network(world, "one", 7, forward(8080, 7)) == []
        assert await network(world, "two", 8, forward(8080, 8)) == [
            "forward[0]: tcp port 8080 of the host is network one's as well: both can't run at the same time"
        ]
        await host.networks.start("one", by=ROOT)
        with pytest.raises(errors.Busy, match=r"tcp port 8080 of the host \(forward\[0\]\) is in use by network one"):
            await host.networks.start("two", by=ROOT)
        assert (await host.networks.info("two"))["state"] == "inactive"
        assert await network(world, "two", 8, forward(8080, 8, "udp")) == []
        await host.networks.start("two", by=ROOT)
        # Nor is it put in force while the network is active, and the old definition stays.
        with pytest.raises(errors.Busy, match="is in use by network one"):
            await network(world, "two", 8, forward(8080, 8))
        assert 'protocol = "udp"' in await host.networks.dump("two")
        await host.networks.stop("one", by=ROOT, force=False)
        assert await network(world, "two", 8, forward(8080, 8)) != []
        with pytest.raises(errors.Busy, match="is in use by network two"):
            await host.networks.start("one", by=ROOT)


@on_loop
async def test_a_prefix_that_a_changed_definition_has_left(world: World) -> None:
    async with world.daemon() as host:
        await network(world, "one", 7)
        await host.networks.start("one", by=ROOT)
        await network(world, "one", 8)  # waits for the next start
        await network(world, "two", 8)
        await host.networks.start("two", by=ROOT)
        await host.networks.stop("one", by=ROOT, force=False)
        with pytest.raises(errors.Busy, match=r"overlaps with 10\.8\.0\.0/24 of network two"):
            await host.networks.start("one", by=ROOT)


@on_loop
async def test_a_forward_of_what_the_host_serves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    served = [listening.Served(0, "tcp port 22 of the host is served by sshd", "Do something.")]
    monkeypatch.setattr(listening, "served", lambda forwards: served if forwards and forwards[0].port == 22 else [])
    async with world.daemon() as host:
        assert await network(world, "one", 7, forward(22, 7)) == [
            "forward[0]: tcp port 22 of the host is served by sshd: it can't be started like that"
        ]
        with pytest.raises(errors.Busy, match=r"Cannot start network one: forward\[0\]: tcp port 22") as caught:
            await host.networks.start("one", by=ROOT)
        assert caught.value.hint == "Do something."
        await network(world, "one", 7)
        await host.networks.start("one", by=ROOT)
        with pytest.raises(errors.Busy, match="tcp port 22"):
            await network(world, "one", 7, forward(22, 7))
        # What is in force already is no news, whoever has come to listen there since.
        await network(world, "one", 7, forward(23, 7))
        served[0] = served[0]._replace(text="tcp port 23")
        monkeypatch.setattr(listening, "served", lambda forwards: served if forwards else [])
        await network(world, "one", 7, forward(23, 7) + '[[host]]\nmac = "52:54:00:00:00:02"\nipv4 = "10.7.0.9"\n')


@on_loop
async def test_who_comes_to_serve_what_is_forwarded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """He is a problem while he is there, and said once, however many daemons see him."""
    served: list[listening.Served] = []
    now = [100.0]
    monkeypatch.setattr(listening, "served", lambda _forwards: served)

    async def problems(host: Host) -> list[str]:
        await host.look()
        return [problem["text"] for problem in (await host.networks.info("one"))["problems"]]

    async with world.daemon() as host:
        host.networks.driver._newcomers = Newcomers(clock=lambda: now[0])
        await network(world, "one", 7, forward(22, 7))
        await host.networks.start("one", by=ROOT)
        served.append(listening.Served(0, "tcp port 22 is served by sshd", "Do something.", "tcp", 7))
        said = [
            "forward[0]: tcp port 22 is served by sshd, which nobody reaches from outside while the port is forwarded"
        ]
        assert await problems(host) == said
        assert await problems(host) == said
    async with world.daemon() as host:
        assert [problem.text for problem in host.networks.driver.nets["one"].problems.values()] == said
        assert await problems(host) == said
        assert len(world.told(Message.NETWORK_PORT_SERVED)) == 1
        served.clear()
        assert await problems(host) == []
        # A client's socket isn't there for long, another one has another number.
        host.networks.driver._newcomers = Newcomers(clock=lambda: now[0])
        for inode in (8, 9):
            served[:] = [listening.Served(0, "udp port 22 is served by a client", "", "udp", inode)]
            assert await problems(host) == []
            now[0] += LASTING
        assert len(await problems(host)) == 1
        assert len(world.told(Message.NETWORK_PORT_SERVED)) == 2
    async with world.daemon() as host:
        assert len(await problems(host)) == 1
        assert len(world.told(Message.NETWORK_PORT_SERVED)) == 2
        await network(world, "one", 7)  # forwards nothing any more
        assert await problems(host) == []
        await host.networks.stop("one", by=ROOT, force=False)
        assert await problems(host) == []


@pytest.mark.parametrize(
    ("family", "address", "only6", "kind", "versions"),
    [
        (socket.AF_INET, "0.0.0.0", False, socket.SOCK_STREAM, {4}),
        (socket.AF_INET, "0.0.0.0", False, socket.SOCK_DGRAM, {4}),
        (socket.AF_INET, "127.0.0.1", False, socket.SOCK_STREAM, set()),
        (socket.AF_INET6, "::", False, socket.SOCK_STREAM, {4, 6}),
        (socket.AF_INET6, "::", True, socket.SOCK_STREAM, {6}),
        (socket.AF_INET6, "::", True, socket.SOCK_DGRAM, {6}),
        (socket.AF_INET6, "::1", False, socket.SOCK_STREAM, set()),
        (socket.AF_INET6, "::ffff:127.0.0.1", False, socket.SOCK_STREAM, set()),
    ],
)
def test_sockets_of_this_host(family: int, address: str, *, only6: bool, kind: int, versions: set[int]) -> None:
    with socket.socket(family, kind) as one:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only6))
        try:
            one.bind((address, 0))
        except OSError:
            pytest.skip(f"there is no {address} here")
        port = one.getsockname()[1]
        protocol = Protocol.TCP if kind == socket.SOCK_STREAM else Protocol.UDP
        if protocol is Protocol.TCP:
            assert listening.served([Forward(port, "10.7.0.9"), Forward(port, "fd00::9")]) == [], "it isn't listening"
            one.listen()
        found = listening.served([Forward(port, to, protocol=protocol) for to in ("10.7.0.9", "fd00::9")])
        assert {(4, 6)[served.number] for served in found} == versions
        for served in found:
            assert f"(PID {os.getpid()}" in served.text
        other = Protocol.UDP if protocol is Protocol.TCP else Protocol.TCP
        assert listening.served([Forward(port, "10.7.0.9", protocol=other)]) == []


def test_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several the one that isn't systemd; and virtd's own dnsmasq is nobody's."""
    monkeypatch.setattr(listening, "PROC", str(tmp_path))
    one = listening.Listener("tcp", frozenset({4, 6}), "::", 22, 77)
    monkeypatch.setattr(listening, "listening", lambda: [one])
    process(tmp_path, 1, "systemd", "/init.scope")
    process(tmp_path, 812, "sshd", "/system.slice/ssh.service")
    (served,) = listening.served([Forward(22, "10.7.0.9")])
    assert served.text == "tcp port 22 of the host is served by sshd (PID 812, ssh.service) at [::]:22"
    assert "(systemctl stop ssh.service, and stop its socket unit, which systemctl list-sockets shows)" in served.hint
    (tmp_path / "812/fd/3").unlink()
    (served,) = listening.served([Forward(22, "10.7.0.9")])
    assert "systemctl list-sockets" in served.hint
    process(tmp_path, 900, "dnsmasq", "/virtd.slice/virtd-network.slice/virtd-network-lab.service")
    assert listening.served([Forward(22, "10.7.0.9")]) == []
    for pid in (1, 900):
        (tmp_path / f"{pid}/fd/3").unlink()
    (served,) = listening.served([Forward(22, "10.7.0.9")])
    assert "served by the host itself" in served.text


@pytest.mark.parametrize(
    ("cgroup", "unit", "command"),
    [
        ("/system.slice/ssh.service", "ssh.service", "systemctl stop ssh.service"),
        ("/system.slice/web\\x2d1.service", "web\\x2d1.service", "systemctl stop 'web\\x2d1.service'"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", "user@1000.service", "kill 812"),
        ("/machine.slice/libpod-77.scope/container/system.slice/nginx.service", "libpod-77.scope", "kill 812"),
        ("/system.slice/box.service/system.slice/nginx.service", "box.service", "systemctl stop box.service"),
    ],
)
def test_how_a_listener_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, unit: str, command: str
) -> None:
    """By a command that the host's own systemd, and a shell, take for what is meant."""
    monkeypatch.setattr(listening, "PROC", str(tmp_path))
    monkeypatch.setattr(listening, "listening", lambda: [listening.Listener("tcp", frozenset({4}), "::", 22, 77)])
    process(tmp_path, 812, "nginx", cgroup)
    (served,) = listening.served([Forward(22, "10.7.0.9")])
    assert f"(PID 812, {unit})" in served.text
    assert served.hint == f"Forward another port, or end what listens there ({command})."


def process(root: Path, pid: int, name: str, cgroup: str) -> None:
    (root / f"{pid}/fd").mkdir(parents=True)
    (root / f"{pid}/fd/3").symlink_to("socket:[77]")
    (root / f"{pid}/comm").write_text(f"{name}\n")
    (root / f"{pid}/cgroup").write_text(f"0::{cgroup}\n")


@pytest.mark.parametrize("how", ["hard link", "symbolic link", "linked directory"])
@on_loop
async def test_one_file_by_two_names_in_two_definitions(world: World, tmp_path: Path, how: str) -> None:
    """Neither runs; that both name it is told when the second one is defined, whichever that is."""
    images = tmp_path / "images"
    images.mkdir()
    disk, other = images / "disk.raw", images / "other.raw"
    disk.write_bytes(b"\0" * 512)
    if how == "hard link":
        other.hardlink_to(disk)
    elif how == "symbolic link":
        other.symlink_to(disk)
    else:
        (tmp_path / "link").symlink_to("images")
        other = tmp_path / "link" / "disk.raw"
    async with world.daemon() as host:
        for one, two in ((disk, other), (other, disk)):
            for name, path, readonly in (("web1", one, ""), ("web2", two, ""), ("web3", two, ", readonly = true")):
                text = world.text(name, more=f'disk = [{{ path = "{path}", format = "raw"{readonly} }}]')
                told = (await host.domains.define(text, "-", check=False, by=ROOT))["warnings"]
                where = {"web1": 0, "web2": 1}.get(name, 2)
                assert len(told) == where, told
                assert all("both can't run at the same time" in one for one in told)
                if name == "web2":
                    assert told[0] == (
                        f"disk[0]: {two} is domain web1's as well, as {one}: both can't run at the same time"
                    )
            for name in ("web1", "web2", "web3"):
                await host.domains.undefine(name, by=ROOT)


@on_loop
async def test_disks_that_are_no_files(world: World, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    async with world.daemon() as host:
        for path in (f"{tmp_path}/directory", "/dev/null"):
            text = world.text("web1", more=f'disk = [{{ path = "{path}", format = "raw" }}]')
            told = (await host.domains.define(text, "-", check=False, by=ROOT))["warnings"]
            assert told == [f"disk[0].path: expected a regular file: {path}"]
