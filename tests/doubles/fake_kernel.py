# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stand-in for what networks use of the kernel: interfaces as sysfs shows them, and nftables' tables.

tests/live/test_networks.py asks the real one. Like PID 1's stand-in it outlives the daemon, and tells the world of
each change before it takes effect, so that a test may cut the daemon off there.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

from virtd.drivers.network import (
    bridge,
    firewall,
    firewalld,
    guard,
    host,
    isolation,
    links,
    listening,
    prober,
    wanted,
)
from virtd.drivers.network.kernel import Link, Way
from virtd.drivers.network.netlink import Address, RoutingRule

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path
    from typing import Self

    import pytest

    from tests.doubles.whole_host import World


class FakeKernel:
    """`tables` has each network's table: its text, and a number that no other has, as the kernel's handles are."""

    def __init__(self, world: World, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.sysfs = root / "sysfs"
        self.sysfs.mkdir()
        self.tables: dict[str, tuple[str, int]] = {}
        self.bridge_tables: dict[str, tuple[str, int]] = {}
        self.addresses: dict[str, set[Address]] = {}
        self.routing: set[RoutingRule] = set()  # rules of policy routing
        self.routes: dict[str, Way] = {}  # by address, where it isn't the bridge with its prefix
        self.values: dict[str, dict[str, int]] = {}  # by interface, see kernel.Link
        self.neighbours: set[tuple[str, str]] = set()
        self.refused = ""  # a table that can't be made
        self._numbers = 0
        monkeypatch.setattr(links, "CLASS", str(self.sysfs))
        monkeypatch.setattr(host, "PROC", str(root / "proc"))
        monkeypatch.setattr(bridge, "Netlink", lambda: FakeNetlink(self))
        monkeypatch.setattr(isolation, "Netlink", lambda: FakeNetlink(self))
        monkeypatch.setattr(listening, "listening", list)  # the host that the tests run on serves what it likes
        monkeypatch.setattr(wanted, "checksums", lambda _name: None)
        monkeypatch.setattr(wanted, "Kernel", lambda: FakeNetlink(self))
        monkeypatch.setattr(firewall, "_run", self._nft)
        monkeypatch.setattr(guard, "Watch", lambda *_calls: FakeWatch())
        monkeypatch.setattr(guard.Guard, "_follow_firewalld", _nothing)
        monkeypatch.setattr(firewalld, "adopt", _nothing)
        monkeypatch.setattr(prober, "SETTLE", 1000.0)  # what is noted later would be a step at some time or other
        monkeypatch.setattr(prober, "_find", lambda _ground, _over: [])
        self.generation = 1
        monkeypatch.setattr(prober, "_generation", lambda: self.generation)

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
    """What networks call of Netlink, and of Kernel."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def add_bridge(self, name: str, mac: str) -> None:
        self.kernel.world.step(f"add_bridge {name}")
        for directory in ("bridge", "brif"):
            (self.kernel.sysfs / name / directory).mkdir(parents=True)
        for file, text in (("address", mac), ("flags", "0x1002"), ("mtu", "1500"), ("ifalias", "")):
            (self.kernel.sysfs / name / file).write_text(f"{text}\n")
        self.kernel.addresses[name] = set()

    def set_link(self, name: str, **changes: Any) -> None:
        self.kernel.world.step(f"set_link {name}")
        files = {"alias": "ifalias", "mtu": "mtu", "mac": "address"}
        for key, file in files.items():
            if changes.get(key) is not None:
                (self.kernel.sysfs / name / file).write_text(f"{changes[key]}\n")
        if changes.get("up"):
            (self.kernel.sysfs / name / "flags").write_text("0x1003\n")

    def set_port(self, name: str, *, isolated: bool, locked: bool) -> None:
        self.kernel.world.step(f"set_port {name} {isolated:d} {locked:d}")

    def add_neighbour_of_port(self, name: str, mac: str) -> None:
        self.kernel.world.step(f"add_neighbour {name} {mac}")
        self.kernel.neighbours.add((name, mac))

    def links(self, names: Collection[str]) -> dict[str, Link]:
        found = {}
        for number, path in enumerate(sorted(self.kernel.sysfs.iterdir()), 2):
            name = path.name
            up = bool(int(links.read(name, "flags") or "0", 16) & 1)
            if name in names:
                kind = "bridge" if links.is_bridge(name) else "tun"
                alias, values = links.read(name, "ifalias"), self.kernel.values.get(name, {})
                above = links.master(name)
                found[name] = Link(number, name, kind, up, up, links.mtu(name), links.mac(name), alias, above, values)
        return found

    def all_addresses(self, numbers: dict[int, str]) -> dict[str, set[Address]]:
        return {name: set(self.kernel.addresses.get(name, ())) for name in numbers.values()}

    def neighbours_of_ports(self, _numbers: dict[int, str]) -> set[tuple[str, str]]:
        return self.kernel.neighbours

    def route_to(self, address: str) -> Way | None:
        if address in self.kernel.routes:
            return self.kernel.routes[address]
        one = ipaddress.ip_address(address)
        for name, addresses in self.kernel.addresses.items():
            for there in addresses:
                prefix = ipaddress.ip_network(f"{there.address}/{there.prefix}", strict=False)
                if one in prefix:
                    return Way(str(prefix), name, 254)
        return None

    def delete_link(self, name: str) -> bool:
        shutil.rmtree(self.kernel.sysfs / name)  # which is a step of its own
        return True

    def add_address(self, name: str, address: str, prefix: int) -> None:
        self.kernel.world.step(f"add_address {name}")
        self.kernel.addresses[name].add(Address(address, prefix))

    def delete_address(self, name: str, address: str, prefix: int) -> None:
        self.kernel.world.step(f"delete_address {name}")
        self.kernel.addresses[name].remove(Address(address, prefix))

    def routing_rules(self, _protocol: int) -> set[RoutingRule]:
        return set(self.kernel.routing)

    def add_routing_rule(self, rule: RoutingRule, _protocol: int) -> None:
        self.kernel.world.step(f"add rule {rule.version} {rule.priority} {rule.iif} {rule.to}")
        self.kernel.routing.add(rule)

    def delete_routing_rule(self, rule: RoutingRule, _protocol: int) -> None:
        self.kernel.world.step(f"delete rule {rule.version} {rule.priority} {rule.iif} {rule.to}")
        self.kernel.routing.remove(rule)


class FakeWatch:
    """Tells nothing."""

    def close(self) -> None:
        pass


async def _nothing(*_arguments: object) -> None:
    pass
