# SPDX-License-Identifier: LGPL-2.1-or-later
"""dnsmasq's lease file, in dnsmasq's own format (dnsmasq(8), --dhcp-leasefile): read, never written."""

from __future__ import annotations

import re
import time

import msgspec

from ... import untrusted
from ...records import stamp
from ...replies import networks as replies

LIMIT = 16 << 20
"""Bytes that the file may have: more than 65,536 leases of each family, which is dnsmasq's own limit here."""

# Enough for all dates with a four-digit year. (str.isdigit() accepts digits that int() doesn't.)
_SECONDS = r"[0-9]{1,11}"


class Lease(msgspec.Struct, frozen=True):
    """One lease. `mac`: "" if a DHCPv6 client's identifier contains none; `expires`: Unix time, 0 for an unlimited
    lease.
    """

    address: str
    mac: str
    name: str
    expires: int

    @property
    def family(self) -> str:
        return "ipv6" if ":" in self.address else "ipv4"

    def described(self) -> replies.Lease:
        """The lease as the operation Leases returns it."""
        return replies.Lease(
            address=self.address,
            family=self.family,
            mac=self.mac or None,
            name=self.name or None,
            expires=stamp(self.expires) if self.expires else None,
        )


def read(path: str) -> list[Lease]:
    """The unexpired leases in the file, sorted by address; none if the file doesn't exist.

    dnsmasq writes it, from what anybody may send: malformed lines are skipped.
    """
    try:
        data = untrusted.read(path, LIMIT)
    except OSError:
        return []
    return parse(data.decode(errors="replace").splitlines(), time.time())


def parse(lines: list[str], now: float) -> list[Lease]:
    found: list[tuple[tuple[int, bytes], Lease]] = []
    for line in lines:
        fields = line.split()
        # "duid ..." is the server's own identifier; DHCPv6 leases follow it.
        if len(fields) < 5 or not re.fullmatch(_SECONDS, fields[0]):
            continue
        expires, key, address, name, client = int(fields[0]), *fields[1:5]
        if (expires and expires < now) or (place := _place(address)) is None:
            continue
        mac = _mac_of_duid(client) if ":" in address else key.rpartition("-")[2].lower()
        found.append((place, Lease(address, mac, "" if name == "*" else name, expires)))
    return [lease for _place, lease in sorted(found, key=lambda one: one[0])]


def _place(address: str) -> tuple[int, bytes] | None:
    """The key to sort by; None for text that isn't an address."""
    import socket

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return int(family), socket.inet_pton(family, address)
    except (OSError, ValueError):
        return None


def _mac_of_duid(duid: str) -> str:
    """The MAC in a DUID-LLT or DUID-LL of an Ethernet card (RFC 8415, 11.2 and 11.4), "" in others."""
    parts = duid.lower().split(":")
    if parts[:4] == ["00", "01", "00", "01"] and len(parts) == 14:
        return ":".join(parts[8:])
    if parts[:4] == ["00", "03", "00", "01"] and len(parts) == 10:
        return ":".join(parts[4:])
    return ""
