# SPDX-License-Identifier: LGPL-2.1-or-later
"""dnsmasq's lease file: its names and identifiers are what guests have sent."""

from __future__ import annotations

import msgspec

from virtd.drivers.network import leases

SEEDS = (
    b"1763000000 52:54:00:12:34:56 192.168.150.5 web1 ff:00:01\n0 06-52:54:00:aa:bb:cc 10.0.0.1 * *\n",
    b"duid 00:01:00:01:2f:3a\n1893456000 1 fd00::5 db 00:03:00:01:52:54:00:12:34:56\n",
    b"0 2 fd00::6 * 00:01:00:01:2f:3a:11:22:52:54:00:12:34:57\n",
    # What once were tracebacks: digits that int() doesn't know, a year with five digits, a NUL in an address.
    "1763000000² 52:54:00:12:34:56 192.168.150.5 web1 ff:00:01\n".encode(),
    b"253402300800 52:54:00:12:34:56 192.168.150.5 web1 ff:00:01\n",
    b"0 52:54:00:12:34:56 192.168.\000150.5 web1 ff:00:01\n",
)
WORDS = (b"9" * 30, b"0 ", b" * ", "²".encode(), "１".encode(), b"00:03:00:01:", b"253402300800")


def target(data: bytes) -> None:
    found = leases.parse(data.decode(errors="replace").splitlines(), 1e9)
    msgspec.json.encode([lease.described() for lease in found])
