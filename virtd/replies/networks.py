# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks."""

from __future__ import annotations

from typing import Annotated

from . import Reply, Summary, Trouble


class Network(Summary, frozen=True):
    """A network in short."""

    mode: Annotated[str | None, "nat, routed, isolated or bridge, as in the definition"]
    bridge: Annotated[str | None, "the interface"]
    ipv4: Annotated[str | None, "the host's address in it, with the prefix"]
    ipv6: Annotated[str | None, "the same"]


class Port(Reply, frozen=True):
    """A guest's interface."""

    interface: Annotated[str, "on the host"]
    user: Annotated[str, 'the guest, such as "qemu/web1"']
    mac: str
    trusted: bool
    ipv4: Annotated[list[str], "addresses that it may send from"]
    refused: Annotated[int, "frames from it that were dropped"]


class NetworkInfo(Network, frozen=True):
    """Everything known about a network."""

    unit: Annotated[str | None, "systemd's, of its dnsmasq"]
    slots: Annotated[list[str], "what systemd's FD store holds for it, by name"]
    domain: Annotated[str | None, "of the guests' names"]
    mtu: Annotated[int | None, "bytes"]
    ranges: Annotated[list[str], 'addresses that DHCP assigns, "FIRST - LAST"']
    users: Annotated[list[str], 'guests with an interface in it, such as "qemu/web1"']
    ports: list[Port]
    leases: Annotated[int, "how many"]
    forwards: Annotated[list[str], "forwarded ports"]
    persistent: Annotated[bool, "whether there is a definition"]
    pending: Annotated[bool, "whether a part of the definition waits for the next start"]
    definition_path: str | None
    log: Annotated[str | None, "the file with dnsmasq's messages"]
    problems: list[Trouble]


class Lease(Reply, frozen=True):
    """A lease."""

    address: str
    family: Annotated[str, "ipv4 or ipv6"]
    mac: Annotated[str | None, "null for a DHCPv6 client whose identifier contains none"]
    name: Annotated[str | None, "as given by the client"]
    expires: Annotated[str | None, "null: never"]
