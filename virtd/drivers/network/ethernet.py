# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules on a network's bridge, nftables' table `bridge virtd-NAME`: a port may send only from its own addresses.

A frame from one of our ports must carry the port's own MAC, in its header and in ARP. Its IP addresses must be those
assigned to the port or, if none are assigned (IPv6, networks without DHCP), addresses that nobody else has used:
first come, first served, as in RFC 6620. The kernel maintains that by itself, in sets that it fills. Ports may send
no DHCP server or router messages, no VLAN tags, no other protocols, and nothing that hides its type in extension
headers or fragments.

Ports are known by their interfaces' names, so the rules exist before an interface does, and cover one that a
container's reboot recreates. Other interfaces in the bridge are their owners' business. On a bridge of the host's, an
address from which they or the host solicit a neighbour is theirs for a few minutes: no guest without a prior claim to
it may begin to use it. (An address in their replies isn't: a proxy replies for everybody.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ports as ports_

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Network
    from .ports import Ground, Port

FAMILY = "bridge"
LINK_LOCAL = 0xFE80 << 48
KEPT = "2h"  # how long a port keeps an address after it last used it
HELD = "2m"  # the same for others' on a bridge of the host's: an active machine keeps soliciting neighbours
PACE = "limit rate 1/minute burst 64 packets"  # for addresses that a port starts to use
SIZE = 65536
# Sets that the kernel fills while the rules stand; they are left out when rules are compared.
OTHERS = ("others4", "others6")
FILLED = frozenset({"first4", "first6", "claimed4", "claimed6", "pace", "dropped", *OTHERS})

SOURCE6, TARGET6 = "@nh,64,128", "@nh,384,128"  # offsets of the addresses in the IPv6 header


def rules(ground: Ground, name: str, kept: dict[str, list[str]]) -> str:
    """The commands that replace the table. `kept`: elements that the kernel had added to its sets, see filled()."""
    body = "\n".join([*_sets(ground, kept), *_chains(ground)])
    return f"add table {FAMILY} {name}\ndelete table {FAMILY} {name}\ntable {FAMILY} {name} {{\n{body}\n}}\n"


def _sets(ground: Ground, kept: dict[str, list[str]]) -> list[str]:
    network = ground.network
    guarded = [port for port in ground.ports if not port.trusted]
    own6, taken6 = _addresses6(ground)
    filled = f"size {SIZE}; flags dynamic,timeout; timeout {KEPT};"
    return [
        _set("members", "type ifname;", [_name(port) for port in ground.ports]),
        _set("ports", "type ifname;", [_name(port) for port in guarded]),
        _set("macs", "type ifname . ether_addr;", [f"{_name(port)} . {port.mac}" for port in guarded]),
        _set(
            "chaddr", "typeof iifname . @th,288,48;",
            [f"{_name(port)} . 0x{port.mac.replace(':', '')}" for port in guarded],
        ),
        _set(
            "own4", "type ifname . ipv4_addr;",
            [f"{_name(port)} . {address}" for port in guarded for address in addresses4(network, port)],
        ),
        _set("taken4", "type ipv4_addr;", sorted(_taken4(ground))),
        _set("loose4", "type ifname;", [_name(port) for port in guarded if is_loose(network, port)]),
        _set("own6", f"typeof iifname . {SOURCE6};", own6),
        _set("taken6", f"typeof {SOURCE6};", taken6),
        _set("first4", f"type ifname . ipv4_addr; {filled}", kept.get("first4", [])),
        _set("claimed4", f"type ipv4_addr; {filled}", _second(kept.get("first4", []))),
        _set("first6", f"typeof iifname . {SOURCE6}; {filled}", kept.get("first6", [])),
        _set("claimed6", f"typeof {SOURCE6}; {filled}", _second(kept.get("first6", []))),
        *_others(ground, kept),
        _set("pace", f"type ifname; size {SIZE}; flags dynamic;", []),
        _set("dropped", f"type ifname; size {SIZE}; flags dynamic; counter;", kept.get("dropped", [])),
    ]  # fmt: skip


def _others(ground: Ground, kept: dict[str, list[str]]) -> list[str]:
    if ground.network.own:
        return []
    filled = f"size {SIZE}; flags dynamic,timeout; timeout {HELD};"
    return [
        _set("others", "type ifname;", [f'"{name}"' for name in ground.others]),
        _set("others4", f"type ipv4_addr; {filled}", kept.get("others4", [])),
        _set("others6", f"typeof {SOURCE6}; {filled}", kept.get("others6", [])),
    ]


def _chains(ground: Ground) -> list[str]:
    chains = [
        _chain("refuse", "add @dropped { iifname }", "drop"),
        _chain(
            "guarded",
            "iifname . ether saddr != @macs goto refuse",
            "ether type arp goto of_arp",
            "ether type ip goto of_ip",
            "ether type ip6 goto of_ip6",
            # VLAN tags included: their EtherType is a different one.
            "goto refuse",
        ),
        _chain(
            "of_arp",
            "@nh,0,48 != 0x000108000604 goto refuse",  # Ethernet, IPv4 and the lengths of both
            "iifname . arp saddr ether != @macs goto refuse",
            "arp operation != { request, reply } goto refuse",
            "arp saddr ip 0.0.0.0 arp operation request accept",  # address conflict probe: RFC 5227
            *_first_come4(ground, "arp saddr ip"),
        ),
        _chain(
            "of_ip",
            "udp dport 68 goto refuse",
            "udp dport 67 jump of_dhcp",
            "ip protocol 103 goto refuse",  # PIM, and IGMP queries below: their senders receive everybody's multicast
            "ip protocol 2 @th,0,8 0x11 goto refuse",
            *_first_come4(ground, "ip saddr"),
        ),
        # A client may speak only for itself. Packets too short to tell, such as fragments, are refused.
        _chain(
            "of_dhcp",
            "iifname . @th,288,48 @chaddr ip saddr 0.0.0.0 ip daddr 255.255.255.255 accept",
            "iifname . @th,288,48 @chaddr return",
            "goto refuse",
        ),
        # Matched by number at its fixed place in the header: nothing behind other headers is searched for.
        _chain(
            "of_ip6",
            "ip6 nexthdr 0 goto of_mld",
            "ip6 nexthdr 44 jump of_fragment",
            "ip6 nexthdr 58 goto of_icmp6",
            "ip6 nexthdr 17 udp dport 546 goto refuse",
            "ip6 nexthdr != { 4, 6, 17, 33, 41, 44, 47, 50, 59, 115, 132, 136 } goto refuse",
            "goto from_ip6",
        ),
        _chain(
            "of_mld",
            "@nh,320,16 != 0x3a00 goto refuse",  # ICMPv6 follows immediately
            "@nh,384,8 != { 131, 132, 143 } goto refuse",
            f"{SOURCE6} 0 accept",
            "goto from_ip6",
        ),
        _chain(
            "of_fragment",
            "@nh,320,8 != { 4, 6, 17, 33, 41, 47, 50, 58, 115, 132, 136 } goto refuse",
            "@nh,320,8 58 @nh,336,13 0 @nh,384,8 >= 130 goto refuse",
            "@nh,320,8 17 @nh,336,13 0 @nh,400,16 546 goto refuse",
        ),
        _chain(
            "of_icmp6",
            # Queries, advertisements, redirects, and the other messages that only routers send.
            "@nh,320,8 { 130, 134, 137, 138, 151, 153 } goto refuse",
            "@nh,320,8 136 jump target6",
            f"@nh,320,8 135 {SOURCE6} 0 jump target6",
            f"@nh,320,8 {{ 131, 132, 133, 135, 143 }} {SOURCE6} 0 accept",
            "goto from_ip6",
        ),
        _chain("target6", *_first_come6(ground, TARGET6, "return")),
        _chain("from_ip6", *_first_come6(ground, SOURCE6, "accept")),
    ]
    guarded, others = "iifname @ports goto guarded", "goto of_others"
    if ground.network.own:
        chains.append(_hook("prerouting", "prerouting", guarded))
    else:
        chains += [
            _chain(
                "of_others",
                "ether type arp @nh,0,48 0x000108000604 arp operation request arp saddr ip != 0.0.0.0 "
                "update @others4 { arp saddr ip }",
                f"ether type ip6 ip6 nexthdr 58 @nh,320,8 135 {SOURCE6} != 0 update @others6 {{ {SOURCE6} }}",
            ),
            _hook("prerouting", "prerouting", guarded, f"iifname @others {others}"),
            _hook("output", "output", f"oifname @others {others}", f"oifname @members {others}"),
        ]
    lines = [
        # Such a port may send back to itself only what a [[forward]] leads there.
        f"iifname {_name(port)} oifname {_name(port)} ether daddr != {port.mac} drop"
        for port in ground.ports
        if is_forwarded_to(ground.network, port)
    ]
    if ground.network.isolated_ports:
        lines.append("iifname @members oifname @members drop")
    if lines:
        chains.append(_hook("forward", "forward", *lines))
    return chains


def _first_come4(ground: Ground, source: str) -> list[str]:
    subnet = ground.network.interface4
    outside = f"!= {subnet.network}" if subnet is not None else "{ 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/3 }"
    both = f"@first4 {{ iifname . {source} }}", f"@claimed4 {{ {source} }}"
    return [
        f"iifname . {source} @own4 accept",
        f"{source} @taken4 goto refuse",
        "iifname != @loose4 goto refuse",
        f"iifname . {source} @first4 update {both[0]} update {both[1]} accept",
        *([] if ground.network.own else [f"{source} @others4 goto refuse"]),
        f"{source} @claimed4 goto refuse",
        f"{source} {outside} goto refuse",
        f"update @pace {{ iifname {PACE} }} add {both[0]} add {both[1]} accept",
        "goto refuse",
    ]


def _first_come6(ground: Ground, source: str, then: str) -> list[str]:
    both = f"@first6 {{ iifname . {source} }}", f"@claimed6 {{ {source} }}"
    begins = source.removesuffix(",128")
    new = f"update @pace {{ iifname {PACE} }} add {both[0]} add {both[1]} {then}"
    if ground.network.ipv6 is None:
        # No prefix of ours: any address that a guest can own.
        lines = [f"{source} {{ 0, 1 }} goto refuse", f"{begins},8 0xff goto refuse", new]
    else:
        lines = [f"{begins},{bits} 0x{value:0{bits // 4}x} {new}" for bits, value in _prefixes6(ground.network)]
    return [
        f"iifname . {source} @own6 {then}",
        f"{source} @taken6 goto refuse",
        f"iifname . {source} @first6 update {both[0]} update {both[1]} {then}",
        *([] if ground.network.own else [f"{source} @others6 goto refuse"]),
        f"{source} @claimed6 goto refuse",
        *lines,
        "goto refuse",
    ]


def addresses4(network: Network, port: Port) -> list[str]:
    """The IPv4 addresses assigned to the port."""
    given = {host.ipv4 for host in network.host if host.mac.lower() == port.mac} | {port.ipv4}
    return sorted(address for address in given if address)


def is_forwarded_to(network: Network, port: Port) -> bool:
    """Whether a [[forward]] leads to this port.

    Under br_netfilter the bridge itself translates addresses, and what the guest sends to itself by way of the host
    then has to leave by the port that it came in by.
    """
    mine = {*addresses4(network, port), *(host.ipv6 for host in network.host if host.mac.lower() == port.mac)}
    return not network.isolated_ports and any(forward.to in mine for forward in network.forward)


def is_loose(network: Network, port: Port) -> bool:
    """Whether the port's guest chooses its IPv4 address itself."""
    return port.loose or network.range4 is None


def _taken4(ground: Ground) -> set[str]:
    network = ground.network
    taken = {host.ipv4 for host in network.host} | {port.ipv4 for port in ground.ports}
    if network.interface4 is not None:
        taken |= {str(network.interface4.ip), str(network.interface4.network.broadcast_address)}
    return {address for address in taken if address}


def _prefixes6(network: Network) -> list[tuple[int, int]]:
    """The prefixes in which a guest may choose an address: (length in bits, value). Whole bytes, at most 64 bits."""
    found = [(64, LINK_LOCAL)]
    if network.interface6 is not None:
        bits = min(64, network.interface6.network.prefixlen // 8 * 8)
        found.append((bits, int(network.interface6.network.network_address) >> 128 - bits))
    return found


def _made6(network: Network, mac: str) -> set[int]:
    """The addresses derived from a MAC (EUI-64), as numbers."""
    return {int(ports_.eui64(value, mac)) for bits, value in _prefixes6(network) if bits == 64}


def _addresses6(ground: Ground) -> tuple[list[str], list[str]]:
    """The IPv6 addresses of each port, and all that belong to somebody, by a [[host]] or derived from a MAC."""
    import ipaddress

    network = ground.network
    own, taken = [], set()
    for port in ground.ports:
        mine = _made6(network, port.mac)
        mine |= {
            int(ipaddress.IPv6Address(host.ipv6))
            for host in network.host
            if host.ipv6 and host.mac.lower() == port.mac
        }
        taken |= mine
        own += [f"{_name(port)} . {_hex(address)}" for address in sorted(mine) if not port.trusted]
    taken |= {int(ipaddress.IPv6Address(host.ipv6)) for host in network.host if host.ipv6}
    taken |= _made6(network, ground.mac) if ground.mac else set()
    if network.interface6 is not None:
        taken.add(int(network.interface6.ip))
    return own, [_hex(address) for address in sorted(taken)]


def _hex(address: int) -> str:
    return f"0x{address:032x}"


def _name(port: Port) -> str:
    return f'"{port.interface}"'


def _set(name: str, kind: str, elements: list[str]) -> str:
    listed = f" elements = {{ {', '.join(elements)} }}" if elements else ""
    return f"\tset {name} {{ {kind}{listed} }}"


def _second(elements: list[str]) -> list[str]:
    return sorted({element.partition(" . ")[2] for element in elements})


def _chain(name: str, *lines: str) -> str:
    return "\n".join([f"\tchain {name} {{", *(f"\t\t{line}" for line in lines), "\t}"])


def _hook(name: str, hook: str, *lines: str) -> str:
    return _chain(name, f"type filter hook {hook} priority -300; policy accept;", *lines)


def filled(
    items: list[dict[str, Any]], interfaces: Iterable[str], *, all_of_them: bool = False
) -> dict[str, list[str]]:
    """The elements that the kernel has added to the table's sets, as nft writes them, by set; for these interfaces or
    for all.
    """
    found: dict[str, list[str]] = {}
    known = set(interfaces)
    for item in items:
        entry = item.get("set", {})
        if entry.get("name") not in ("first4", "first6", "dropped", *OTHERS):
            continue
        for element in entry.get("elem", []):
            inner = element.get("elem", {}) if isinstance(element, dict) and "elem" in element else {"val": element}
            value = inner.get("val")
            if entry["name"] in OTHERS:
                if isinstance(value, str | int):
                    found.setdefault(entry["name"], []).append(str(value))
                continue
            parts = value["concat"] if isinstance(value, dict) and "concat" in value else [value]
            if not (all_of_them or parts[0] in known) or not all(isinstance(part, str | int) for part in parts):
                continue
            text = " . ".join([f'"{parts[0]}"', *(str(part) for part in parts[1:])])
            if counter := inner.get("counter"):
                text += f" counter packets {counter['packets']} bytes {counter['bytes']}"
            found.setdefault(entry["name"], []).append(text)
    return found
