# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports that the host itself serves, whose services a [[forward]] would make unreachable.

Sockets are listed with sock_diag(7), as ss(8) does. The process that owns a socket is looked up in /proc, only for
the ports in question.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from ...text import word
from .netlink import SOCK_DIAG, Message, Requests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.network import Forward

PROC = "/proc"
OURS = "virtd-network-"  # prefix of dnsmasq's units
INIT = 1

# linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states, socket
_ANSWER = struct.Struct("=BBBB HH 16s16sI8x IIIII")  # inet_diag_msg; the ports are in network byte order
_SKV6ONLY = 11
# A UDP socket that is bound and not connected counts as a server's; for TCP, one that listens.
_STATES = {socket.IPPROTO_TCP: 1 << 10, socket.IPPROTO_UDP: 1 << 7}  # TCP_LISTEN, TCP_CLOSE: net/tcp_states.h


class Listener(NamedTuple):
    """A listening socket: protocol "tcp" or "udp", and the IP versions by which it can be reached from elsewhere."""

    protocol: str
    versions: frozenset[int]
    address: str
    port: int
    inode: int


class Process(NamedTuple):
    """The process that owns a socket; `unit`: its unit on the host, or "".

    `activated`: systemd holds the socket too, for a socket unit, and would restart the service.
    """

    pid: int
    name: str
    unit: str
    activated: bool = False


class Served(NamedTuple):
    """A forward whose port is served: its index in the list, a sentence that says who listens, and possible remedies.

    `protocol` and `inode` are the socket's.
    """

    number: int
    text: str
    hint: str
    protocol: str = "tcp"
    inode: int = 0


def served(forwards: Iterable[Forward]) -> list[Served]:
    """Those of `forwards` whose ports the host serves. Raises OSError if the kernel can't be asked."""
    numbered = list(enumerate(forwards))
    if not numbered:
        return []
    listeners = [one for one in listening() if one.versions]
    found = [
        (index, one)
        for index, forward in numbered
        for one in listeners
        if (one.protocol, one.port) == (forward.protocol.value, forward.port)
        and (6 if ":" in forward.to else 4) in one.versions
    ]
    owners = _owners({one.inode for _, one in found}) if found else {}
    told: dict[int, Served] = {}
    for index, one in found:
        who = owners.get(one.inode)
        if who is None or not who.unit.startswith(OURS):  # dnsmasq's own port may be forwarded
            told.setdefault(index, _sentence(index, one, who))
    return list(told.values())


def _sentence(index: int, one: Listener, who: Process | None) -> Served:
    place = f"[{one.address}]" if ":" in one.address else one.address
    if who is None:
        name, hint = "the host itself", "ss -lnp shows who"
    else:
        name = f"{who.name} (PID {who.pid}{f', {who.unit}' if who.unit else ''})"
        # Units of a user's own systemd can't be stopped by name on the host.
        stoppable = who.unit.endswith(".service") and not who.unit.startswith("user@")
        hint = f"systemctl stop {word(who.unit)}" if stoppable else f"kill {who.pid}"
        if who.activated:
            hint += ", and stop its socket unit, which systemctl list-sockets shows"
        if who.pid == INIT:
            name, hint = "a socket unit of systemd's", "systemctl list-sockets shows which"
    text = f"{one.protocol} port {one.port} of the host is served by {name} at {place}:{one.port}"
    hint = f"Forward another port, or end what listens there ({hint})."
    return Served(index, text, hint, one.protocol, one.inode)


def listening() -> list[Listener]:
    """All listening sockets of the host. Raises OSError."""
    found = []
    with Diag() as diag:
        for protocol in _STATES:
            for family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6, say
                    found += diag.listeners(family, protocol)
    return found


class Diag(Requests):
    """A socket for sock_diag requests."""

    def __init__(self) -> None:
        super().__init__(SOCK_DIAG)

    def listeners(self, family: int, protocol: int) -> list[Listener]:
        request = _REQUEST.pack(family, protocol, 0, _STATES[protocol])
        found = [_listener(protocol, message) for message in self.dump(_SOCK_DIAG_BY_FAMILY, request)]
        return [one for one in found if one is not None]


def _listener(protocol: int, message: Message) -> Listener | None:
    try:
        family, _, _, _, port, _, packed, *_, inode = message.head(_ANSWER)
        address = socket.inet_ntop(family, packed[: 4 if family == socket.AF_INET else 16])
    except (struct.error, ValueError, OSError):
        return None
    only6 = message.attributes(_ANSWER).number(_SKV6ONLY) == 1
    name = "tcp" if protocol == socket.IPPROTO_TCP else "udp"
    return Listener(name, _versions(address, only6=only6), address, socket.ntohs(port), inode)


def _versions(address: str, *, only6: bool) -> frozenset[int]:
    """The IP versions by which the address can be reached from elsewhere: packets for the loopback are never
    forwarded.
    """
    if address.startswith(("127.", "::ffff:127.")) or address == "::1":
        return frozenset()
    if ":" not in address or address.startswith("::ffff:"):
        return frozenset({4})
    return frozenset({6}) if only6 or address != "::" else frozenset({4, 6})


def _owners(inodes: set[int]) -> dict[int, Process]:
    """The process that has each socket (inode) open; one other than systemd if there are several."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[int]] = {}
    for pid in sorted((int(name) for name in os.listdir(PROC) if name.isdigit()), reverse=True):
        with contextlib.suppress(OSError):  # the process has ended
            for fd in os.listdir(f"{PROC}/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if (inode := wanted.get(os.readlink(f"{PROC}/{pid}/fd/{fd}"))) is not None:
                        found.setdefault(inode, []).append(pid)
    return {
        inode: Process(pid, _read(pid, "comm"), _unit(_read(pid, "cgroup")), INIT in others)
        for inode, (pid, *others) in found.items()
    }


def _read(pid: int, what: str) -> str:
    try:
        with open(f"{PROC}/{pid}/{what}", encoding="utf-8", errors="replace") as file:
            text = file.read(4096).strip()
    except OSError:
        return ""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _unit(cgroups: str) -> str:
    """The outermost unit, which is the host's: units of a user's or a container's systemd may be nested in it."""
    for line in cgroups.splitlines():
        if line.startswith("0::"):
            return next((name for name in line[3:].split("/") if name.endswith((".service", ".scope"))), "")
    return ""
