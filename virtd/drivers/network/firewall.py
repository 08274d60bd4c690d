# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of each network: two tables of nftables' that are ours alone, replaced in one transaction.

`inet virtd-NAME` is for what the host forwards and takes in, `bridge virtd-NAME` for what its bridge does, see
ethernet.py. Nothing outside of them is written. A table's text is made here and handed to libnftables, in this
process: `nft` would be a child for every change, with the same library in it.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ... import errors
from ...model.network import Mode
from . import ethernet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Network
    from .ports import Ground

FAMILY = "inet"
PREFIX = "virtd-"
PROBE = "virtd_probe"  # probe.py's, and no network's

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


def rules(ground: Ground, kept: dict[str, list[str]] | None = None) -> str:
    """The commands that replace the network's tables in one transaction. `kept`: see ethernet.py."""
    own = _inet(ground) if ground.network.own else ""
    return own + ethernet.rules(ground, table(ground.network.name), kept or {})


def _inet(ground: Ground) -> str:
    network = ground.network
    name = f"{FAMILY} {table(network.name)}"
    members = ", ".join(f'"{port.interface}"' for port in ground.ports)
    chains = [
        f"\tset members {{ type ifname; {f'elements = {{ {members} }}' if members else ''} }}",
        # The kernel hands to the host itself, and past the bridge, what is sent to 01:80:C2:00:00:0E and its like.
        _chain("arriving", "type filter hook prerouting priority raw; policy accept;", ["iifname @members drop"]),
        _chain("forward", _FORWARD, _forward(network, ground.mac)),
    ]
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


def made_of(ground: Ground) -> str:
    """A checksum of the rules as they are written, to know those of another version or of other ports. (What others
    put into a bridge of the host's, and take out, is looked at when there is another reason.)
    """
    import zlib

    return f"{zlib.crc32(rules(ground._replace(others=())).encode()):08x}"


def removal(name: str) -> str:
    return "".join(
        f"add table {family} {table(name)}\ndelete table {family} {table(name)}\n"
        for family in (FAMILY, ethernet.FAMILY)
    )


def _chain(name: str, place: str, lines: list[str]) -> str:
    return "\n".join([f"\tchain {name} {{", f"\t\t{place}", *(f"\t\t{line}" for line in lines), "\t}"])


def _subnets(network: Network) -> list[tuple[str, Any]]:
    """nftables' word for the family, and the prefix."""
    return [("ip" if subnet.version == 4 else "ip6", subnet) for _key, subnet in network.subnets()]


def _forward(network: Network, mac: str) -> list[str]:
    bridge = f'"{network.bridge_name}"'
    lines = []
    if network.isolated_ports:
        # Neighbours don't reach each other by way of the host either, but for what a [[forward]] leads to.
        lines.append(f"iifname {bridge} oifname {bridge} ct status dnat accept")
        lines.append(f"iifname {bridge} oifname {bridge} ether daddr {mac} {_REJECT}")
    # With br_netfilter in the kernel, what goes from one guest to the other comes by here as well.
    lines.append(f"iifname {bridge} oifname {bridge} accept")
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
    """What guests of an isolated network may send to the host: requests for a lease and for names, and pings.

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
    """Everything that leaves the subnet for elsewhere gets the host's address; not what is said to all neighbours.

    So does what a guest sends to another one, or to itself, by way of a forwarded port: else the answer would come
    back without the host, from an address that nobody has asked.
    """
    bridge = network.bridge_name
    lines = []
    for word, subnet in _subnets(network):
        if network.forward:
            lines.append(f'oifname "{bridge}" {word} saddr {subnet} {word} daddr {subnet} ct status dnat masquerade')
        local = "{ 224.0.0.0/24, 255.255.255.255 }" if word == "ip" else "ff00::/8"
        lines.append(f"{word} saddr {subnet} {word} daddr {local} return")
        lines.append(f'oifname != "{bridge}" {word} saddr {subnet} {word} daddr != {subnet} masquerade')
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


def replace(*grounds: Ground) -> list[Marks]:
    """Replace the rules of these networks, all or none, and return their marks. Raises NftError.

    The kernel waits at the end of each transaction: for many networks one takes a tenth of the time.
    """
    text = []
    for ground in grounds:
        items = _items(ethernet.FAMILY, ground.network.name)
        text.append(rules(ground, ethernet.filled(items, (port.interface for port in ground.ports))))
    _run("".join(text))
    return [mark(ground.network.name) for ground in grounds]


def remove(name: str) -> None:
    """Remove the tables of a network, if they are there. Raises NftError."""
    _run(removal(name))


class Marks(NamedTuple):
    """What identifies a network's tables: checksums of them as the kernel lists them, handles included.

    Equal marks mean the very same rules, not only rules that look alike. "" where there is no table.
    """

    inet: str
    bridge: str


def mark(name: str) -> Marks:
    import zlib

    def of(family: str) -> str:
        found = listing(name, family)
        return f"{zlib.crc32(found.encode()):08x}" if found else ""

    return Marks(of(FAMILY), of(ethernet.FAMILY))


def marks(names: Iterable[str]) -> dict[str, Marks]:
    """The marks of many networks. After a flush all are missing, which a single query shows."""
    there = tables()
    return {name: mark(name) if name in there else Marks("", "") for name in names}


def listing(name: str, family: str = FAMILY) -> str:
    """The network's table as the kernel has it, as JSON, without what the kernel itself fills in; "" for none."""
    items = _items(family, name)
    for item in items:
        if (found := item.get("set")) is not None and found["name"] in ethernet.FILLED:
            for key in ("elem", "count"):  # how many there are nft 1.1.7 tells, if not earlier
                found.pop(key, None)
    return json.dumps(items, sort_keys=True) if items else ""


def refused(name: str) -> dict[str, int]:
    """How many frames of each interface were refused by the rules on the bridge."""
    found = {}
    for element in ethernet.filled(_items(ethernet.FAMILY, name), [], all_of_them=True).get("dropped", []):
        interface, _, counter = element.partition(" counter packets ")
        found[interface.strip('"')] = int(counter.split()[0]) if counter else 0
    return found


def _items(family: str, name: str) -> list[dict[str, Any]]:
    try:
        found = _listed(f"table {family} {table(name)}")
    except NftError:
        return []
    return [item for item in found if "metainfo" not in item]


def tables() -> list[str]:
    """The networks that have a table of either kind. Raises NftError."""
    named = [
        item["table"]["name"]
        for family in (FAMILY, ethernet.FAMILY)
        for item in _listed(f"tables {family}")
        if "table" in item
    ]
    return [name.removeprefix(PREFIX) for name in dict.fromkeys(named) if is_ours(name)]


def chains() -> list[dict[str, Any]]:
    """All chains of everybody's, as nft(8) describes them in JSON. Raises NftError."""
    return [item["chain"] for item in _listed("chains") if "chain" in item]


def rule(family: str, table: str, chain: str, handle: int) -> str:
    """A rule in nft's own words; "" when it no longer exists or nft can't print it."""
    try:
        lines = _run(f"list chain {family} {table} {chain}", counters=False).splitlines()
    except NftError:
        return ""
    return next(
        (line.partition(" # handle ")[0].strip() for line in lines if line.endswith(f" # handle {handle}")), ""
    )


def _listed(what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_run(f"list {what}", as_json=True))["nftables"]
    return found


class Owning:
    """A handle for tables with the flag "owner", which vanish when it is closed or this process dies."""

    def __init__(self) -> None:
        """Raises NftError."""
        self._library = _open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with _lock:
            self._library = None  # which closes its socket

    def run(self, command: str) -> None:
        """Raises NftError."""
        _run(command, library=self._library)


def _open() -> Any:
    try:
        import nftables
    except ImportError as exc:
        raise NftError(
            f"nftables for Python is missing: {exc}", hint="Install python3-nftables (and nftables)."
        ) from exc
    library = nftables.Nftables()
    library.set_handle_output(True)
    return library


def _run(command: str, *, as_json: bool = False, counters: bool = True, library: Any = None) -> str:
    global _library
    with _lock:
        if library is None:
            if _library is None:
                _library = _open()
            library = _library
        library.set_json_output(as_json)
        library.set_stateless_output(not counters)
        status, answer, complaint = library.cmd(command)
    if status:
        lines = [line for line in complaint.splitlines() if line.startswith("Error") or ": Error: " in line]
        raise NftError(f"nftables refused: {'; '.join(lines) or complaint.strip()}")
    return str(answer)
