# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends packets as guests do and observes how far they get: firewalls are tested, their rules are not interpreted.

A probe is one or two taps in a bridge whose other ends this process holds: whatever is written there enters as if a
guest had sent it. Chains of our own, last at their hooks, see the packet and drop it: no other rule comes after them,
and nothing leaves the host or reaches a program. Packets that don't arrive are sent once more and traced, which shows
whose chain and rule dropped them. (Packets that arrive aren't traced: with legacy iptables rules loaded, each step of
a traced packet goes to the kernel's log.)

A daemon that dies leaves nothing behind: taps disappear with their descriptors, and tables with the netlink socket
that owns them. All of this blocks, for tens of milliseconds if nothing is dropped: use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import select
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from ... import errors
from . import firewall, links, packets, prerequisites, uplink
from .rtnetlink import Netlink
from .trace import Step, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import Event

    from .uplink import Connection

NUMBERS = 128  # packets of one probe
FIRST, LAST = -2147483647, 2147483646  # within the 32-bit signed range of priorities
SLICE = 0.05  # seconds; how long a caller who wants to cancel may have to wait
LIMIT = 0.25  # seconds for packets to arrive; usually microseconds, but not on a busy machine
log = logging.getLogger(__name__)

TAKE_OUT = ("meta nftrace set 1", "drop")
# Where legacy iptables' tables sit at the hooks: NF_IP_PRI_* of linux/netfilter_ipv4.h and netfilter_ipv6.h.
_ENDS = ("input", "forward", "output")
LEGACY: dict[str, tuple[int, tuple[str, ...]]] = {
    "raw": (-300, ("prerouting", "output")),
    "mangle": (-150, ("prerouting", *_ENDS, "postrouting")),
    "filter": (0, _ENDS),
    "security": (50, _ENDS),
}
_WORDS = {4: "ip", 6: "ip6"}
FORWARDING = "3"  # state of a bridge port, BR_STATE_FORWARDING of linux/if_bridge.h
_IFF_TAP, _IFF_NO_PI, _TUNSETIFF = 0x0002, 0x1000, 0x400454CA  # linux/if_tun.h

MACS = tuple(f"52:76:64:70:72:{index:02x}" for index in range(2))  # the guest behind each tap in the bridge
OUTER = "fe:76:64:70:72:ff"  # destination of packets from outside

UNTRACKED = "untracked"  # a chain of ours, for what isn't translated for want of connection tracking

INPUT, FORWARD, BRIDGED, ANSWERED, RESOLVED = "input", "forward", "bridged", "answered", "resolved"


class Trial(NamedTuple):
    """Something that guests do, tried in several ways; one of them has to work. `end`: where its packets must arrive.

    `ways` build a frame from its number. `to`: the destination address if `end` is FORWARD; the address that DHCP's
    answer goes to if it is ANSWERED (the only kind that reaches a program, dnsmasq); with RESOLVED, ARP's answer has
    to come back. Packets from outside enter by the interface `via`, and either belong to a `connection` or go to a
    `port` (protocol, number). `source`: the prefix of guests that send packets out; `translated`: their addresses
    are, which takes connection tracking.
    """

    what: str
    version: int
    end: str
    ways: tuple[Callable[[int], bytes], ...]
    to: str = ""
    via: str = ""
    connection: Connection | None = None
    port: tuple[str, int] = ("", 0)
    source: str = ""
    translated: bool = False


class Lost(NamedTuple):
    """A trial none of whose packets arrived, with everything that nftables did to the first way's packet.

    `hook`: the last hook that the packet reached, "" if none; `through`: whether it got past that hook; `passed`: the
    LEGACY tables that it passed there. `untracked`: it would have left the host, but with a guest's address.
    """

    trial: Trial
    steps: tuple[Step, ...]
    hook: str
    through: bool
    passed: frozenset[str] = frozenset()
    untracked: bool = False


class Tap:
    """A tap that exists for as long as it is open: a port of `bridge`, or one whose packets the interface `via`
    receives.
    """

    def __init__(self, index: int, *, bridge: str = "", via: str = "") -> None:
        self.name = f"{links.PROBE}{index}"
        self._fd = os.open(links.TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("=16sH22x", self.name.encode(), _IFF_TAP | _IFF_NO_PI))
            prerequisites.set_sysctl(f"net/ipv6/conf/{self.name}/disable_ipv6", "1")
            if via:
                with Netlink() as netlink:
                    netlink.set_link(self.name, mac=OUTER, up=True)
                uplink.redirect(self.name, via)
            else:
                self._join(bridge, index)
        except BaseException:
            os.close(self._fd)
            raise

    def _join(self, bridge: str, index: int) -> None:
        with Netlink() as netlink:
            # A bridge whose MTU and MAC aren't set explicitly takes its ports' smallest MTU and lowest MAC.
            netlink.set_link(self.name, mtu=links.mtu(bridge), mac=f"fe:ff:ff:ff:ff:{index:02x}")
            netlink.set_link(self.name, master=bridge)
            netlink.set_port(self.name, isolated=False, locked=False, learning=False)
            netlink.add_neighbour_of_port(self.name, MACS[index])
            netlink.set_link(self.name, up=True)
        if links.read(self.name, "brport/state") != FORWARDING:
            raise errors.HostError(f"{bridge} doesn't forward at once what comes from a new port (STP)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def send(self, frame: bytes) -> None:
        os.write(self._fd, frame)

    def numbers(self) -> set[int]:
        """The numbers of the packets that have come out of this tap."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                found.add(packets.number_in(os.read(self._fd, 1 << 16)))
        return found


class Probe:
    """Runs trials on a bridge; use it in a with statement. Raises HostError or OSError if trying is impossible."""

    def __init__(self, bridge: str, trials: Sequence[Trial], over: Event) -> None:
        self._bridge = bridge
        self._trials = list(trials)
        self._over = over
        self._first = self._next = random.randrange(1, 0xFFFF - NUMBERS)
        self._stack = contextlib.ExitStack()
        self._count = 1 + any(trial.end == BRIDGED for trial in trials)
        self._tracing = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._taps = [stack.enter_context(Tap(index, bridge=self._bridge)) for index in range(self._count)]
            self._outer: dict[str, Tap] = {}
            self._trials = self._possible(stack)
            self._nft = stack.enter_context(firewall.Owning())
            self._tracer = stack.enter_context(Tracer())
            self._nft.run(self._last())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _possible(self, stack: contextlib.ExitStack) -> list[Trial]:
        """The trials that this kernel supports; not every kernel can inject packets from outside."""
        found = []
        conntrack = stack.enter_context(uplink.Conntrack())
        for trial in self._trials:
            try:
                if trial.via and trial.via not in self._outer:
                    index = len(MACS) + len(self._outer)
                    self._outer[trial.via] = stack.enter_context(Tap(index, via=trial.via))
                if trial.connection is not None:
                    conntrack.enter(trial.connection)
            except OSError as exc:
                log.debug("%s can't be tried: %s", trial.what, exc)
            else:
                found.append(trial)
        return found

    def lost(self) -> list[Lost]:
        """The trials that failed: first in their first way, then in all their ways."""
        left = self._not_arrived(self._trials, first=True)
        if left:
            left = self._not_arrived(left, first=False)
        return [lost for trial in left if (lost := self._traced(trial)) is not None]

    def _not_arrived(self, trials: Sequence[Trial], *, first: bool) -> list[Trial]:
        sent: dict[int, Trial] = {}
        for trial in trials:
            for way in trial.ways[:1] if first else trial.ways:
                if (number := self._send(way, trial)) is not None:
                    sent[number] = trial
        waiting, until = list(trials), time.monotonic() + LIMIT
        while waiting and self._readable(until):
            ends = [step for step in self._tracer.steps() if _took_out(step)]
            come_over = self._come_over()
            for number, trial in sent.items():
                if trial in waiting and _is_there(trial, number, ends, come_over):
                    waiting.remove(trial)
        return waiting

    def _traced(self, trial: Trial) -> Lost | None:
        """Send a trial again with tracing; None if it arrived this time, or if the trace shows nothing."""
        if not self._tracing:
            self._nft.run(self._marks())
            self._tracing = True
        number = self._send(trial.ways[0], trial)
        steps: list[Step] = []
        answers = set[int]()
        until = time.monotonic() + LIMIT
        while self._readable(until):
            for step in self._tracer.steps():
                if (step.table, step.chain) == (firewall.PROBE, "answer"):
                    answers.add(step.packet)
                if trial.end == RESOLVED:
                    mine = step.number == 0 and step.family in ("arp", "bridge", "netdev")
                else:
                    mine = step.packet in answers if trial.end == ANSWERED else step.number == number
                if mine:
                    steps.append(step)
            if _is_there(trial, number, list(filter(_took_out, steps)), self._come_over()):
                return None
            if any(step.verdict == "drop" and step.table != firewall.PROBE for step in steps):
                break
        marks = [step.chain.partition("_") for step in steps if step.table == firewall.PROBE and "_" in step.chain]
        marks = [mark for mark in marks if mark[0] != "last"]
        hook, through = (marks[-1][2], marks[-1][0] == "behind") if marks else ("", False)
        passed = frozenset(mark[0] for mark in marks if mark[2] == hook)
        theirs = tuple(step for step in steps if step.table != firewall.PROBE)
        untracked = any((step.table, step.chain) == (firewall.PROBE, UNTRACKED) for step in steps)
        return Lost(trial, theirs, hook, through, passed, untracked) if number is not None else None

    def _send(self, way: Callable[[int], bytes], trial: Trial) -> int | None:
        """Send a packet; its number, or None when all numbers are used."""
        if trial.end == ANSWERED:  # a number outside the range that our chains drop
            self._taps[0].send(way(self._first + NUMBERS))
            return self._first + NUMBERS
        number = self._next
        if number >= self._first + NUMBERS:
            return None
        self._next += 1
        (self._outer[trial.via] if trial.via else self._taps[0]).send(way(number))
        return number

    def _come_over(self) -> set[int]:
        """The numbers of packets that have come out of the bridge."""
        return set[int]().union(*(tap.numbers() for tap in self._taps))

    def _readable(self, until: float) -> bool:
        """Wait for something to read; False on timeout. Raises OSError (ECANCELED) once the probe is cancelled."""
        ends = [self._tracer.fileno(), *(tap.fileno() for tap in self._taps)]
        while not self._over.is_set():
            rest = min(SLICE, until - time.monotonic())
            if select.select(ends, [], [], max(0.0, rest))[0]:
                return True
            if rest < SLICE:
                return False
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def _last(self) -> str:
        """Our tables: they drop our packets where they arrive, and keep them away from other ports."""
        last: dict[str, list[str]] = {"last_input": [], "last_postrouting": []}
        for version, word in _WORDS.items():
            ours = self._ours(version)
            last["last_input"] += [f'iifname "{self._bridge}" {ours} {what}' for what in TAKE_OUT]
            if to := ", ".join({one.to for one in self._trials if one.to and one.version == version}):
                last["last_postrouting"] += [f"{word} daddr {{ {to} }} {ours} {what}" for what in TAKE_OUT]
        chains = [_chain(name, name.partition("_")[2], LAST, body) for name, body in last.items()]
        untracked = [
            f"{self._ours(one.version)} {_WORDS[one.version]} daddr {one.to} ct state untracked {what}"
            for one in self._trials
            for what in TAKE_OUT
            if one.translated
        ]
        chains.append(_chain(UNTRACKED, "postrouting", LAST - 2, untracked))
        answers = [f"{one} {what}" for one in self._answers() for what in TAKE_OUT]
        chains.append(_chain("last_answer", "postrouting", LAST, answers))
        # No other port gets our packets, and a broadcast to the host isn't mistaken for one sent across the bridge.
        ours = f'iifname "{links.PROBE}*"'
        lines = [f'{ours} oifname != "{links.PROBE}*" drop', f"{ours} ether daddr != {MACS[1]} drop"]
        lines.append(f'oifname "{links.PROBE}*" iifname != "{links.PROBE}*" drop')
        bridged = _chain("apart", "forward", FIRST, lines)
        return _table("inet", chains) + _table("bridge", [bridged])

    def _marks(self) -> str:
        """Tables that have our packets traced, and that show between which hooks one was lost."""
        chains = [
            _chain(f"{where}_{hook}", hook, priority, [])
            for hook in ("prerouting", "input", "forward", "output", "postrouting")
            # After the rule that starts the trace, and before the last chain that drops the packet.
            for where, priority in (("before", FIRST + 1), ("behind", LAST - 1))
        ]
        chains += [
            _chain(f"{table}_{hook}", hook, at + 1, []) for table, (at, hooks) in LEGACY.items() for hook in hooks
        ]
        for version in (4, 6):
            lines = [f'iifname "{via}" {self._ours(version)} meta nftrace set 1' for via in self._outer]
            chains.append(_chain(f"traced{version}", "prerouting", FIRST, lines))
        answers = [f"{one} meta nftrace set 1" for one in self._answers()]
        chains.append(_chain("answer", "output", FIRST, answers))
        traced = _chain("traced", "prerouting", FIRST, [f'iifname "{links.PROBE}*" meta nftrace set 1'])
        arp = [
            _chain(hook, hook, FIRST, [f'{way} "{self._bridge}" arp {end} ether {MACS[0]} meta nftrace set 1'])
            for hook, way, end in (("input", "iifname", "saddr"), ("output", "oifname", "daddr"))
        ]
        return _table("inet", chains) + _table("bridge", [traced]) + _table("arp", arp)

    def _answers(self) -> list[str]:
        """Matches of answers from DHCP to requests that only we have made."""
        mine = [trial.to for trial in self._trials if trial.end == ANSWERED]
        return [f'oifname "{self._bridge}" ip daddr {to} udp sport 67 udp dport 68' for to in mine]

    def _ours(self, version: int) -> str:
        """The match that recognises our packets by their number."""
        where = {4: "meta nfproto ipv4 @nh,32,16", 6: "meta nfproto ipv6 @nh,16,16"}[version]
        return f"{where} {self._first}-{self._first + NUMBERS - 1}"


def _is_there(trial: Trial, number: int | None, ends: list[Step], come_over: set[int]) -> bool:
    match trial.end:
        case "resolved":
            return packets.ARP_REPLY in come_over
        case "bridged":
            return number in come_over
        case "answered":
            return any(step.chain == "last_answer" for step in ends)
    return any(step.number == number and step.chain != "last_answer" for step in ends)


def _took_out(step: Step) -> bool:
    return step.table == firewall.PROBE and step.chain.startswith("last_") and step.handle != 0


def _table(family: str, chains: list[str]) -> str:
    return f"table {family} {firewall.PROBE} {{\n\tflags owner;\n" + "\n".join(chains) + "\n}\n"


def _chain(name: str, hook: str, priority: int, lines: list[str]) -> str:
    head = f"type filter hook {hook} priority {priority}; policy accept;"
    return "\n".join([f"\tchain {name} {{", f"\t\t{head}", *(f"\t\t{line}" for line in lines), "\t}"])
