# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of legacy iptables: the kernel's own ip_tables, of which neither nft nor anybody else is told.

In a lab of its own: a network namespace that had such tables once has them for ever, and is looked at now and then.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.debian import install
from tests.harness import Lab
from tests.live.conftest import SUITE
from tests.live.networks import OUTSIDE, define, neighbour, network, outside
from tests.live.test_other_firewalls import BACK, DHCP, FORWARD, INPUT, OVER, PORT, mended, problems

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.live

ESTABLISHED = "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
FILTER = "legacy iptables, in its chain "
SIX = '[ipv6]\naddress = "fd77:7::1/64"\nfirst = "fd77:7::100"\nlast = "fd77:7::1ff"\n'
# What hosts drop, by arguments of iptables-legacy, separated by semicolons: what of it is told, and of which chain.
DROPPING = {
    "DHCP": ("-A INPUT -p udp --dport 67 -j DROP", {INPUT: "INPUT"}),
    "DNS": ("-A INPUT -i vd-+ -p udp --dport 53 -j REJECT", {INPUT: "INPUT"}),
    "a strict input": (f"-A INPUT -i lo -j ACCEPT; -A INPUT {ESTABLISHED}; -P INPUT DROP", {INPUT: "INPUT"}),
    "a policy of forward": ("-P FORWARD DROP", {FORWARD: "FORWARD", OVER: "FORWARD"}),
    "a chain of its own": (
        f"-N GUESTS; -A GUESTS -j REJECT; -A FORWARD {ESTABLISHED}; -A FORWARD -j GUESTS",
        {FORWARD: "FORWARD", OVER: "FORWARD"},
    ),
    "answers": ("-A FORWARD -i vd-lab -j ACCEPT; -A FORWARD -m conntrack --ctstate DNAT -j ACCEPT; -P FORWARD DROP",
        {BACK: "FORWARD"}),
    "a forwarded port": (f"-A FORWARD {ESTABLISHED}; -A FORWARD -i vd-lab -j ACCEPT; -P FORWARD DROP",
        {PORT: "FORWARD"}),
    "what the host answers": ("-A OUTPUT -p udp --sport 67 -j DROP", {DHCP: "OUTPUT"}),
    "forwarding, in another table": ("-t mangle -A FORWARD -i vd-lab ! -o vd-lab -j DROP",
        {FORWARD: "FORWARD of the table mangle"}),
    "bogons, before everything else": ("-t raw -A PREROUTING -s 10.77.0.0/16 -j DROP",
        dict.fromkeys((INPUT, FORWARD, OVER), "PREROUTING of the table raw")),
    "input, after everything else": ("-t security -A INPUT -i vd-lab -p udp -j DROP",
        {INPUT: "INPUT of the table security"}),
}  # fmt: skip
# What lets through what guests need.
ACCEPTING = {
    "all of it": "-A INPUT -i vd-lab -j ACCEPT; -A FORWARD -i vd-lab -j ACCEPT; -A FORWARD -o vd-lab -j ACCEPT",
    "what they need": (
        f"-A INPUT -i vd-+ -p udp -m multiport --dports 53,67 -j ACCEPT; -A FORWARD {ESTABLISHED};"
        " -A FORWARD -m conntrack --ctstate DNAT -j ACCEPT; -A FORWARD -i vd-lab -j ACCEPT"
    ),
}
STRICT = "-A INPUT -i lo -j ACCEPT; -P INPUT DROP; -P FORWARD DROP"


@pytest.fixture(scope="module")
def host(packages: dict[str, Path]) -> Iterator[Lab]:
    """A lab with iptables-legacy, if the kernel has what that sets up, and Debian's package can be had."""
    lab = Lab(f"legacy-{os.getpid()}")
    try:
        Lab.up(lab.name, "--suite", SUITE, "--rpm", str(packages["0.1.0"]))
        if lab.sh("test -e /proc/net/ip_tables_names || echo no"):
            pytest.skip("the kernel has no ip_tables: there is no /proc/net/ip_tables_names")
        if problem := install(lab, "iptables"):
            pytest.skip(f"iptables can't be installed: {problem}")
        yield lab
    finally:
        lab.down()


@pytest.fixture
def net(host: Lab) -> Iterator[Lab]:
    define(host, network("lab", 7, more='[[forward]]\nport = 8080\nto = "10.77.7.9"\n'))
    try:
        with outside(host):
            yield host
    finally:
        host.virtdctl("network", "stop", "--force", "lab")
        host.virtdctl("network", "undefine", "lab")


@contextlib.contextmanager
def rules(lab: Lab, text: str, tool: str = "iptables-legacy") -> Iterator[None]:
    """These, and none of them afterwards."""
    try:
        lab.sh("set -e; " + "; ".join(f"{tool} {one}" for one in text.split(";")))
        yield
    finally:
        tables = lab.sh("sort -u /proc/net/ip_tables_names /proc/net/ip6_tables_names").split()
        for name in tables:
            for each in ("iptables-legacy", "ip6tables-legacy"):
                lab.sh(f"{each} -t {name} -F; {each} -t {name} -X")
        for chain in ("INPUT", "FORWARD", "OUTPUT"):
            lab.sh(f"iptables-legacy -P {chain} ACCEPT; ip6tables-legacy -P {chain} ACCEPT")


def told(lab: Lab) -> dict[str, str]:
    """Which chain drops what."""
    found = {}
    for problem in problems(lab):
        what = next(what for what in (INPUT, FORWARD, OVER, DHCP, BACK, PORT) if problem["text"].startswith(what))
        found[what] = problem["text"].partition(f" is dropped by {FILTER}")[2].partition(",")[0]
    return found


def looked_at(lab: Lab) -> None:
    """The kernel tells nobody."""
    lab.virtdctl("reload")


def test_tables_that_come_are_noticed(net: Lab) -> None:
    """Nobody is told of them; it takes some ten seconds."""
    assert net.sh("cat /proc/net/ip_tables_names") == ""
    with rules(net, "-P FORWARD DROP"):
        net.wait("what is dropped", lambda: told(net) == {FORWARD: "FORWARD", OVER: "FORWARD"}, 90)
        # Nor of rules that come and go, where there are tables.
        net.sh("iptables-legacy -P FORWARD ACCEPT")
        net.wait("the end of it", lambda: problems(net) == [], 90)
        net.sh("iptables-legacy -A INPUT -p udp --dport 67 -j DROP")
        net.wait("what is dropped", lambda: told(net) == {INPUT: "INPUT"}, 90)


def test_what_is_dropped_is_told_and_the_hint_mends_it(net: Lab) -> None:
    def passes() -> bool:
        return net.run(*inside.split(), "ping", "-c1", "-W2", OUTSIDE, check=False).returncode == 0

    with neighbour(net, "n1", "vd-lab", "10.77.7.50/24", "10.77.7.1") as inside:
        assert passes()
        for name, (text, expected) in DROPPING.items():
            with rules(net, text):
                looked_at(net)
                net.wait(f"what is dropped by {name}", lambda expected=expected: told(net) == expected, 60)
                assert passes() is not bool({FORWARD, BACK} & expected.keys()), name
                mended(net)
                assert passes(), name
            looked_at(net)
            net.wait(f"nothing after {name}", lambda: problems(net) == [], 60)


def test_what_is_let_through_is_not_told(net: Lab) -> None:
    for name, text in ACCEPTING.items():
        with rules(net, STRICT):
            looked_at(net)
            net.wait("what is dropped", lambda: told(net).keys() == {INPUT, FORWARD, OVER}, 60)
            with rules(net, text + "; -P INPUT DROP; -P FORWARD DROP"):
                looked_at(net)
                net.wait(f"nothing by {name}", lambda: problems(net) == [], 60)


def test_over_a_restart_of_the_daemon(net: Lab) -> None:
    """What was found is told at once, and what has changed meanwhile is found."""
    with rules(net, "-P FORWARD DROP"):
        looked_at(net)
        net.wait("what is dropped", lambda: told(net).keys() == {FORWARD, OVER}, 60)
        net.sh("systemctl restart virtd.service")
        assert told(net) == {FORWARD: "FORWARD", OVER: "FORWARD"}
        net.sh(
            "systemctl stop virtd.socket virtd.service; iptables-legacy -P FORWARD ACCEPT;"
            " iptables-legacy -A INPUT -p udp --dport 53 -j DROP; systemctl start virtd.socket virtd.service"
        )
        net.wait("what is dropped now", lambda: told(net) == {INPUT: "INPUT"}, 60)


def test_ipv6(host: Lab) -> None:
    define(host, network("lab", 7, more=f'{SIX}[[forward]]\nport = 8080\nto = "fd77:7::9"\n'))
    try:
        with outside(host):
            for text, expected in (
                ("-P INPUT DROP; -P FORWARD DROP", {INPUT: "INPUT", FORWARD: "FORWARD", OVER: "FORWARD"}),
                ("-t raw -A PREROUTING -i vd-lab -j DROP",
                 dict.fromkeys((INPUT, FORWARD, OVER), "PREROUTING of the table raw")),
            ):  # fmt: skip
                with rules(host, text, "ip6tables-legacy"):
                    looked_at(host)
                    host.wait("what is dropped", lambda expected=expected: told(host) == expected, 60)
                    assert all("IPv4" not in problem["text"] for problem in problems(host))
                    mended(host)
                looked_at(host)
                host.wait("nothing", lambda: problems(host) == [], 60)
    finally:
        host.virtdctl("network", "stop", "--force", "lab")
        host.virtdctl("network", "undefine", "lab")
