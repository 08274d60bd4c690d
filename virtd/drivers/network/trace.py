# SPDX-License-Identifier: LGPL-2.1-or-later
"""What nftables did with a packet, rule by rule, as the kernel tells it of packets that are traced.

It is what `nft monitor trace` shows. The layout of the messages (NFT_MSG_TRACE) is include/uapi/linux/netfilter/
nf_tables.h's.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

from . import packets
from .netlink import attributes
from .watch import NETLINK_NETFILTER

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUP = 9  # NFNLGRP_NFTRACE
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
_TRACE = 10 << 8 | 17  # NFNL_SUBSYS_NFTABLES, NFT_MSG_TRACE
_HEADER = struct.Struct("=IHHII")
_TABLE, _CHAIN, _RULE, _VERDICT, _ID, _NETWORK_HEADER, _POLICY = 1, 2, 3, 5, 6, 8, 16
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_DROP, _ACCEPT, _JUMP, _GOTO = 0, 1, -3, -4


class Step(NamedTuple):
    """One thing that happened to the packet `number`, see packets.py; 0 where the message doesn't say.

    `packet` is the kernel's own number, the same for all that happens in one place (a hook) of its way.
    `handle` is the rule's, 0 for the policy of a chain. `verdict`: "drop", "accept", "jump", "continue" and so on, of
    which only the first three matter here; `target` is where a jump goes.
    """

    packet: int
    number: int
    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    target: str


class Tracer:
    """Hears of all packets that are traced in this network namespace. Close it, or use it in a with statement."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._numbers: dict[int, int] = {}
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, _GROUP)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def steps(self) -> Iterator[Step]:
        """What has been told by now."""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno == errno.ENOBUFS:  # somebody traces a lot; what is missing is taken for not seen
                    continue
                raise
            for step in parse(data):
                # The packet's header comes with the first step in each place only.
                if step.number:
                    self._numbers[step.packet] = step.number
                yield step._replace(number=self._numbers.get(step.packet, 0))


def parse(data: bytes) -> Iterator[Step]:
    """The steps in what a netlink socket has received; what can't be read is passed over."""
    while len(data) >= _HEADER.size:
        length, kind, *_rest = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        if kind == _TRACE:
            with contextlib.suppress(struct.error, LookupError):
                yield _step(data[_HEADER.size : length])
        data = data[length + 3 & ~3 :]


def _step(body: bytes) -> Step:
    found = dict(attributes(body[4:]))  # after struct nfgenmsg
    verdict = found.get(_VERDICT, b"")
    if verdict:
        inner = dict(attributes(verdict))
        code = int.from_bytes(inner[_VERDICT_CODE], "big", signed=True)
        target = _text(inner.get(_VERDICT_CHAIN, b""))
    else:
        code, target = int.from_bytes(found[_POLICY], "big", signed=True), ""
    words = {_DROP: "drop", _ACCEPT: "accept", _JUMP: "jump", _GOTO: "jump"}
    return Step(
        int.from_bytes(found.get(_ID, b""), "big"),
        packets.number_of(found.get(_NETWORK_HEADER, b"")),
        _FAMILIES.get(body[0], str(body[0])),
        _text(found[_TABLE]),
        _text(found[_CHAIN]),
        int.from_bytes(found.get(_RULE, b""), "big"),
        words.get(code if code < 0 else code & 0xFF, "continue"),
        target,
    )


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
