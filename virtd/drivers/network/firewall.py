# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of each network: two nftables tables that belong to us alone, replaced in one transaction.

`inet virtd-NAME` governs what the host forwards and accepts, `bridge virtd-NAME` what the network's bridge does, see
ethernet.py. Nothing outside of them is written. A table's text is built here and handed to libnftables within this
process: running `nft` would cost a child process for every change, for the same library.
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

    from ...model.network import Network, Subnet
    from .ports import Ground

FAMILY = "inet"
PREFIX = "virtd-"
PROBE = "virtd_probe"  # probe.py's table, which belongs to no network

# The usual priorities ("dstnat" is -100; nft 1.0 doesn't accept that name at the output hook). A packet has to pass
# all base chains at a hook: what another table drops stays dropped.
_FORWARD = "type filter hook forward priority filter; policy accept;"
_INPUT = "type filter hook input priority filter; policy accept;"
_REJECT = "reject with icmpx type admin-prohibited"

_lock = threading.Lock()  # libnftables(3) promises no thread safety; serialising costs little
_library: Any = None


class NftError(errors.HostError):
    """nftables refused a command; the message quotes its error."""


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
        # The kernel passes frames sent to 01:80:C2:00:00:0E and the like to the host itself, past the bridge's rules.
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
    # Deleting a table that doesn't exist fails, so add it first: that does nothing if it exists.
    return f"add table {name}\ndelete table {name}\ntable {name} {{\n{body}\n}}\n"


def made_of(ground: Ground) -> str:
    """A checksum (CRC-32, hexadecimal) of the rules as generated, to recognise those of another version or of other
    ports. (Ports that others add to a bridge of the host's, or remove, don't count; they are looked at on other
    occasions.)
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


def _subnets(network: Network) -> list[tuple[str, Subnet]]:
    """The network's prefixes, each with nftables' keyword for its family ("ip" or "ip6")."""
    return [("ip" if subnet.version == 4 else "ip6", subnet) for _key, subnet in network.subnets()]


def _forward(network: Network, mac: str) -> list[str]:
    bridge = f'"{network.bridge_name}"'
    lines = []
    if network.isolated_ports:
        # Isolated neighbours can't reach each other by way of the host either, except through a [[forward]].
        lines.append(f"iifname {bridge} oifname {bridge} ct status dnat accept")
        lines.append(f"iifname {bridge} oifname {bridge} ether daddr {mac} {_REJECT}")
    # With br_netfilter in the kernel, traffic between guests passes through here as well.
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

    Only to the addresses of their own bridge: a DNS server that resolves names from all over the world may be
    listening on the host's other addresses, including those of its other bridges.
    """
    bridge = f'"{network.bridge_name}"'
    own = "fib daddr . iif type"
    return [
        f"iifname != {bridge} accept",
        "ct state established,related accept",
        f"meta l4proto {{ tcp, udp }} th dport 53 {own} local accept",
        f"udp dport {{ 67, 547 }} {own} {{ local, broadcast, multicast }} accept",
        # ICMP and ICMPv6 by number: old nft versions look their names up in /etc/protocols, which not every host has.
        f"meta l4proto {{ 1, 58 }} {own} {{ local, broadcast, multicast }} accept",
        _REJECT,
    ]


def _masquerade(network: Network) -> list[str]:
    """Traffic that leaves the subnet gets the host's address, except what goes to all neighbours.

    So does what a guest sends to another guest, or to itself, through a forwarded port: otherwise the answer would
    bypass the host and come from an address that the guest never contacted.
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
        # Only what is addressed to the host itself, not a guest's connection to port 443 of some server.
        condition = f"fib daddr type local meta nfproto {'ipv6' if word == 'ip6' else 'ipv4'}"
        if hook == "output":
            # A packet from 127.0.0.1 can't leave the host.
            condition += f" {word} daddr != {'::1' if word == 'ip6' else '127.0.0.0/8'}"
        lines.append(f"{condition} {forward.protocol} dport {forward.port} dnat {word} to {to}")
    return lines


# Below, functions that change or query the kernel: each blocks for about a millisecond.


def replace(*grounds: Ground) -> list[Marks]:
    """Replace the rules of these networks, all or none, and return their marks. Raises NftError.

    The kernel waits at the end of each transaction: for many networks a single one takes a tenth of the time.
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
    """What identifies a network's tables: checksums of the kernel's listing, handles included.

    Equal marks mean the very same rules, not only rules that look alike. "" for a missing table.
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
    """The marks of many networks, by name. After a flush all are missing, which a single query shows."""
    there = tables()
    return {name: mark(name) if name in there else Marks("", "") for name in names}


def listing(name: str, family: str = FAMILY) -> str:
    """The kernel's listing of the network's table as JSON, without the elements that the kernel adds; "" if there is
    none.
    """
    items = _items(family, name)
    for item in items:
        if (found := item.get("set")) is not None and found["name"] in ethernet.FILLED:
            for key in ("elem", "count"):  # nft 1.1.7 and later (possibly earlier) list the number of elements
                found.pop(key, None)
    return json.dumps(items, sort_keys=True) if items else ""


def refused(name: str) -> dict[str, int]:
    """How many frames from each interface the rules on the bridge have refused."""
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
    """All chains on the host, in nft(8)'s JSON form. Raises NftError."""
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
        """Load libnftables. Raises NftError."""
        self._library = _open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with _lock:
            self._library = None  # dropping the library closes its socket

    def run(self, command: str) -> None:
        """Run nft commands. Raises NftError."""
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
