# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames like those of guests and their servers: Ethernet, with IPv4 or IPv6, with UDP, TCP or ICMP.

Each carries a number that identifies it wherever it arrives, even behind NAT: in IPv4's identification (16 bits), in
the lower 16 bits of IPv6's flow label.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
SYN, SYN_ACK = 0x02, 0x12
BROADCAST = "ff:ff:ff:ff:ff:ff"
HOPS = 64
ARP_REPLY = 1 << 20  # no packet's number
_ARP = b"\x08\x06"
LINK_LOCAL_HOPS = 255  # required for neighbour discovery, RFC 4861


class Way(NamedTuple):
    """Source and destination of a frame: MACs and IP addresses, both of one family."""

    mac: str
    address: str
    to_mac: str
    to: str

    @property
    def version(self) -> int:
        return 6 if ":" in self.to else 4


def udp(way: Way, number: int, source: int, to: int, body: bytes = b"") -> bytes:
    head = struct.pack("!HHHH", source, to, 8 + len(body), 0)
    return _frame(way, number, UDP, head + body, checksum=6)


def tcp(way: Way, number: int, source: int, to: int, flags: int) -> bytes:
    """A segment without data; an acknowledgement refers to our SYN's sequence number."""
    acknowledged = 2 if flags == SYN_ACK else 0
    body = struct.pack("!HHIIBBHHH", source, to, 1, acknowledged, 5 << 4, flags, 64240, 0, 0)
    return _frame(way, number, TCP, body, checksum=16)


def ping(way: Way, number: int, *, reply: bool = False) -> bytes:
    kind, protocol = ((129 if reply else 128), ICMP6) if way.version == 6 else ((0 if reply else 8), ICMP)
    return _frame(way, number, protocol, struct.pack("!BBHHH", kind, 0, 0, 0x7664, 1), checksum=2)


def icmp6(way: Way, number: int, kind: int, body: bytes) -> bytes:
    return _frame(way, number, ICMP6, struct.pack("!BBH", kind, 0, 0) + body, checksum=2, hops=LINK_LOCAL_HOPS)


def arp_probe(mac: str, number: int, *, address: str) -> bytes:
    """Who has this address? As somebody without one asks, RFC 5227, which leaves nothing behind. It has no number."""
    del number
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + raw(mac) + bytes(10) + packed(address)
    return raw(BROADCAST) + raw(mac) + _ARP + body


def dhcp_discover(mac: str, number: int) -> bytes:
    """DHCPDISCOVER, RFC 2131, from a client without an address."""
    return udp(Way(mac, "0.0.0.0", BROADCAST, "255.255.255.255"), number, 68, 67, _dhcp(mac, 1, "0.0.0.0"))


def dhcp_inform(mac: str, number: int, address: str) -> bytes:
    """DHCPINFORM: the answer goes to the address that the client states, and no lease is given.

    It is broadcast, like DHCPDISCOVER, so that the answer belongs to no connection.
    """
    return udp(Way(mac, address, BROADCAST, "255.255.255.255"), number, 68, 67, _dhcp(mac, 8, address))


def _dhcp(mac: str, kind: int, address: str) -> bytes:
    head = struct.pack(
        "!4BIHH4s12s16s192s", 1, 1, 6, 0, 0x76697274, 0, 0, socket.inet_aton(address), b"", raw(mac), b""
    )
    return (head + bytes.fromhex("63825363") + bytes([53, 1, kind, 255])).ljust(300, b"\0")


def dhcp6_solicit(way: Way, number: int) -> bytes:
    """SOLICIT, RFC 8415, from a client that requests nothing."""
    client = struct.pack("!HHHH", 1, 10, 3, 1) + raw(way.mac)
    return udp(way, number, 546, 547, bytes([1]) + b"vrt" + client + struct.pack("!HHH", 8, 2, 0))


def dns_query(way: Way, number: int, *, port: int = 40053) -> bytes:
    """A query for version.bind, class CHAOS, which a server answers without asking another."""
    question = b"\7version\4bind\0" + struct.pack("!HH", 16, 3)
    return udp(way, number, port, 53, struct.pack("!6H", number, 0, 1, 0, 0, 0) + question)


def router_solicitation(way: Way, number: int) -> bytes:
    return icmp6(way, number, 133, bytes(4))


def neighbour_solicitation(way: Way, number: int, target: str) -> bytes:
    return icmp6(way, number, 135, bytes(4) + packed(target) + b"\1\1" + raw(way.mac))


def link_local(mac: str) -> str:
    """The link-local IPv6 address derived from a MAC."""
    data = raw(mac)
    made = bytes([0xFE, 0x80]) + bytes(6) + bytes([data[0] ^ 2]) + data[1:3] + b"\xff\xfe" + data[3:]
    return socket.inet_ntop(socket.AF_INET6, made)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def number_of(header: bytes) -> int:
    """The number in an IP header; 0 if `header` isn't one."""
    if len(header) >= 20 and header[0] >> 4 == 4:
        return int.from_bytes(header[4:6], "big")
    if len(header) >= 4 and header[0] >> 4 == 6:
        return int.from_bytes(header[2:4], "big")
    return 0


def number_in(frame: bytes) -> int:
    """The number of a frame of ours; ARP_REPLY for any answer to `arp_probe`, and 0 for what has none."""
    if frame[12:14] == _ARP and frame[20:22] == b"\0\2":
        return ARP_REPLY
    return number_of(frame[14:]) if frame[12:14] in (b"\x08\x00", b"\x86\xdd") else 0


def _frame(way: Way, number: int, protocol: int, body: bytes, *, checksum: int, hops: int = HOPS) -> bytes:
    """Build a frame around `body`. `checksum`: the checksum's offset in `body`."""
    source, to = packed(way.address), packed(way.to)
    pseudo = b"" if protocol == ICMP else source + to + struct.pack("!II", len(body), protocol)
    # In UDP a checksum of 0 means none.
    summed = struct.pack("!H", _sum(pseudo + body) or 0xFFFF)
    body = body[:checksum] + summed + body[checksum + 2 :]
    ethernet = raw(way.to_mac) + raw(way.mac)
    if way.version == 6:
        return (
            ethernet + struct.pack("!HIHBB", 0x86DD, 6 << 28 | number, len(body), protocol, hops) + source + to + body
        )
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), number, 0, hops, protocol, 0) + source + to
    head = head[:10] + struct.pack("!H", _sum(head)) + head[12:]
    return ethernet + struct.pack("!H", 0x0800) + head + body


def _sum(data: bytes) -> int:
    """The Internet's checksum, RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
