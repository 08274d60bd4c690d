# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames as a guest that means harm puts them together, and how to send them and see which of them arrive."""

from __future__ import annotations

import ipaddress
import struct

BROADCAST = "ff:ff:ff:ff:ff:ff"
SEND = """
import socket, sys
one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
one.bind(("eth0", 0))
for line in sys.stdin:
    one.send(bytes.fromhex(line))
"""
# Prints the marks of all frames that come in at an interface, until a frame says MARK-end.
HEAR = """
import re, socket, sys
one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
one.bind((sys.argv[1], 0))
one.settimeout(20)
print("listening", flush=True)
while True:
    data, where = one.recvfrom(65536)
    for mark in re.findall(rb"MARK-([a-z0-9-]+)[.]", data) if where[2] != 4 else ():
        print(mark.decode(), flush=True)
        if mark == b"end":
            sys.exit()
"""


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _ip(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def mark(name: str) -> bytes:
    return f"MARK-{name}.".encode().ljust(40, b".")


def ethernet(source: str, kind: int, body: bytes, to: str = BROADCAST, tags: tuple[int, ...] = ()) -> bytes:
    return (
        _mac(to)
        + _mac(source)
        + b"".join(struct.pack("!HH", tag, 1) for tag in tags)
        + struct.pack("!H", kind)
        + body
    )


def arp(name: str, mac: str, address: str, *, operation: int = 2, to: str = "0.0.0.0") -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return head + _mac(mac) + _ip(address) + bytes(6) + _ip(to) + mark(name)


def _sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(data[0::2]) * 256 + sum(data[1::2])
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, to: str, protocol: int, body: bytes, *, fragment: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 7, fragment, 64, protocol, 0, _ip(source), _ip(to))
    return head[:10] + struct.pack("!H", _sum(head)) + head[12:] + body


def udp(source: int, to: int, body: bytes) -> bytes:
    return struct.pack("!HHHH", source, to, 8 + len(body), 0) + body


def dhcp(name: str, operation: int, mac: str) -> bytes:
    head = struct.pack("!4BIHH16s", operation, 1, 6, 0, 7, 0, 0x8000, bytes(16)) + _mac(mac) + bytes(10)
    return head + bytes(192) + bytes.fromhex("63825363350101ff") + mark(name)


def ipv6(source: str, to: str, header: int, body: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(body), header, 255) + _ip(source) + _ip(to) + body


def icmp6(name: str, source: str, to: str, kind: int, body: bytes = bytes(4)) -> bytes:
    """With a right checksum; the mark is an option that nobody knows."""
    body = struct.pack("!BBH", kind, 0, 0) + body + bytes([253, 6]) + mark(name)[:46].ljust(46, b".")
    pseudo = _ip(source) + _ip(to) + struct.pack("!II", len(body), 58)
    return body[:2] + struct.pack("!H", _sum(pseudo + body)) + body[4:]


def neighbour(name: str, source: str, to: str, target: str, kind: int = 136) -> bytes:
    """An advertisement, or with 135 a solicitation, as a whole packet."""
    flags = bytes.fromhex("20000000") if kind == 136 else bytes(4)
    return ipv6(source, to, 58, icmp6(name, source, to, kind, flags + _ip(target)))
