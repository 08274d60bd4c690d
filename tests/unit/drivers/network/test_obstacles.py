# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of packets that didn't arrive. tests/live/test_other_firewalls.py has real ones."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from virtd.drivers.network import firewall, hints, netlink, obstacles, packets, prerequisites, trace
from virtd.drivers.network.packets import SYN, Way
from virtd.drivers.network.probe import ANSWERED, BRIDGED, FORWARD, INPUT, RESOLVED, Lost, Trial
from virtd.drivers.network.trace import Step
from virtd.drivers.network.uplink import Connection

if TYPE_CHECKING:
    import pytest

FOUR = Way("52:54:00:00:00:01", "10.7.0.9", "56:44:00:00:00:01", "10.7.0.1")
SIX = Way("52:54:00:00:00:01", "fd00::9", "56:44:00:00:00:01", "fd00::1")


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(packet: int, chain: bytes, *more: bytes, family: int = 1, kind: int = 0x0A11) -> bytes:
    body = bytes([family, 0, 0, 0]) + attribute(1, b"filter\0") + attribute(2, chain + b"\0")
    body += attribute(6, packet.to_bytes(4, "big")) + b"".join(more)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def verdict(code: int, chain: bytes = b"") -> bytes:
    inner = attribute(1, (code & 0xFFFFFFFF).to_bytes(4, "big")) + (attribute(2, chain) if chain else b"")
    return attribute(5 | 0x8000, inner)


def test_what_the_kernel_tells_of_a_packet() -> None:
    frame = packets.udp(FOUR, 4711, 68, 67)
    jump = message(9, b"in", attribute(3, bytes(7) + b"\6"), verdict(-3, b"deep\0"), attribute(8, frame[14:54]))
    drop = message(9, b"deep", attribute(3, bytes(7) + b"\7"), verdict(0))
    policy = message(9, b"in", attribute(16, bytes(4)), family=10)
    other, cut = message(9, b"other", kind=0x0A0F), message(9, b"in")
    steps = [trace.parse(one) for one in netlink.messages(jump + drop + policy + other + cut)]
    assert steps == [
        Step(9, 4711, "inet", "filter", "in", 6, "jump", "deep"),
        Step(9, 0, "inet", "filter", "deep", 7, "drop", ""),
        Step(9, 0, "ip6", "filter", "in", 0, "drop", ""),
        None,
        None,
    ]


def test_packets_are_whole_and_known_by_their_numbers() -> None:
    for way in (FOUR, SIX):
        made = [
            packets.tcp(way, 77, 40443, 443, SYN),
            packets.udp(way, 77, 1, 2, b"odd"),
            packets.dns_query(way, 77),
            packets.ping(way, 77),
        ]
        for frame in made:
            assert packets.number_in(frame) == 77
            ip = frame[14:]
            if way is FOUR:
                assert (packets._sum(ip[:20]), int.from_bytes(ip[2:4], "big")) == (0, len(ip))
                pseudo, body = ip[12:20] + struct.pack("!II", len(ip) - 20, ip[9]), ip[20:]
                pseudo = b"" if ip[9] == packets.ICMP else pseudo
            else:
                assert int.from_bytes(ip[4:6], "big") == len(ip) - 40
                pseudo, body = ip[8:40] + struct.pack("!II", len(ip) - 40, ip[6]), ip[40:]
            assert packets._sum(pseudo + body) == 0
    assert packets.number_in(bytes(60)) == packets.number_in(b"") == packets.number_of(b"\x45") == 0
    assert packets.link_local("52:54:00:12:34:56") == "fe80::5054:ff:fe12:3456"


def found(
    monkeypatch: pytest.MonkeyPatch, lost: list[Lost], chains: list[tuple[str, str, str, str]], *programs: str
) -> list[tuple[str, str]]:
    """The problems of a bridge vd-lab."""
    monkeypatch.setattr("virtd.children.programs.find", lambda name: name if name in programs else None)
    monkeypatch.setattr(firewall, "rule", lambda _family, _table, _chain, handle: f"rule {handle}")
    there: list[dict[str, Any]] = [
        {"family": family, "table": table, "name": name} | ({"hook": hook} if hook else {})
        for family, table, name, hook in chains
    ]
    return [(one.problem.text, str(one.problem.hint)) for one in obstacles.judged(lost, there, "vd-lab")]


def step(where: str, handle: int, verdict: str = "continue", target: str = "") -> Step:
    family, table, chain = where.split()
    return Step(1, 1, family, table, chain, handle, verdict, target)


def trial(what: str, end: str, version: int = 4) -> Trial:
    return Trial(what, version, end, ())


OUT = "What its guests send outside"


def test_whose_chain_it_is_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [("inet", "filter", "in", "input"), ("inet", "filter", "deep", "")]
    steps = (step("inet filter in", 3, "jump", "deep"), step("inet filter deep", 4, "drop"))
    dhcp = Lost(trial("DHCP", INPUT), steps, "input", through=False)
    dns = Lost(trial("DNS", INPUT), (step("inet filter in", 0, "drop"),), "input", through=False)
    insert = "nft insert rule inet filter in"
    ((text, hint),) = found(monkeypatch, [dhcp, dns], own)
    assert text == (
        "What its guests ask of the host (DHCP and DNS) is dropped by the chain inet filter in (“rule 4” in deep)"
    )
    assert hint.split("; ") == [
        f"{insert} 'iifname \"vd-lab\" {what} accept'" for what in ("udp dport 67", "udp dport 53", "tcp dport 53")
    ]
    docker = [("ip", "filter", name, hook) for name, hook in (("FORWARD", "forward"), ("DOCKER-USER", ""))]
    out = Lost(trial(OUT, FORWARD), (step("ip filter FORWARD", 0, "drop"),), "forward", through=False)
    ((text, hint),) = found(monkeypatch, [out], docker, "iptables")
    assert text == f"{OUT} (IPv4) is dropped by the chain ip filter FORWARD, by its policy"
    assert hint == (
        "iptables -I DOCKER-USER -i vd-lab -j ACCEPT; "
        "iptables -I DOCKER-USER -o vd-lab -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )
    ((_, hint),) = found(monkeypatch, [out], docker)
    assert hint.startswith("nft insert rule ip filter FORWARD 'iifname \"vd-lab\" accept'; ")
    tables = [("ip", "filter", name.upper(), name) for name in ("input", "forward", "output")]
    ((_, hint),) = found(monkeypatch, [dns._replace(steps=(step("ip filter INPUT", 0, "drop"),))], tables, "iptables")
    assert hint == "; ".join(f"iptables -I INPUT -i vd-lab -p {one} --dport 53 -j ACCEPT" for one in ("udp", "tcp"))
    ufw = [*tables, ("ip", "filter", "ufw-user-input", "")]
    ((_, hint),) = found(monkeypatch, [out], ufw, "iptables")
    assert hint == "ufw route allow in on vd-lab"
    ((_, hint),) = found(monkeypatch, [out._replace(steps=(step("inet firewalld filter_FORWARD", 0, "drop"),))], [])
    assert hint == "firewall-cmd --zone=virtd --change-interface=vd-lab"
    over = Lost(trial("What its guests send to each other", BRIDGED), out.steps, "forward", through=False)
    ((text, hint),) = found(monkeypatch, [over], tables, "iptables")
    assert text.endswith("FORWARD, by its policy, to which br_netfilter shows what goes over a bridge")
    assert hint == "iptables -I FORWARD -i vd-lab -o vd-lab -j ACCEPT"


def test_what_comes_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = (step("inet fw f", 0, "drop"),)
    connection = Connection("10.7.0.9", "192.0.2.1", "9.9.9.9", 40053, 53)
    out = Lost(trial(OUT, FORWARD), drop, "forward", through=False)
    answer = out._replace(trial=Trial("What is answered", 4, FORWARD, (), via="eth0", connection=connection))
    port = out._replace(trial=Trial("What comes for port 80", 4, FORWARD, (), via="eth0", port=("tcp", 80)))
    forward = [("inet", "fw", "f", "forward")]
    insert = "nft insert rule inet fw f"
    answers = f"{insert} 'oifname \"vd-lab\" ct state established,related accept'"
    forwarded = f"{insert} 'oifname \"vd-lab\" ct status dnat accept'"
    # What helps what is sent out helps the answers: it is told once.
    ((text, hint),) = found(monkeypatch, [out, answer, port], forward)
    assert text.startswith(f"{OUT} and what comes for port 80 (IPv4) is dropped")
    assert hint.split("; ") == [f"{insert} 'iifname \"vd-lab\" accept'", answers, forwarded]
    ((_, hint),) = found(monkeypatch, [answer, port], forward)
    assert hint.split("; ") == [answers, forwarded]
    lease = out._replace(trial=trial("What the host answers to its guests' DHCP", ANSWERED), hook="output")
    ((text, hint),) = found(monkeypatch, [lease], [("inet", "fw", "f", "output")])
    assert text == "What the host answers to its guests' DHCP (IPv4) is dropped by the chain inet fw f, by its policy"
    assert hint == f"{insert} 'oifname \"vd-lab\" udp dport 68 accept'"
    # Where nobody knows yet which way it will leave.
    ((_, hint),) = found(monkeypatch, [answer, port], [("inet", "fw", "f", "prerouting")])
    assert hint.split("; ") == [
        f"{insert} 'iifname \"eth0\" ct state established,related accept'",
        f"{insert} 'iifname \"eth0\" tcp dport 80 accept'",
    ]
    tables = [("ip", "filter", name.upper(), name) for name in ("input", "forward", "output")]
    drop = (step("ip filter FORWARD", 0, "drop"),)
    ((_, hint),) = found(monkeypatch, [port._replace(steps=drop)], tables, "iptables")
    assert hint == "iptables -I FORWARD -o vd-lab -m conntrack --ctstate DNAT -j ACCEPT"


def test_what_isnt_nftables_and_what_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Lost(trial(OUT, FORWARD), (step("ip filter FORWARD", 5, "accept"),), "forward", through=False)
    monkeypatch.setattr(prerequisites, "legacy_tables", lambda file: ["filter"] if file == "ip_tables_names" else [])
    ((text, hint),) = found(monkeypatch, [lost], [])
    assert text == f"{OUT} (IPv4) is dropped by legacy iptables, in its chain FORWARD"
    assert hint.startswith("iptables-legacy -I FORWARD -i vd-lab -j ACCEPT; iptables-legacy -I FORWARD -o vd-lab ")
    assert hint.endswith("; virtdctl reload")
    # By how far it came at that hook: not to the chain of the table that comes next.
    monkeypatch.setattr(prerequisites, "legacy_tables", lambda _file: ["security", "filter", "mangle", "raw"])
    for passed, table in ((set(), "mangle"), ({"mangle"}, "filter"), ({"mangle", "filter"}, "security")):
        ((text, hint),) = found(monkeypatch, [lost._replace(passed=frozenset(passed))], [])
        where, option = ("", "") if table == "filter" else (f" of the table {table}", f"-t {table} ")
        assert text == f"{OUT} (IPv4) is dropped by legacy iptables, in its chain FORWARD{where}"
        assert hint.startswith(f"iptables-legacy {option}-I FORWARD -i vd-lab -j ACCEPT; ")
    early = lost._replace(hook="prerouting", trial=trial("DNS", INPUT, 6))
    ((text, hint),) = found(monkeypatch, [early], [])
    assert text.endswith("by legacy iptables, in its chain PREROUTING of the table raw")
    assert hint == (
        "ip6tables-legacy -t raw -I PREROUTING -i vd-lab -p udp --dport 53 -j ACCEPT; "
        "ip6tables-legacy -t raw -I PREROUTING -i vd-lab -p tcp --dport 53 -j ACCEPT; virtdctl reload"
    )
    ((text, _),) = found(monkeypatch, [lost._replace(passed=frozenset({"mangle", "filter", "security"}))], [])
    assert "neither nftables nor iptables" in text
    monkeypatch.setattr(prerequisites, "legacy_tables", lambda file: ["filter"] if file == "ip_tables_names" else [])
    ((text, _),) = found(monkeypatch, [lost._replace(trial=trial(OUT, FORWARD, 6))], [])
    assert "neither nftables nor iptables, at the hook forward" in text
    # It got through the last hook that it came to, came to none, or is dropped by what is ours: nobody's firewall.
    ours = (step("inet virtd-lab forward", 3, "drop"),)
    for one in (lost._replace(through=True), lost._replace(hook=""), lost._replace(steps=ours)):
        assert found(monkeypatch, [one], []) == []


CONNECTION = Connection("10.7.0.9", "192.0.2.7", "9.9.9.9", 1, 53)
ANSWERED_OUTSIDE = Trial("What is answered from outside", 4, FORWARD, (), "10.7.0.9", "eth0", CONNECTION)
FOR_A_PORT = Trial("What comes from outside", 4, FORWARD, (), "10.7.0.9", "eth0", port=("tcp", 80))
SENT = Trial(OUT, 4, FORWARD, (), "9.9.9.9", source="10.7.0.0/24")
OVER = Trial("What its guests send to each other", 4, BRIDGED, ())


def test_hints_are_such_as_the_tools_take() -> None:
    """iptables has no -i in POSTROUTING; before connection tracking answers can't be told by their connection."""

    def said(table: str, hook: str, trial: Trial, family: str = "legacy") -> str:
        early = hook == "prerouting" and table == "raw"
        whose = "iptables-legacy" if family == "legacy" else ""
        chain = hints.Chain(family, table, hook.upper(), hook, whose, early)
        return str(hints.commands(chain, [trial], "vd-lab")[0])

    start = "iptables-legacy -t mangle -I POSTROUTING"
    for_answers = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    assert said("mangle", "postrouting", SENT) == f"{start} -s 10.7.0.0/24 -j ACCEPT"
    assert said("mangle", "postrouting", ANSWERED_OUTSIDE) == f"{start} -o vd-lab {for_answers}"
    assert said("mangle", "postrouting", FOR_A_PORT) == f"{start} -o vd-lab -m conntrack --ctstate DNAT -j ACCEPT"
    assert said("mangle", "postrouting", OVER) == f"{start} -o vd-lab -j ACCEPT"
    start = "iptables-legacy -t raw -I PREROUTING"
    assert said("raw", "prerouting", ANSWERED_OUTSIDE) == f"{start} -i eth0 -d 192.0.2.7 -j ACCEPT"
    assert said("raw", "prerouting", FOR_A_PORT) == f"{start} -i eth0 -p tcp --dport 80 -j ACCEPT"
    start = "iptables-legacy -t mangle -I PREROUTING"
    assert said("mangle", "prerouting", ANSWERED_OUTSIDE) == f"{start} -i eth0 {for_answers}"
    start = 'nft insert rule ip raw PREROUTING \'iifname "eth0"'
    assert said("raw", "prerouting", ANSWERED_OUTSIDE, "ip") == f"{start} ip daddr 192.0.2.7 accept'"


def test_a_chain_before_connection_tracking() -> None:
    lost = Lost(ANSWERED_OUTSIDE, (step("ip raw early", 0, "drop"),), "prerouting", through=False)
    for priority, words in ((-300, "ip daddr 192.0.2.7"), (-150, "ct state established,related")):
        chain = {"family": "ip", "table": "raw", "name": "early", "hook": "prerouting", "prio": priority}
        (obstacle,) = obstacles.judged([lost], [chain], "vd-lab")
        hint = str(obstacle.problem.hint)
        assert hint == f"nft insert rule ip raw early 'iifname \"eth0\" {words} accept'"


def test_arp_is_asked_for_beside_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = packets.arp_probe("52:54:00:00:00:01", 77, address="10.7.0.1")
    answer = asked[:20] + b"\0\2" + asked[22:]
    assert (packets.number_in(asked), packets.number_in(answer)) == (0, packets.ARP_REPLY)
    arp = Lost(trial("ARP", RESOLVED), (step("netdev n c", 0, "drop"),), "", through=False)
    dns = Lost(trial("DNS", INPUT), arp.steps, "", through=False)
    for hook, word in (("ingress", "iifname"), ("egress", "oifname")):
        ((text, hint),) = found(monkeypatch, [arp], [("netdev", "n", "c", hook)])
        assert text == "What its guests ask of the host (ARP) is dropped by the chain netdev n c, by its policy"
        assert hint == f"nft insert rule netdev n c '{word} \"vd-lab\" accept'"
    ((text, _),) = found(monkeypatch, [arp, dns], [("netdev", "n", "c", "ingress")])
    assert text.startswith("What its guests ask of the host (ARP and DNS) is dropped by ")


def test_what_leaves_the_host_untranslated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dropped then; each rule that somebody's packet came by may be the one."""
    steps = (step("ip mine a", 3, "continue"), step("ip raw pre", 7, "continue"), step("ip filter f", 9, "accept"))
    lost = Lost(SENT, steps, "postrouting", through=False, untracked=True)
    rules = {3: "counter packets 1 bytes 2", 7: "ip protocol udp notrack", 9: "accept"}

    def judged(one: Lost) -> list[tuple[str, str]]:
        monkeypatch.setattr(firewall, "rule", lambda _family, _table, _chain, handle: rules[handle])
        chain = {"family": "ip", "table": "raw", "name": "pre", "hook": "prerouting", "prio": -300}
        return [(one.problem.text, str(one.problem.hint)) for one in obstacles.judged([one], [chain], "vd-lab")]

    ((text, hint),) = judged(lost)
    assert text == (
        f"{OUT} (IPv4) is kept from NAT, for its connections aren't tracked, "
        "by the chain ip raw pre (“ip protocol udp notrack”)"
    )
    assert hint == "nft insert rule ip raw pre 'iifname \"vd-lab\" accept'"
    ((text, _),) = judged(lost._replace(trial=ANSWERED_OUTSIDE, untracked=False))  # which ends in the host itself
    assert text.startswith("What is answered from outside (IPv4) is kept from NAT")
    # By legacy iptables, which leaves no trace, or by nobody who is known.
    rules[7] = "counter"
    monkeypatch.setattr(prerequisites, "legacy_tables", lambda _file: ["raw"])
    ((text, hint),) = judged(lost)
    assert text.endswith("by legacy iptables, in its chain PREROUTING of the table raw")
    assert hint == "iptables-legacy -t raw -I PREROUTING -i vd-lab -j ACCEPT; virtdctl reload"
    monkeypatch.setattr(prerequisites, "legacy_tables", lambda _file: [])
    assert judged(lost) == []
