# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks whose guests mean harm, with the kernel's own bridges and rules, and real frames on them."""

from __future__ import annotations

import pytest

from tests.harness import Lab
from tests.live.networks import OUTSIDE, define, info, neighbour, network, outside, rules
from tests.live.tools import Journal, spawn

pytestmark = pytest.mark.live

RESTORED = "MESSAGE_ID=21e43107966e47b2ab867a8dae253086"

# Says "open" when an UDP service at (address, port) has got what was sent to it from the namespace.
_ASK = """
import socket, sys
one = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
one.settimeout(1)
for _ in range(2):
    try:
        one.sendto(b"?", (sys.argv[1], int(sys.argv[2])))
        print(one.recv(10).decode())
        break
    except OSError as exc:
        print(exc)
"""
_ANSWER = """
import socket, sys
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
while True:
    _, peer = one.recvfrom(10)
    one.sendto(b"open", peer)
"""


def ping(lab: Lab, where: str, to: str) -> tuple[bool, str]:
    done = lab.run(*where.split(), "ping", "-c", "1", "-W", "1", to, check=False)
    return done.returncode == 0, done.stdout


def test_an_isolated_network_stays_isolated_without_rules(lab: Lab) -> None:
    """With the rules flushed and nobody there to apply them again; in both directions, for IPv6 as well."""
    six = '[ipv6]\naddress = "fd77:{}::1/64"\n'
    define(lab, network("iso", 5, head='mode = "isolated"', more=six.format(5)))
    define(lab, network("nat", 6, more=six.format(6)))  # so the host forwards
    with (
        outside(lab),
        neighbour(lab, "i1", "vd-iso", "10.77.5.50/24", "10.77.5.1") as i1,
        neighbour(lab, "n1", "vd-nat", "10.77.6.50/24", "10.77.6.1") as n1,
    ):
        for name, third in (("i1", 5), ("n1", 6)):
            lab.sh(f"ip -n {name} -6 address add fd77:{third}::50/64 dev eth0 nodad;"
                   f" ip -n {name} -6 route replace default via fd77:{third}::1")  # fmt: skip
        lab.sh("ip -n outside route add 10.77.0.0/16 via 203.0.113.1;"
               " ip -n outside -6 route add fd77::/16 via 2001:db8:1::1")  # fmt: skip
        beyond = "ip netns exec outside"
        try:
            lab.sh("systemctl stop virtd.socket virtd.service; nft flush ruleset")
            # The lab itself is as it was: what isn't isolated is routed.
            assert ping(lab, n1, OUTSIDE)[0]
            lab.wait("IPv6", lambda: ping(lab, n1, "2001:db8:1::2")[0], 20)
            heard = ""
            for to in (OUTSIDE, "10.77.6.50", "2001:db8:1::2", "fd77:6::50"):
                there, said = ping(lab, i1, to)
                assert not there, to
                heard += said
            # It is told so, though not each time: the kernel sends only so many of these.
            assert "filtered" in heard
            assert "prohibited" in heard
            # One way would be enough to tell somebody something.
            for where, to in ((beyond, "10.77.5.50"), (n1, "10.77.5.50"), (beyond, "fd77:5::50"), (n1, "fd77:5::50")):
                before = lab.sh("ip netns exec i1 grep -hE '^Icmp:|Icmp6InEchos' /proc/net/snmp /proc/net/snmp6")
                assert not ping(lab, where, to)[0]
                after = lab.sh("ip netns exec i1 grep -hE '^Icmp:|Icmp6InEchos' /proc/net/snmp /proc/net/snmp6")
                assert after == before, (where, to)
            # It isn't cut off from its own host, nor the host from it, also where the way back is checked.
            for strict in "01":
                lab.sh(f"sysctl -qw net.ipv4.conf.all.rp_filter={strict}")
                assert ping(lab, i1, "10.77.5.1")[0], strict
                assert ping(lab, "env", "10.77.5.50")[0], strict
            assert ping(lab, i1, "fd77:5::1")[0]
        finally:
            lab.sh("sysctl -qw net.ipv4.conf.all.rp_filter=0; systemctl start virtd.socket virtd.service")
        # Who removes these rules is somebody who removes rules.
        lab.wait("the rules", lambda: rules(lab, "iso"), 10)
        wanted = lab.sh("ip rule; ip -6 rule")
        assert wanted.count("prohibit") == 4
        journal = Journal.now(lab)
        lab.sh("ip rule del prio 900; ip -6 rule flush")
        lab.wait("the rules of routing", lambda: lab.sh("ip rule; ip -6 rule").count("prohibit") == 4, 5)
        assert any("policy routing" in entry["MESSAGE"] for entry in journal.await_entries(RESTORED))
        lab.sh("ip -6 rule add prio 32766 lookup main")
        # Another mode is put in force at once, and back; nothing is left over at its end.
        lab.virtctl("network", "define", "-", stdin=network("iso", 5, more=six.format(5)))
        assert ping(lab, i1, OUTSIDE)[0]
        lab.virtctl("network", "define", "-", stdin=network("iso", 5, head='mode = "isolated"', more=six.format(5)))
        assert not ping(lab, i1, OUTSIDE)[0]
    lab.virtctl("network", "stop", "iso")
    assert "vd-iso" not in lab.sh("ip rule; ip -6 rule")
    assert "prohibit" not in lab.sh("ip rule; ip -6 rule")
    assert info(lab, "nat")["problems"] == []


def test_an_isolated_guest_asks_its_own_bridge_only(lab: Lab) -> None:
    """A DNS server at another of the host's addresses, another network's dnsmasq among them, leads out."""
    define(lab, network("iso", 5, head='mode = "isolated"'))
    define(lab, network("nat", 6))
    with outside(lab), neighbour(lab, "i1", "vd-iso", "10.77.5.50/24", "10.77.5.1") as i1:
        server = spawn(lab, "python3", "-c", _ANSWER, "203.0.113.1", "53")
        try:
            assert server.stdout is not None
            server.stdout.readline()
            assert "open" in lab.run("python3", "-c", _ASK, "203.0.113.1", "53").stdout
            assert "open" not in lab.run(*i1.split(), "python3", "-c", _ASK, "203.0.113.1", "53").stdout
            connect = "import socket; socket.create_connection(('{}', 53), 2); print('open')"
            there = {
                to: lab.run(*i1.split(), "python3", "-c", connect.format(to), check=False).stdout.strip()
                for to in ("10.77.5.1", "10.77.6.1")
            }
            assert there == {"10.77.5.1": "open", "10.77.6.1": ""}
        finally:
            server.terminate()
            server.communicate(timeout=20)
