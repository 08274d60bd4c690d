# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rulesets of other people's, in the shapes that hosts have: what guests can't do for them is told, with the chain
and commands that help, and nothing else is. These commands are carried out as they are.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.live.networks import OUTSIDE, define, info, neighbour, network, outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

INPUT, FORWARD, OVER = "ask of the host", "send outside", "send to each other"


def table(name: str, *parts: str) -> str:
    return f"table {name} {{\n" + "\n".join(parts) + "\n}\n"


def base(name: str, hook: str, *rules: str, priority: str = "filter", policy: str = "drop") -> str:
    return part("chain", name, f"type filter hook {hook} priority {priority}; policy {policy};", *rules)


def part(kind: str, name: str, *lines: str) -> str:
    return "\n".join([f"{kind} {name} {{", *lines, "}"])


STRICT = base("input", "input", "iif lo accept", "ct state established,related accept", "tcp dport 22 accept")
ANSWERS = "ct state established,related accept"
OVER_IT = 'iifname "vd-lab" oifname "vd-lab" accept'

# What hosts drop: by whom, and of what guests do.
DROPPING: dict[str, tuple[str, dict[str, str]]] = {
    "a strict input": (table("inet filter", STRICT), {INPUT: "inet filter input"}),
    "a policy of forward": (
        table("ip filter", base("FORWARD", "forward")),
        {FORWARD: "ip filter FORWARD", OVER: "ip filter FORWARD"},
    ),
    "a reject at the end": (
        table("ip filter", base("FORWARD", "forward", "reject", policy="accept")),
        {FORWARD: "ip filter FORWARD", OVER: "ip filter FORWARD"},
    ),
    "docker's": (
        table(
            "ip filter",
            part("chain", "DOCKER-USER", "counter return"),
            base("FORWARD", "forward", "jump DOCKER-USER", 'iifname "docker0" accept'),
        ),
        {FORWARD: "ip filter FORWARD", OVER: "ip filter FORWARD"},
    ),
    "a map and other chains": (
        table(
            "inet host",
            part("set", "servers", 'type ifname; elements = { "eth0", "wg0" }'),
            part("chain", "deepest", "counter drop"),
            part("chain", "deep", "meta l4proto udp jump deepest"),
            part("chain", "guests", "jump deep"),
            base(
                "in", "input", 'iifname vmap { "lo" : accept, "vd-lab" : jump guests }',
                priority="-10", policy="accept",
            ),
            base(
                "to", "forward", "iifname @servers accept", "ip saddr 10.0.0.0/8 goto deepest",
                priority="10", policy="accept",
            ),
        ),
        {INPUT: "inet host in", FORWARD: "inet host to", OVER: "inet host to"},
    ),
    "bogons, before everything else": (
        table(
            "inet raw",
            part("set", "bogons", "type ipv4_addr; flags interval; elements = { 0.0.0.0/8, 10.77.0.0/16 }"),
            base("early", "prerouting", "ip saddr @bogons drop", priority="raw", policy="accept"),
        ),
        {INPUT: "inet raw early", FORWARD: "inet raw early", OVER: "inet raw early"},
    ),
    "DHCP alone": (
        table("inet filter", base("input", "input", "udp dport 67 drop", priority="5", policy="accept")),
        {INPUT: "inet filter input"},
    ),
    "a mark that is set for others": (
        table("inet m", base("m", "prerouting", 'iifname "eth0" meta mark set 7', priority="-150", policy="accept"))
        + table("inet filter", base("forward", "forward", "meta mark 7 accept")),
        {FORWARD: "inet filter forward", OVER: "inet filter forward"},
    ),
    "what a bridge forwards": (
        table("bridge filter", base("forward", "forward", "ether type arp accept")),
        {OVER: "bridge filter forward"},
    ),
}  # fmt: skip

# What lets everything through in the end, though it may look as if it didn't.
ACCEPTING: dict[str, str] = {
    "a set": table(
        "inet filter",
        base("input", "input", 'iifname { "vd-lab", "eth0" } accept'),
        base("forward", "forward", 'iifname { "vd-lab", "eth0" } accept', 'oifname { "vd-lab", "eth0" } accept'),
    ),
    "a wildcard": table(
        "inet filter",
        base("input", "input", 'iifname "vd-*" accept'),
        base("forward", "forward", 'iifname "vd-*" accept', 'oifname "vd-*" ct state vmap { established : accept }'),
    ),
    "a bare accept": table("ip filter", base("INPUT", "input", "accept"), base("FORWARD", "forward", "accept")),
    "everybody but some": table("ip filter", base("FORWARD", "forward", 'iifname != "eth0" accept', ANSWERS)),
    "chains, maps and marks": table(
        "inet host",
        part("chain", "yes", "ct mark set 9", "meta mark set 9", "return"),
        part("chain", "guests", "jump yes", "meta mark 9 accept"),
        base("in", "input", 'iifname vmap { "vd-lab" : jump guests }'),
        base(
            "to", "forward", ANSWERS,
            'iifname . oifname vmap { "vd-lab" . "up0" : goto guests, "vd-lab" . "vd-lab" : accept }',
        ),
    ),
    "several tables": table("inet a", base("f", "forward", 'iifname "eth0" drop', "accept", priority="-5"))
    + table("inet b", base("f", "forward", "ip saddr 10.77.0.0/16 accept", ANSWERS, priority="5")),
    "what guests need": table(
        "inet filter",
        base("input", "input", 'iifname "vd-lab" udp dport { 53, 67 } accept'),
        base("forward", "forward", ANSWERS, OVER_IT, 'iifname "vd-lab" tcp dport { 80, 443 } accept'),
    ),
    "names alone": table(
        "inet filter",
        base("forward", "forward", ANSWERS, OVER_IT, 'iifname "vd-lab" udp dport 53 limit rate 100/second accept'),
    ),
    "docker's exceptions": table(
        "ip filter",
        part("chain", "DOCKER-USER", 'iifname "vd-lab" accept', f'oifname "vd-lab" {ANSWERS}', "return"),
        base("FORWARD", "forward", "jump DOCKER-USER", 'iifname "docker0" accept'),
    ),
}  # fmt: skip


@pytest.fixture
def net(lab: Lab) -> Iterator[Lab]:
    define(lab, network("lab", 7))
    with outside(lab):
        yield lab


@contextlib.contextmanager
def rules(lab: Lab, text: str) -> Iterator[None]:
    """These, and none of them afterwards."""
    lab.run("nft", "-f", "-", stdin=text)
    try:
        yield
    finally:
        for name in re.findall(r"(?m)^table (\S+ \S+)", text):
            lab.sh(f"nft delete table {name}", check=False)


def problems(lab: Lab, name: str = "lab") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = info(lab, name)["problems"]
    return found


def told(lab: Lab, name: str = "lab") -> dict[str, str]:
    """Which chain drops what."""
    found = {}
    for problem in problems(lab, name):
        (what,) = [what for what in (INPUT, FORWARD, OVER) if f"What its guests {what}" in problem["text"]]
        found[what] = " ".join(problem["text"].partition(" by the chain ")[2].split()[:3]).rstrip(",")
    return found


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_is_told_and_the_hint_mends_it(net: Lab, name: str) -> None:
    text, expected = DROPPING[name]
    outside_ = expected.get(FORWARD) is not None

    def passes() -> bool:
        return net.run(*inside.split(), "ping", "-c1", "-W2", OUTSIDE, check=False).returncode == 0

    with neighbour(net, "n1", "vd-lab", "10.77.7.50/24", "10.77.7.1") as inside, rules(net, text):
        net.wait("what is dropped", lambda: told(net) == expected, 60)
        assert net.virtctl("status", check=False).returncode == 1
        assert passes() is not outside_ or "meta l4proto udp" in text
        for hint in [problem["hint"] for problem in problems(net)]:
            assert net.sh(f"{hint} && echo done").endswith("done\n")
        net.wait("the end of it", lambda: problems(net) == [], 60)
        assert passes()
        assert net.virtctl("status", check=False).returncode == 0


@pytest.mark.parametrize("name", ACCEPTING)
def test_what_is_let_through_is_not_told(net: Lab, name: str) -> None:
    before = table("inet before", STRICT)
    with rules(net, before):
        net.wait("something that is dropped", lambda: told(net) == {INPUT: "inet before input"}, 60)
        with rules(net, ACCEPTING[name]):
            net.sh("nft delete table inet before")
            # What is seen to be over was looked at beside these.
            net.wait("nothing", lambda: problems(net) == [], 60)
