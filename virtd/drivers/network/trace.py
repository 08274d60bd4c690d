# SPDX-License-Identifier: LGPL-2.1-or-later
"""What nftables did with a packet, rule by rule, from the trace that the kernel sends.

`nft monitor trace` shows the same. The layout of the messages (NFT_MSG_TRACE) is that of
include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from . import packets
from .netlink import NETFILTER, NFGEN, NFTABLES, Message, Multicast

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUP = 9  # NFNLGRP_NFTRACE
_TRACE = NFTABLES | 17  # NFT_MSG_TRACE
_TABLE, _CHAIN, _RULE, _VERDICT, _ID, _NETWORK_HEADER, _POLICY = 1, 2, 3, 5, 6, 8, 16
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_DROP, _ACCEPT, _JUMP, _GOTO = 0, 1, -3, -4


class Step(NamedTuple):
    """One step in the trace of the packet `number` (see packets.py; 0 if the message doesn't say).

    `packet`: the kernel's own number, the same for all steps at one hook. `handle`: the rule's, 0 for a chain's
    policy. `verdict`: "drop", "accept", "jump", "continue" and so on; only the first three matter here. `target`: the
    chain that a jump goes to.
    """

    packet: int
    number: int
    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    target: str


class Tracer(Multicast):
    """Receives the traces of this network namespace. Close it, or use it in a with statement."""

    def __init__(self) -> None:
        super().__init__(NETFILTER, _GROUP)
        self._numbers: dict[int, int] = {}

    def steps(self) -> Iterator[Step]:
        """The steps received so far."""
        for message in self.heard():
            # If messages are lost because somebody traces a lot, the missing steps count as not seen.
            if message is None or (step := parse(message)) is None:
                continue
            # Only the first step at each hook carries the packet's header.
            if step.number:
                self._numbers[step.packet] = step.number
            yield step._replace(number=self._numbers.get(step.packet, 0))


def parse(message: Message) -> Step | None:
    """The step that a message reports; None for other messages and unreadable ones."""
    if message.kind != _TRACE:
        return None
    with contextlib.suppress(struct.error, LookupError):
        return _step(message)
    return None


def _step(message: Message) -> Step:
    family, found = message.head(NFGEN)[0], message.attributes(NFGEN)
    verdict = found.within(_VERDICT)
    code = int.from_bytes(verdict[_VERDICT_CODE] if verdict else found[_POLICY], "big", signed=True)
    words = {_DROP: "drop", _ACCEPT: "accept", _JUMP: "jump", _GOTO: "jump"}
    return Step(
        found.number(_ID, "big"),
        packets.number_of(found.get(_NETWORK_HEADER, b"")),
        _FAMILIES.get(family, str(family)),
        found.text(_TABLE),
        found.text(_CHAIN),
        found.number(_RULE, "big"),
        words.get(code if code < 0 else code & 0xFF, "continue"),
        verdict.text(_VERDICT_CHAIN),
    )
