# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stand-in for what networks use of the kernel: interfaces as sysfs shows them, and nftables' tables.

tests/live/test_networks.py asks the real one. Like PID 1's stand-in it outlives the daemon, and tells the world of
each change before it takes effect, so that a test may cut the daemon off there.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import re
import threading
from shutil import rmtree  # the real one: a step of somebody else's is none of the daemon's
from typing import TYPE_CHECKING, Any

from virtd.drivers.network import (
    bridge,
    bridgedrift,
    firewall,
    firewalld,
    guard,
    isolation,
    links,
    listening,
    prerequisites,
    prober,
    wanted,
)
from virtd.drivers.network.kernel import Address, Link, LinkChanged, Way
from virtd.drivers.network.netlink import NetlinkError
from virtd.drivers.network.rtnetlink import RoutingRule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path
    from typing import Self

    import pytest

    from tests.doubles.whole_host import World
    from virtd.drivers.network.kernel import Change


class FakeKernel:
    """`tables` has each network's table: its text, and a number that no other has, as the kernel's handles are."""

    def __init__(self, world: World, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.sysfs = root / "sysfs"
        self.sysfs.mkdir()
        self.aside = root / "aside"  # what isn't whole, for all there is in sysfs comes and goes at once
        self.aside.mkdir()
        self.lock = threading.RLock()  # held while something is changed
        self.tables: dict[str, tuple[str, int]] = {}
        self.bridge_tables: dict[str, tuple[str, int]] = {}
        self.addresses: dict[str, set[Address]] = {}
        self.routing: set[RoutingRule] = set()  # rules of policy routing
        self.routes: dict[str, Way | None] = {}  # by address, where it isn't the bridge with its prefix
        self.values: dict[str, dict[str, int]] = {}  # by interface, see kernel.Link
        self.neighbours: set[tuple[str, str]] = set()
        self.refused = ""  # a table that can't be made
        self._numbers = 0
        self.index = 1  # of the interface that was made last
        self.told: Callable[[str, int], None] = lambda _name, _index: None  # of an interface that was changed
        self.between: Callable[[], None] = lambda: None  # somebody else's turn, while virtd looks and changes
        self.watches: list[FakeWatch] = []
        monkeypatch.setattr(links, "CLASS", str(self.sysfs))
        monkeypatch.setattr(prerequisites, "PROC", str(root / "proc"))
        monkeypatch.setattr(bridge, "Netlink", lambda: FakeNetlink(self))
        monkeypatch.setattr(isolation, "Kernel", lambda: FakeNetlink(self))
        monkeypatch.setattr(listening, "listening", list)  # the host that the tests run on serves what it likes
        monkeypatch.setattr(bridgedrift, "checksums", lambda _name: None)
        monkeypatch.setattr(wanted, "Kernel", lambda: FakeNetlink(self))
        monkeypatch.setattr(firewall, "_run", self._nft)
        monkeypatch.setattr(guard, "Watch", lambda table, change: FakeWatch(self, table, change))
        monkeypatch.setattr(links, "make_tap", self._make_tap)
        monkeypatch.setattr(guard.Guard, "_follow_firewalld", _nothing)
        monkeypatch.setattr(firewalld, "adopt", _nothing)
        monkeypatch.setattr(prober, "QUIET", 1000.0)  # what is noted later would be a step at some time or other
        monkeypatch.setattr(prober, "_find", lambda _ground, _over: [])
        self.generation = 1
        monkeypatch.setattr(prober, "_generation", lambda: self.generation)

    # Interfaces, as anybody may change them

    def make(self, name: str, mac: str, *files: str) -> None:
        """Make an interface; a bridge has the directories "bridge" and "brif", a tap the file "tun_flags"."""
        for file in files:
            (self.aside / name / file).mkdir(parents=True)
        self.index += 1
        for file, text in (
            ("address", mac), ("flags", "0x1002"), ("mtu", "1500"), ("ifalias", ""), ("ifindex", str(self.index)),
        ):  # fmt: skip
            (self.aside / name / file).write_text(f"{text}\n")
        self.addresses[name] = set()
        os.rename(self.aside / name, self.sysfs / name)
        self.told(name, self.index)

    def _make_tap(self, name: str, _uid: int) -> None:
        if not links.exists(name):
            self.make(name, "fa:00:00:00:00:01", "tun_flags")

    def make_bridge(self, name: str, mac: str) -> None:
        self.make(name, mac, "bridge", "brif")

    def write(self, name: str, file: str, text: str) -> None:
        (self.aside / file).write_text(f"{text}\n")
        os.rename(self.aside / file, self.sysfs / name / file)
        if file == "address":  # a bridge keeps to itself what is sent to the address of a port
            self.neighbours -= {(port, mac) for port, mac in self.neighbours if mac == text and port != name}
        self.told(name, self.number(name))

    def connect(self, name: str, bridge: str) -> None:
        """Put an interface into a bridge, or out of all by ""."""
        if links.master(name) != bridge:
            self.neighbours -= {one for one in self.neighbours if one[0] == name}
            self._into(name, bridge)
        self.told(name, self.number(name))

    def _into(self, name: str, bridge: str) -> None:
        path = self.sysfs / name / "master"
        if bridge:
            (self.aside / "master").symlink_to(self.sysfs / bridge)
            os.rename(self.aside / "master", path)
        else:
            path.unlink()

    def number(self, name: str) -> int:
        return int(links.read(name, "ifindex") or 0)

    def rename(self, name: str, new: str) -> None:
        """Nobody is told of the old name."""
        ports = self.ports(name)
        os.rename(self.sysfs / name, self.sysfs / new)
        self.addresses[new] = self.addresses.pop(name)
        for port in ports:
            self._into(port, new)
        self.told(new, self.number(new))

    def delete(self, name: str) -> None:
        for port in self.ports(name):
            self.connect(port, "")
        number = self.number(name)
        os.rename(self.sysfs / name, self.aside / name)
        rmtree(self.aside / name)
        self.addresses.pop(name, None)
        self.neighbours -= {one for one in self.neighbours if one[0] == name}
        self.told(name, number)

    def ports(self, bridge: str) -> list[str]:
        return [name for name in links.all_names() if links.master(name) == bridge]

    def _nft(self, command: str, *, as_json: bool = False) -> str:
        families = {"inet": self.tables, "bridge": self.bridge_tables}
        if as_json and (match := re.fullmatch(r"list tables (\S+)", command)):
            named = ({"table": {"name": name}} for name in families[match[1]])
            return json.dumps({"nftables": [{"metainfo": {}}, *named]})
        if as_json:
            match = re.fullmatch(r"list table (inet|bridge) (\S+)", command)
            if match is None:  # "list chains"
                return json.dumps({"nftables": []})
            if match[2] not in families[match[1]]:
                raise firewall.NftError("nftables refused: No such file or directory")
            text, number = families[match[1]][match[2]]
            return json.dumps({"nftables": [{"metainfo": {}}, {"table": {"handle": number, "text": text}}]})
        deleted = re.findall(r"^delete table (\S+) (\S+)$", command, re.MULTILINE)
        names = list(dict.fromkeys(name for _family, name in deleted))
        self.world.step(f"nft {' '.join(names)}")
        if self.refused in names:
            raise firewall.NftError("nftables refused: these rules")
        for family, name in deleted:
            families[family].pop(name, None)
            made = re.search(rf"^table {family} {re.escape(name)} .*?^}}$", command, re.MULTILINE | re.DOTALL)
            if made:
                self._numbers += 1
                families[family][name] = made[0], self._numbers
        return ""


class FakeNetlink:
    """What networks call of Netlink and Kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.numbers: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    @contextlib.contextmanager
    def _change(self, name: str, step: str) -> Iterator[str]:
        """Change an interface; the name that it has by now."""
        self.kernel.between()
        self.kernel.world.step(f"{step} {name}")
        with self.kernel.lock:
            yield self._name(name)

    def _name(self, name: str) -> str:
        for one in links.all_names():
            if one == name if name not in self.numbers else self.kernel.number(one) == self.numbers[name]:
                return one
        raise NetlinkError(errno.ENODEV, f"no interface {name}")

    def add_bridge(self, name: str, mac: str) -> None:
        self.kernel.between()
        self.kernel.world.step(f"add_bridge {name}")
        with self.kernel.lock:
            if links.exists(name):
                raise NetlinkError(errno.EEXIST, "File exists")
            self.kernel.make_bridge(name, mac)

    def set_link(self, name: str, **changes: Any) -> None:
        with self._change(name, "set_link") as now:
            files = {"alias": "ifalias", "mtu": "mtu", "mac": "address"}
            for key, file in files.items():
                if changes.get(key) is not None:
                    self.kernel.write(now, file, str(changes[key]))
            if changes.get("up") or changes.get("arp"):
                self.kernel.write(now, "flags", "0x1003")
            if (master := changes.get("master")) is not None:
                self.kernel.connect(now, self._name(master) if master else "")

    def set_port(self, name: str, *, isolated: bool, locked: bool) -> None:
        with self._change(name, f"set_port {isolated:d} {locked:d}"):
            pass

    def add_neighbour_of_port(self, name: str, mac: str) -> None:
        with self._change(name, f"add_neighbour {mac}") as now:
            self.kernel.neighbours = {one for one in self.kernel.neighbours if one[1] != mac} | {(now, mac)}

    def links(self, names: Collection[str]) -> dict[str, Link]:
        found = {}
        with self.kernel.lock:
            for name in set(links.all_names()) & set(names):
                flags = int(links.read(name, "flags") or "0", 16)
                up = bool(flags & 1)
                kind = "bridge" if links.is_bridge(name) else "tun"
                alias, values = (
                    links.read(name, "ifalias"),
                    self.kernel.values.get(name, {}) | {"arp": int(not flags & 0x80)},
                )
                above, number = links.master(name), self.kernel.number(name)
                found[name] = Link(number, name, kind, up, up, links.mtu(name), links.mac(name), alias, above, values)
        self.numbers = {name: link.number for name, link in found.items()}
        self.kernel.between()
        return found

    def all_addresses(self, numbers: dict[int, str]) -> dict[str, set[Address]]:
        with self.kernel.lock:
            return {name: set(self.kernel.addresses.get(name, ())) for name in numbers.values()}

    def neighbours_of_ports(self, _numbers: dict[int, str]) -> set[tuple[str, str]]:
        return set(self.kernel.neighbours)

    def route_to(self, address: str) -> Way | None:
        if address in self.kernel.routes:
            return self.kernel.routes[address]
        one = ipaddress.ip_address(address)
        for name, addresses in list(self.kernel.addresses.items()):
            for there in addresses:
                prefix = ipaddress.ip_network(f"{there.address}/{there.prefix}", strict=False)
                if one in prefix:
                    return Way(str(prefix), name, 254)
        return None

    def delete_link(self, name: str) -> bool:
        with self._change(name, "delete_link") as now:
            self.kernel.delete(now)
        return True

    def add_address(self, name: str, address: str, prefix: int) -> None:
        with self._change(name, "add_address") as now:
            self.kernel.addresses[now].add(Address(address, prefix))

    def delete_address(self, name: str, address: str, prefix: int) -> None:
        with self._change(name, "delete_address") as now:
            self.kernel.addresses[now].discard(Address(address, prefix))

    def routing_rules(self, _protocol: int) -> set[RoutingRule]:
        return set(self.kernel.routing)

    def add_routing_rule(self, rule: RoutingRule, _protocol: int) -> None:
        self.kernel.world.step(f"add rule {rule.version} {rule.priority} {rule.iif} {rule.to}")
        self.kernel.routing.add(rule)

    def delete_routing_rule(self, rule: RoutingRule, _protocol: int) -> None:
        self.kernel.world.step(f"delete rule {rule.version} {rule.priority} {rule.iif} {rule.to}")
        self.kernel.routing.remove(rule)


class FakeWatch:
    """Reports what a test has it report, by `table`, `change` and `link`."""

    def __init__(self, kernel: FakeKernel, table: Callable[[str], None], change: Callable[[Change], None]) -> None:
        self.table, self.change = table, change
        kernel.watches.append(self)
        self._watches = kernel.watches

    def link(self, name: str, number: int) -> None:
        self.change(LinkChanged(name, number))

    def close(self) -> None:
        self._watches.remove(self)


async def _nothing(*_arguments: object) -> None:
    pass
