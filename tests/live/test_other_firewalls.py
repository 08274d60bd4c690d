# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rulesets of other people's, in the shapes that hosts have: what guests can't do for them is told, with the chain
and commands that help, and nothing else is. These commands are carried out as they are.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.live.networks import OUTSIDE, define, info, neighbour, network, outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

INPUT, FORWARD, OVER = (
    "What its guests ask of the host",
    "What its guests send outside",
    "What its guests send to each",
)
DHCP = "What the host answers to its guests' DHCP"
BACK, PORT = "What is answered from outside", "What comes from outside for port 8080 (tcp)"


def table(name: str, *parts: str) -> str:
    return f"table {name} {{\n" + "\n".join(parts) + "\n}\n"


def base(name: str, hook: str, *rules: str, priority: str = "filter", policy: str = "drop") -> str:
    return part("chain", name, f"type filter hook {hook} priority {priority}; policy {policy};", *rules)


def part(kind: str, name: str, *lines: str) -> str:
    return "\n".join([f"{kind} {name} {{", *lines, "}"])


STRICT = base("input", "input", "iif lo accept", "ct state established,related accept", "tcp dport 22 accept")
ANSWERS = "ct state established,related accept"
FORWARDED = "ct status dnat accept"
OVER_IT = 'iifname "vd-lab" oifname "vd-lab" accept'

# What hosts drop: by whom, and of what guests do.
DROPPING: dict[str, tuple[str, dict[str, str]]] = {
    "a strict input": (table("inet filter", STRICT), {INPUT: "inet filter input"}),
    "a policy of forward": (
        table("ip filter", base("FORWARD", "forward")),
        {FORWARD: "ip filter FORWARD", OVER: "ip filter FORWARD"},
    ),
    "what belongs to a connection alone": (
        table("inet filter", base("forward", "forward", ANSWERS)),
        {FORWARD: "inet filter forward", OVER: "inet filter forward"},
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
    "a strict output": (
        table("inet filter", base("output", "output", "oif lo accept", ANSWERS, "meta l4proto { 1, 58 } accept")),
        {DHCP: "inet filter output"},
    ),
    "answers": (
        table("inet filter", base("forward", "forward", 'iifname "vd-lab" accept', "ct status dnat accept")),
        {BACK: "inet filter forward"},
    ),
    "a forwarded port": (
        table("inet filter", base("forward", "forward", 'iifname "vd-lab" accept', ANSWERS)),
        {PORT: "inet filter forward"},
    ),
    "a forwarded port, early": (
        table("inet raw", base("r", "prerouting", "tcp dport 8080 drop", priority="raw", policy="accept")),
        {PORT: "inet raw r"},
    ),
    "what a bridge forwards": (
        table("bridge filter", base("forward", "forward", "ether type arp accept")),
        {OVER: "bridge filter forward"},
    ),
}  # fmt: skip

# What cuts guests off without dropping any of their IP packets. (One whose neighbours are known already goes on.)
WITHOUT_A_DROP: dict[str, tuple[str, dict[str, str]]] = {
    "ARP": (
        table("arp filter", base("in", "input", 'iifname "vd-lab" counter drop', policy="accept")),
        {INPUT: "arp filter in"},
    ),
    "ARP's answers": (
        table("arp filter", base("out", "output", 'oifname "vd-lab" counter drop', policy="accept")),
        {INPUT: "arp filter out"},
    ),
    "no connection tracking": (
        table("ip raw", base("early", "prerouting", 'iifname "vd-lab" notrack', priority="raw", policy="accept")),
        {FORWARD: "ip raw early"},
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
        base(
            "forward", "forward", 'iifname "vd-*" accept', 'oifname "vd-*" ct state vmap { established : accept }',
            FORWARDED,
        ),
    ),
    "an output": table("inet filter", base("output", "output", "oif lo accept", 'oifname "vd-lab" accept', ANSWERS)),
    "a bare accept": table("ip filter", base("INPUT", "input", "accept"), base("FORWARD", "forward", "accept")),
    "everybody but some": table("ip filter", base("FORWARD", "forward", 'iifname != "eth0" accept', ANSWERS)),
    "chains, maps and marks": table(
        "inet host",
        part("chain", "yes", "ct mark set 9", "meta mark set 9", "return"),
        part("chain", "guests", "jump yes", "meta mark 9 accept"),
        base("in", "input", 'iifname vmap { "vd-lab" : jump guests }'),
        base(
            "to", "forward", ANSWERS, FORWARDED,
            'iifname . oifname vmap { "vd-lab" . "up0" : goto guests, "vd-lab" . "vd-lab" : accept }',
        ),
    ),
    "several tables": table("inet a", base("f", "forward", 'iifname "eth0" drop', "accept", priority="-5"))
    + table("ip b", base("f", "forward", "ip saddr 10.77.0.0/16 accept", "ip daddr 10.77.7.0/24 accept")),
    "what guests need": table(
        "inet filter",
        base("input", "input", 'iifname "vd-lab" udp dport { 53, 67 } accept'),
        base("forward", "forward", ANSWERS, FORWARDED, OVER_IT, 'iifname "vd-lab" tcp dport { 80, 443 } accept'),
    ),
    "names alone": table(
        "inet filter",
        base(
            "forward", "forward", ANSWERS, FORWARDED, OVER_IT,
            'iifname "vd-lab" udp dport 53 limit rate 100/second accept',
        ),
    ),
    "docker's exceptions": table(
        "ip filter",
        part("chain", "DOCKER-USER", 'iifname "vd-lab" accept', f'oifname "vd-lab" {ANSWERS}', FORWARDED),
        base("FORWARD", "forward", "jump DOCKER-USER", 'iifname "docker0" accept'),
    ),
}  # fmt: skip


@pytest.fixture
def net(lab: Lab) -> Iterator[Lab]:
    define(lab, network("lab", 7, more='[[forward]]\nport = 8080\nto = "10.77.7.9"\n'))
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
        # Several that one chain drops on the same way are one sentence.
        what = next(what for what in (INPUT, FORWARD, OVER, DHCP, BACK, PORT) if problem["text"].startswith(what))
        found[what] = " ".join(problem["text"].partition(" by the chain ")[2].split()[:3]).rstrip(",")
    return found


def mended(lab: Lab, name: str = "lab") -> None:
    """Carry out what is said to help."""
    for hint in [problem["hint"] for problem in problems(lab, name)]:
        assert lab.sh(f"{hint} && echo done").endswith("done\n"), hint
    lab.wait("the end of it", lambda: problems(lab, name) == [], 60)


def test_what_is_dropped_is_told_and_the_hint_mends_it(net: Lab) -> None:
    def passes() -> bool:
        return net.run(*inside.split(), "ping", "-c1", "-W2", OUTSIDE, check=False).returncode == 0

    with neighbour(net, "n1", "vd-lab", "10.77.7.50/24", "10.77.7.1") as inside:
        assert passes()
        for name, (text, expected) in DROPPING.items():
            with rules(net, text):
                net.wait(f"what is dropped by {name}", lambda expected=expected: told(net) == expected, 60)
                assert passes() is not bool({FORWARD, BACK} & expected.keys()), name
                mended(net)
                assert passes(), name


def test_what_cuts_guests_off_in_other_ways(net: Lab) -> None:
    for name, (text, expected) in WITHOUT_A_DROP.items():
        with rules(net, text):
            net.wait(f"what is dropped by {name}", lambda expected=expected: told(net) == expected, 60)
            mended(net)


def test_what_is_let_through_is_not_told(net: Lab) -> None:
    for name, text in ACCEPTING.items():
        with rules(net, table("inet before", STRICT)):
            net.wait("something that is dropped", lambda: told(net) == {INPUT: "inet before input"}, 60)
            with rules(net, text):
                net.sh("nft delete table inet before")
                # What is seen to be over was looked at beside these.
                net.wait(f"nothing by {name}", lambda: problems(net) == [], 60)
                assert net.virtdctl("status", check=False).returncode == 0


def test_other_ways_out(net: Lab) -> None:
    """Nobody's rules change, but where packets go does, or which interface has the name that they mean."""
    allowed = base("forward", "forward", 'oifname "up0" accept', 'iifname "up0" accept', OVER_IT)
    asked = base("input", "input", "iif vd-lab accept", "iif lo accept")
    with rules(net, table("inet before", STRICT)):
        net.wait("something that is dropped", lambda: told(net) == {INPUT: "inet before input"}, 60)
        with rules(net, table("inet filter", allowed, asked)):
            net.sh("nft delete table inet before")
            net.wait("nothing", lambda: problems(net) == [], 60)
            net.sh("ip link add vpn0 type veth peer name vpn1; ip link set vpn0 up; ip link set vpn1 up")
            try:
                net.sh("ip route add 0.0.0.0/1 dev vpn0; ip route add 128.0.0.0/1 dev vpn0")
                net.wait("what is dropped on the new way", lambda: FORWARD in told(net), 60)
            finally:
                net.sh("ip link del vpn0")
            net.sh("ip link del vd-lab")
            net.wait("what the new bridge's guests can't ask", lambda: INPUT in told(net), 60)


def test_ipv6(lab: Lab) -> None:
    six = '[ipv6]\naddress = "fd77:7::1/64"\nfirst = "fd77:7::100"\nlast = "fd77:7::1ff"\n'
    define(lab, network("lab", 7, more=f'{six}[[forward]]\nport = 8080\nto = "fd77:7::9"\n'))
    strict = table(
        "ip6 filter", base("input", "input", "iif lo accept"), base("forward", "forward", 'iifname "eth0" accept')
    )
    with outside(lab), rules(lab, strict):
        expected = {INPUT: "ip6 filter input", FORWARD: "ip6 filter forward", OVER: "ip6 filter forward"}
        lab.wait("what is dropped", lambda: told(lab) == expected, 60)
        (asked,) = [problem["text"] for problem in problems(lab) if problem["text"].startswith(INPUT)]
        assert "(DNS, DHCPv6 and ICMPv6)" in asked
        mended(lab)
        # What is left of it, for guests, is what there was.
        lab.sh("nft flush chain ip6 filter forward")
        lab.wait("what is dropped", lambda: told(lab) == {FORWARD: expected[FORWARD], OVER: expected[OVER]}, 60)


def test_what_was_found_outlives_the_daemon(net: Lab) -> None:
    """It is told by the next one at once, and nothing is sent for it again: a look makes an interface."""
    with rules(net, table("inet filter", STRICT)):
        net.wait("what is dropped", lambda: told(net) == {INPUT: "inet filter input"}, 60)
        said = problems(net)

        def noted() -> bool:
            record = json.loads(net.sh("cat /run/virtd/network/lab.json"))
            return bool(record["data"].get("obstacles", {}).get("found"))

        net.wait("its record", noted, 30)
        net.sh("sleep 3")  # what came of it is looked at once more, perhaps
        index = net.sh("ip link add one type veth peer name other; cat /sys/class/net/one/ifindex; ip link del one")
        begun = net.sh("date +%s").strip()
        for way in ("systemctl restart virtd.service", "systemctl kill -s KILL virtd.service; sleep 1"):
            net.sh(way)
            net.wait("its answer", lambda: net.virtdctl("list", check=False).returncode == 0, 30)
            net.virtdctl("status", check=False)
            assert problems(net) == said
        net.sh("sleep 2")
        again = net.sh("ip link add one type veth peer name other; cat /sys/class/net/one/ifindex; ip link del one")
        assert int(again) - int(index) == 2
        assert "is dropped by" not in net.sh(f"journalctl -u virtd.service -o cat --since @{begun}")


def test_an_isolated_network_and_ports_that_are(lab: Lab) -> None:
    """What virtd itself keeps guests from is no other's doing."""
    define(lab, network("lab", 7, head='mode = "isolated"'))
    define(lab, network("apart", 8, head="isolated_ports = true"))
    text = table("inet filter", STRICT, base("forward", "forward"))
    with rules(lab, text):
        lab.wait("both", lambda: told(lab).keys() == {INPUT, OVER} and told(lab, "apart").keys() == {INPUT}, 60)


def test_a_bridge_of_the_hosts_under_br_netfilter(lab: Lab) -> None:
    """With an address and without; neighbours reach each other again by what is said to help."""
    make = "ip link add br0 type bridge; ip link set br0 up; ip address add 10.9.0.1/24 dev br0"
    calls = "net.bridge.bridge-nf-call-iptables"
    lab.sh(make)
    try:
        mac = lab.sh("cat /sys/class/net/br0/address")
        with rules(lab, table("ip filter", base("FORWARD", "forward"))):
            define(lab, 'name = "lan"\nmode = "bridge"\nbridge = "br0"\n')
            # One without ports is left alone: it would have a MAC of ours for a moment, and none from then on.
            define(lab, network("lab", 7))
            lab.wait("what is dropped", lambda: told(lab), 60)
            assert (problems(lab, "lan"), lab.sh("cat /sys/class/net/br0/address")) == ([], mac)
        with (
            neighbour(lab, "n1", "br0", "10.9.0.11/24", "10.9.0.1") as inside,
            neighbour(lab, "n2", "br0", "10.9.0.12/24", "10.9.0.1"),
        ):

            def passes() -> bool:
                return lab.run(*inside.split(), "ping", "-c1", "-W2", "10.9.0.12", check=False).returncode == 0

            mac = lab.sh("cat /sys/class/net/br0/address")
            for address in ("", "ip address flush dev br0"):
                lab.sh(address)
                with rules(lab, table("ip filter", base("FORWARD", "forward"))):
                    lab.wait("what is dropped", lambda: told(lab, "lan") == {OVER: "ip filter FORWARD"}, 60)
                    said = problems(lab, "lan")
                    assert "br_netfilter" in said[0]["text"]
                    assert not passes()
                    mended(lab, "lan")
                    assert passes()
                    # Of settings nobody tells: it is looked at again while there is a problem.
                    lab.sh("nft flush chain ip filter FORWARD")
                    lab.wait("what is dropped", lambda said=said: problems(lab, "lan") == said, 60)
                    lab.sh(f"sysctl -qw {calls}=0")
                    lab.wait("nothing", lambda: problems(lab, "lan") == [], 90)
                    lab.sh(f"sysctl -qw {calls}=1")
            assert lab.sh("cat /sys/class/net/br0/address") == mac
    finally:
        lab.sh("ip link del br0")


def test_nothing_of_a_probe_is_left_by_a_daemon_that_dies(net: Lab) -> None:
    """Nor by a stop in its midst; and no lease is given, and nothing reaches the outside."""
    counting = table("ip heard", base("heard", "prerouting", "counter", policy="accept"))
    net.run("ip", "netns", "exec", "outside", "nft", "-f", "-", stdin=counting)
    with rules(net, table("inet filter", STRICT, base("forward", "forward"))):
        for _ in range(12):
            # Now and then it is in the middle of a look, which takes most of a second here.
            net.sh("nft add rule inet filter forward ip daddr 192.0.2.1 accept; sleep 0.$((RANDOM % 10))")
            net.sh("systemctl kill -s KILL virtd.service")
            net.wait("its answer", lambda: net.virtdctl("list", check=False).returncode == 0, 30)
        net.wait("what is dropped", lambda: told(net).keys() == {INPUT, FORWARD, OVER}, 60)
        net.sh("nft add rule inet filter forward ip daddr 192.0.2.1 accept; sleep 0.4")
        net.virtdctl("network", "stop", "lab")
        assert net.sh("nft list tables").split() == ["table", "inet", "filter"]
        assert "vt--probe" not in net.sh("ls /sys/class/net")
    assert net.json("fsck")["differences"] == []
    assert "counter packets 0 " in net.sh("ip netns exec outside nft list table ip heard")
