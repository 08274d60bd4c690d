# SPDX-License-Identifier: LGPL-2.1-or-later
"""Injects packets from outside, for probe.py, at the interface that leads there, as if it had received them.

A tap's ingress qdisc redirects what is written to the tap to the receiving side of another interface (tc-mirred(8)).
The kernel takes a packet for an answer only if it belongs to a connection, so one is entered (as conntrack(8) does)
and removed afterwards. The layouts are those of include/uapi/linux/{pkt_sched,pkt_cls,tc_act/tc_mirred}.h and
netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from . import packets
from .netlink import CONNTRACK, CREATE, EXCL, NETFILTER, NFGEN, Requests, attribute, nested

if TYPE_CHECKING:
    from typing import Self

_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_RTM_NEWQDISC, _RTM_NEWTFILTER = 36, 44
_INGRESS, _INGRESS_ROOT = 0xFFFF0000, 0xFFFFFFF1  # TC_H_INGRESS
_KIND, _OPTIONS = 1, 2
_ALL = socket.htons(0x0003)  # ETH_P_ALL
_U32_SEL, _U32_ACT = 5, 7
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_STOLEN, _INGRESS_REDIRECT = 4, 3  # TC_ACT_STOLEN, TCA_INGRESS_REDIR

_CT_NEW, _CT_DELETE = CONNTRACK | 0, CONNTRACK | 2  # IPCTNL_MSG_CT_*
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _TIMEOUT, _NAT_SRC = 1, 2, 3, 7, 6
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_CONFIRMED, _SEEN_REPLY = 1 << 3, 1 << 1  # IPS_CONFIRMED, IPS_SEEN_REPLY
LASTS = 5  # seconds, unless it is removed before


class Connection(NamedTuple):
    """A guest's UDP connection to the outside. `host`: the source address seen outside (the guest's without NAT)."""

    guest: str
    host: str
    to: str
    port: int  # the guest's
    to_port: int


def redirect(tap: str, interface: str) -> None:
    """Have `interface` receive whatever is written to a tap. Raises OSError, as when the kernel lacks it."""
    with Requests(socket.NETLINK_ROUTE) as netlink:
        index = socket.if_nametoindex(tap)
        netlink.change(
            _RTM_NEWQDISC, CREATE | EXCL,
            _TC.pack(0, index, _INGRESS, _INGRESS_ROOT, 0) + attribute(_KIND, "ingress"),
        )  # fmt: skip
        # tc_u32_sel with one key that matches everything: its mask over the first four bytes is 0.
        select = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
        mirred = struct.pack("=IIiiiiI", 0, 0, _STOLEN, 0, 0, _INGRESS_REDIRECT, socket.if_nametoindex(interface))
        action = attribute(_ACT_KIND, "mirred") + nested(_ACT_OPTIONS, attribute(_MIRRED_PARMS, mirred))
        options = nested(_OPTIONS, attribute(_U32_SEL, select), nested(_U32_ACT, nested(1, action)))
        netlink.change(
            _RTM_NEWTFILTER, CREATE | EXCL,
            _TC.pack(0, index, 0, _INGRESS, 1 << 16 | _ALL)
            + attribute(_KIND, "u32") + options,
        )  # fmt: skip


class Conntrack:
    """Temporary conntrack entries, deleted at the end. Use it in a with statement."""

    def __init__(self) -> None:
        self._netlink = Requests(NETFILTER)
        self._entered: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for one in self._entered:
            with contextlib.suppress(OSError):
                self._netlink.change(_CT_DELETE, 0, _nfgen(one) + _tuple(_TUPLE_ORIG, *_there(one)))
        self._netlink.close()

    def enter(self, one: Connection) -> None:
        """Add an entry. Raises OSError, also if the kernel doesn't support it."""
        body = _nfgen(one) + _tuple(_TUPLE_ORIG, *_there(one))
        # The reply as it would be without NAT; the kernel derives the translated one.
        body += _tuple(_TUPLE_REPLY, one.to, one.guest, one.to_port, one.port)
        body += attribute(_STATUS, struct.pack("!I", _CONFIRMED | _SEEN_REPLY))
        body += attribute(_TIMEOUT, struct.pack("!I", LASTS))
        if one.host != one.guest:
            lowest, highest = (1, 2) if ":" not in one.host else (4, 5)
            nat = attribute(lowest, packets.packed(one.host)) + attribute(highest, packets.packed(one.host))
            port = struct.pack("!H", one.port)
            nat += nested(3, attribute(1, port), attribute(2, port))
            body += nested(_NAT_SRC, nat)
        self._netlink.change(_CT_NEW, CREATE | EXCL, body)
        self._entered.append(one)


def _there(one: Connection) -> tuple[str, str, int, int]:
    return one.guest, one.to, one.port, one.to_port


def _nfgen(one: Connection) -> bytes:
    return NFGEN.pack(socket.AF_INET6 if ":" in one.to else socket.AF_INET, 0, 0)


def _tuple(kind: int, source: str, to: str, port: int, to_port: int) -> bytes:
    first, second = (3, 4) if ":" in source else (1, 2)
    ip = attribute(first, packets.packed(source)) + attribute(second, packets.packed(to))
    protocol = attribute(1, bytes([packets.UDP]))
    protocol += attribute(2, struct.pack("!H", port)) + attribute(3, struct.pack("!H", to_port))
    return nested(kind, nested(_TUPLE_IP, ip), nested(_TUPLE_PROTO, protocol))
