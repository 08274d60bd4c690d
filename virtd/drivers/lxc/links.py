# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container's interfaces: their names on the host, their MACs, and the addresses that they have."""

from __future__ import annotations

import contextlib

ADDRESSES = 64  # reported of one container at most
TABLE = 1 << 18  # bytes of the kernel's tables that are read for them


def interface_names(uuid: str, count: int) -> list[str]:
    """The host's ends of a container's interfaces. A name that a crash has left leads back to its container."""
    return [f"vl{uuid.replace('-', '')[:9]}.{index}" for index in range(count)]


def mac_of(uuid: str, index: int) -> str:
    """A MAC that stays the same, so that DHCP gives the same address: 52:54:00 is for virtual machines."""
    import hashlib

    digest = hashlib.sha256(f"{uuid}/{index}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def addresses(directory: str) -> list[str]:
    """The addresses in /proc/PID/net, which shows a process's own network namespace; not more than a person reads.

    Names of interfaces are bytes that the container chooses, and so is the number of addresses.
    """
    import ipaddress  # 2 ms, which only this question costs

    found: dict[str, None] = {}
    before = b""
    for words in _rows(f"{directory}/fib_trie"):
        if words[:1] == [b"|--"]:
            before = words[-1]
        elif words == [b"/32", b"host", b"LOCAL"] and not before.startswith(b"127."):
            found[before.decode("ascii", "replace")] = None
    for words in _rows(f"{directory}/if_inet6"):
        with contextlib.suppress(ValueError):
            if words[5:] != [b"lo"]:
                found[str(ipaddress.IPv6Address(int(words[0], 16)))] = None
    return list(found)[:ADDRESSES]


def _rows(path: str) -> list[list[bytes]]:
    """The words of each line."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return [line.split() for line in file.read(TABLE).splitlines() if line.strip()]
    return []
