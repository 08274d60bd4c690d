# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of each network: one table of nftables' that is ours alone, replaced in one transaction.

Nothing outside of it is written, and read only to see what drops guests' packets. A table's text is made here and
handed to libnftables, in this process: `nft` would be a child for every change, with the same library in it.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import errors
from ...model.network import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...model.network import Network

FAMILY = "inet"
PREFIX = "virtd-"

# At the usual places ("dstnat" is -100, which nft 1.0 doesn't take by that name for output). Among base chains at
# one hook a packet has to pass all of them: what another table drops stays dropped.
_FORWARD = "type filter hook forward priority filter; policy accept;"
_INPUT = "type filter hook input priority filter; policy accept;"
_REJECT = "reject with icmpx type admin-prohibited"

_lock = threading.Lock()  # libnftables(3) says nothing about threads; one at a time costs little
_library: Any = None


class NftError(errors.HostError):
    """nftables refused; the message has its own words."""


def table(name: str) -> str:
    """The table of the network `name`."""
    return f"{PREFIX}{name}"


def is_ours(table: str) -> bool:
    return table.startswith(PREFIX)


def rules(network: Network) -> str:
    """The commands that put the network's table in place of what there was, all at once."""
    name = f"{FAMILY} {table(network.name)}"
    chains = [_chain("forward", _FORWARD, _forward(network))]
    if network.mode is Mode.ISOLATED:
        chains.append(_chain("input", _INPUT, _input(network)))
    if network.mode is Mode.NAT:
        chains.append(
            _chain("postrouting", "type nat hook postrouting priority srcnat; policy accept;", _masquerade(network))
        )
        if network.forward:
            for hook in ("prerouting", "output"):
                place = f"type nat hook {hook} priority -100; policy accept;"
                chains.append(_chain(hook, place, _dnat(network, hook)))
    body = "\n".join(chains)
    # To delete a table that isn't there fails, so it is added first: a no-operation where it is.
    return f"add table {name}\ndelete table {name}\ntable {name} {{\n{body}\n}}\n"


def removal(name: str) -> str:
    return f"add table {FAMILY} {table(name)}\ndelete table {FAMILY} {table(name)}\n"


def _chain(name: str, place: str, lines: list[str]) -> str:
    return "\n".join([f"\tchain {name} {{", f"\t\t{place}", *(f"\t\t{line}" for line in lines), "\t}"])


def _subnets(network: Network) -> list[tuple[str, Any]]:
    """nftables' word for the family, and the prefix."""
    return [("ip" if subnet.version == 4 else "ip6", subnet) for _key, subnet in network.subnets()]


def _forward(network: Network) -> list[str]:
    bridge = f'"{network.bridge_name}"'
    # With br_netfilter in the kernel, what goes from one guest to the other comes by here as well.
    lines = [f"iifname {bridge} oifname {bridge} accept"]
    if network.mode is not Mode.ISOLATED:
        for word, subnet in _subnets(network):
            lines.append(f"iifname {bridge} {word} saddr {subnet} accept")
        if network.mode is Mode.ROUTED:
            lines += [f"oifname {bridge} {word} daddr {subnet} accept" for word, subnet in _subnets(network)]
        else:
            lines.append(f"oifname {bridge} ct state established,related accept")
            for forward in network.forward:
                word = "ip6" if ":" in forward.to else "ip"
                to = f"{word} daddr {forward.to} {forward.protocol} dport {forward.to_port or forward.port}"
                lines.append(f"oifname {bridge} {to} ct status dnat accept")
    return [*lines, f"iifname {bridge} {_REJECT}", f"oifname {bridge} {_REJECT}"]


def _input(network: Network) -> list[str]:
    """What guests of an isolated network may say to the host: to ask for a lease and for names, and to ping it.

    All of it to the addresses of their own bridge only: behind the host's others, and those of its other bridges, may
    be a DNS server that asks the whole world.
    """
    bridge = f'"{network.bridge_name}"'
    own = "fib daddr . iif type"
    return [
        f"iifname != {bridge} accept",
        "ct state established,related accept",
        f"meta l4proto {{ tcp, udp }} th dport 53 {own} local accept",
        f"udp dport {{ 67, 547 }} {own} {{ local, broadcast, multicast }} accept",
        # ICMP and ICMPv6 by number: old nfts look their names up in /etc/protocols, which not every host has.
        f"meta l4proto {{ 1, 58 }} {own} {{ local, broadcast, multicast }} accept",
        _REJECT,
    ]


def _masquerade(network: Network) -> list[str]:
    """Everything that leaves the subnet for elsewhere gets the host's address; not what is said to all neighbours."""
    lines = []
    for word, subnet in _subnets(network):
        local = "{ 224.0.0.0/24, 255.255.255.255 }" if word == "ip" else "ff00::/8"
        lines.append(f"{word} saddr {subnet} {word} daddr {local} return")
        lines.append(f'oifname != "{network.bridge_name}" {word} saddr {subnet} {word} daddr != {subnet} masquerade')
    return lines


def _dnat(network: Network, hook: str) -> list[str]:
    lines = []
    for forward in network.forward:
        word = "ip6" if ":" in forward.to else "ip"
        port = forward.to_port or forward.port
        to = f"[{forward.to}]:{port}" if word == "ip6" else f"{forward.to}:{port}"
        # Only what is meant for the host itself: a guest's call to port 443 of some server isn't.
        condition = f"fib daddr type local meta nfproto {'ipv6' if word == 'ip6' else 'ipv4'}"
        if hook == "output":
            # A packet from 127.0.0.1 can't leave the host.
            condition += f" {word} daddr != {'::1' if word == 'ip6' else '127.0.0.0/8'}"
        lines.append(f"{condition} {forward.protocol} dport {forward.port} dnat {word} to {to}")
    return lines


# Carried out: each of these blocks, for a millisecond or so


def replace(*networks: Network) -> list[str]:
    """Put the networks' rules in place of what there is, all of them or none; their marks. Raises NftError.

    The kernel waits at the end of each transaction: for many networks one takes a tenth of the time.
    """
    _run("".join(map(rules, networks)))
    return [mark(network.name) for network in networks]


def remove(name: str) -> None:
    """Remove the table of a network, if it is there. Raises NftError."""
    _run(removal(name))


def mark(name: str) -> str:
    """What tells a network's rules from all others: a checksum of them as the kernel lists them, handles included.

    Two that are equal are the same rules, not only alike. "" when there is no table.
    """
    import zlib

    found = listing(name)
    return f"{zlib.crc32(found.encode()):08x}" if found else ""


def marks(names: Iterable[str]) -> dict[str, str]:
    """The marks of many. After a flush none of them is there, which one question tells."""
    there = tables()
    return {name: mark(name) if name in there else "" for name in names}


def listing(name: str) -> str:
    """The network's table as the kernel has it, as JSON; "" when there is none."""
    try:
        found = _listed(f"table {FAMILY} {table(name)}")
    except NftError:
        return ""
    return json.dumps([item for item in found if "metainfo" not in item], sort_keys=True)


def tables() -> list[str]:
    """The networks that have a table. Raises NftError."""
    named = [item["table"]["name"] for item in _listed(f"tables {FAMILY}") if "table" in item]
    return [name.removeprefix(PREFIX) for name in named if is_ours(name)]


class Dropper(NamedTuple):
    """A chain of other people's that drops by policy what is forwarded.

    Nothing in a table of ours overrules that: a packet is through when all tables have let it through.
    """

    family: str
    table: str
    chain: str
    docker: bool

    def hint(self, bridge: str) -> str:
        """The commands that have it let through what guests send, and the answers."""
        if self.docker:
            tool = "ip6tables" if self.family == "ip6" else "iptables"
            answers = "-m conntrack --ctstate RELATED,ESTABLISHED"
            rules = f"-i {bridge} -j ACCEPT", f"-o {bridge} {answers} -j ACCEPT"
            return "; ".join(f"{tool} -I DOCKER-USER {rule}" for rule in rules)
        rules = f"iifname {bridge} accept", f"oifname {bridge} ct state related,established accept"
        return "; ".join(f"nft insert rule {self.family} {self.table} {self.chain} {rule}" for rule in rules)


def droppers(bridges: Iterable[str]) -> dict[str, list[Dropper]]:
    """By bridge: those that no rule beside theirs has let it through. Raises NftError."""
    found: dict[str, list[Dropper]] = {bridge: [] for bridge in bridges}
    chains = [item["chain"] for item in _listed("chains") if "chain" in item]
    for chain in chains:
        if chain.get("hook") != "forward" or chain.get("policy") != "drop":
            continue
        family, name = chain["family"], chain["table"]
        docker = any((one["family"], one["table"], one["name"]) == (family, name, "DOCKER-USER") for one in chains)
        accepted = {pair for item in _listed(f"table {family} {name}") for pair in _accepted(item)}
        for bridge, mine in found.items():
            if not {("iifname", bridge), ("oifname", bridge)} <= accepted:
                mine.append(Dropper(family, name, chain["name"], docker))
    return found


def _accepted(item: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """("iifname", bridge) for a rule that accepts what comes from there, in whatever circumstances; or "oifname"."""
    expressions = item.get("rule", {}).get("expr", [])
    if any("accept" in expression for expression in expressions):
        for match in (expression["match"] for expression in expressions if "match" in expression):
            if isinstance(match["left"], dict) and isinstance(match["right"], str):
                yield match["left"].get("meta", {}).get("key", ""), match["right"]


def _listed(what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_run(f"list {what}", as_json=True))["nftables"]
    return found


def _run(command: str, *, as_json: bool = False) -> str:
    global _library
    with _lock:
        if _library is None:
            try:
                import nftables
            except ImportError as exc:
                raise NftError(
                    f"nftables for Python is missing: {exc}", hint="Install python3-nftables (and nftables)."
                ) from exc
            _library = nftables.Nftables()
            _library.set_handle_output(True)
        _library.set_json_output(as_json)
        status, answer, complaint = _library.cmd(command)
    if status:
        lines = [line for line in complaint.splitlines() if line.startswith("Error") or ": Error: " in line]
        raise NftError(f"nftables refused: {'; '.join(lines) or complaint.strip()}")
    return str(answer)
