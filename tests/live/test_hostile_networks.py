# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks whose guests mean harm, with the kernel's own bridges and rules, and real frames on them."""

from __future__ import annotations

import pytest

from tests.harness import Lab
from tests.live import frames, networks
from tests.live.frames import BROADCAST
from tests.live.networks import OUTSIDE, define, info, neighbour, network, outside, rules
from tests.live.tools import Journal, spawn
from tests.proof.survival import containers as small

pytestmark = pytest.mark.live

MINI = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'  # what small.ROOT needs besides
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
    print(peer[0], flush=True)
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
        lab.wait("the rules of routing", lambda: lab.sh("ip rule; ip -6 rule").count("prohibit") == 4, 20)
        assert any("policy routing" in entry["MESSAGE"] for entry in journal.await_entries(RESTORED))
        lab.sh("ip -6 rule add prio 32766 lookup main")
        # Another mode is put in force at once, and back; nothing is left over at its end.
        lab.virtdctl("network", "define", "-", stdin=network("iso", 5, more=six.format(5)))
        assert ping(lab, i1, OUTSIDE)[0]
        lab.virtdctl("network", "define", "-", stdin=network("iso", 5, head='mode = "isolated"', more=six.format(5)))
        assert not ping(lab, i1, OUTSIDE)[0]
    lab.virtdctl("network", "stop", "iso")
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


EVIL, GOOD = "52:54:00:66:00:01", "52:54:00:66:00:02"
SIX, SIX_GOOD = "fd77:1::5054:ff:fe66:1", "fd77:1::5054:ff:fe66:2"
ALL6, ALL6_MAC = "ff02::1", "33:33:00:00:00:01"


class Cell:
    """A container that is there for its network only: frames are sent and heard from its namespace."""

    def __init__(self, lab: Lab, name: str, mac: str, more: str = "", address: str = "") -> None:
        self.lab, self.name = lab, name
        self.root, first = f"{small.ROOT}-{name}", small.FIRST + (int(mac[-2:], 16) << 16)
        lab.sh(f"rm -rf {self.root}; cp -a {small.ROOT} {self.root}; chown -hR {first}:{first} {self.root}")
        text = f'name = "{name}"\nrootfs = "{self.root}"\ncommand = ["/brief"]\n{MINI}'
        text += f'[[nic]]\nnetwork = "lab"\nmac = "{mac}"\n{more}'
        lab.virtdctl("container", "define", "-", stdin=text)
        lab.virtdctl("container", "start", name)
        found = lab.json("container", "info", name)
        self.enter = ("nsenter", "-t", str(found["init"] if "init" in found else found["pid"]), "-n")
        hosts = lab.sh("cat /run/virtd/network/lab/hosts 2>/dev/null || :")  # none in a bridge of the host's
        given = [line.split(",")[1] for line in hosts.splitlines() if mac in line]
        self.address = given[0] if given else address
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=0")

    def run(self, *command: str, stdin: str = "", check: bool = True) -> str:
        return self.lab.run(*self.enter, *command, stdin=stdin, check=check).stdout

    def send(self, *frames_: bytes) -> None:
        self.run("python3", "-c", frames.SEND, stdin="".join(f"{frame.hex()}\n" for frame in frames_))

    def end(self) -> None:
        self.lab.virtdctl("container", "stop", self.name, check=False)
        self.lab.virtdctl("container", "undefine", self.name, check=False)
        self.lab.sh(f"rm -rf {self.root}")


def heard(lab: Lab, where: Cell, sender: Cell, end: bytes, sent: dict[str, bytes]) -> set[str]:
    """The names of those frames that arrived, of all that were sent; `end` is one that always does."""
    listener = spawn(lab, *where.enter, "python3", "-c", frames.HEAR, "eth0")
    assert listener.stdout is not None
    assert listener.stdout.readline() == "listening\n"
    sender.send(*sent.values(), end)
    said, complaint = listener.communicate(timeout=40)
    assert "end" in said.split(), complaint
    return set(said.split()) - {"end"}


def test_a_guest_sends_as_itself_only(lab: Lab) -> None:
    """Whatever a container puts on the wire; its neighbour hears what is its own and nothing else."""
    lab.sh(small.MAKE, timeout=300)
    define(lab, network("lab", 1, more='[ipv6]\naddress = "fd77:1::1/64"\n'))
    bridge = lab.sh("cat /sys/class/net/vd-lab/address").strip()
    cells: list[Cell] = []
    try:
        cells += [Cell(lab, "evil", EVIL), Cell(lab, "good", GOOD)]
        evil, good = cells
        e = frames.ethernet
        mine, theirs = evil.address, good.address

        def packet(name: str, source: str, to: str = "255.255.255.255") -> bytes:
            return frames.ipv4(source, to, 17, frames.udp(9, 9, frames.mark(name)))

        def packet6(name: str, source: str) -> bytes:
            return frames.ipv6(source, ALL6, 17, frames.udp(9, 9, frames.mark(name)))

        def advertise(name: str, source: str) -> bytes:
            return frames.icmp6(name, source, ALL6, 134, bytes.fromhex("4000070800000000") + bytes(4))

        end = e(EVIL, 0x0806, frames.arp("end", EVIL, mine))
        right = {
            "arp-own": e(EVIL, 0x0806, frames.arp("arp-own", EVIL, mine)),
            "arp-probe": e(EVIL, 0x0806, frames.arp("arp-probe", EVIL, "0.0.0.0", operation=1, to=mine)),
            "ip-own": e(EVIL, 0x0800, packet("ip-own", mine)),
            "dhcp": e(EVIL, 0x0800, frames.ipv4("0.0.0.0", "255.255.255.255", 17,
                                                frames.udp(68, 67, frames.dhcp("dhcp", 1, EVIL)))),
            "ip6-own": e(EVIL, 0x86DD, packet6("ip6-own", SIX), ALL6_MAC),
            "na-own": e(EVIL, 0x86DD, frames.neighbour("na-own", SIX, ALL6, SIX), ALL6_MAC),
            "dad": e(EVIL, 0x86DD, frames.neighbour("dad", "::", "ff02::1:ff00:aa", "fd77:1::aa", 135), ALL6_MAC),
            "privacy": e(EVIL, 0x86DD, packet6("privacy", "fd77:1::aa"), ALL6_MAC),
            "link-local": e(EVIL, 0x86DD, packet6("link-local", "fe80::1234"), ALL6_MAC),
        }  # fmt: skip
        wrong = {
            "mac-neighbour": e(GOOD, 0x0800, packet("mac-neighbour", mine)),
            "mac-bridge": e(bridge, 0x0800, packet("mac-bridge", mine)),
            "mac-other": e("02:00:00:00:00:07", 0x0800, packet("mac-other", mine)),
            "mac-broadcast": e(BROADCAST, 0x0800, packet("mac-broadcast", mine)),
            "arp-router": e(EVIL, 0x0806, frames.arp("arp-router", EVIL, "10.77.1.1")),
            "arp-neighbour": e(EVIL, 0x0806, frames.arp("arp-neighbour", EVIL, theirs)),
            "arp-ask-as-neighbour": e(EVIL, 0x0806, frames.arp("arp-ask-as-neighbour", EVIL, theirs, operation=1)),
            "arp-mac": e(EVIL, 0x0806, frames.arp("arp-mac", GOOD, mine)),
            "arp-free": e(EVIL, 0x0806, frames.arp("arp-free", EVIL, "10.77.1.7")),
            "arp-nobody": e(EVIL, 0x0806, frames.arp("arp-nobody", EVIL, "0.0.0.0")),
            "rarp": e(EVIL, 0x8035, frames.arp("rarp", EVIL, mine, operation=4)),
            "ip-neighbour": e(EVIL, 0x0800, packet("ip-neighbour", theirs)),
            "ip-router": e(EVIL, 0x0800, packet("ip-router", "10.77.1.1")),
            "ip-free": e(EVIL, 0x0800, packet("ip-free", "10.77.1.7")),
            "ip-elsewhere": e(EVIL, 0x0800, packet("ip-elsewhere", "192.0.2.1")),
            "ip-nobody": e(EVIL, 0x0800, packet("ip-nobody", "0.0.0.0")),
            "dhcp-server": e(EVIL, 0x0800, frames.ipv4(mine, "255.255.255.255", 17,
                                                       frames.udp(67, 68, frames.dhcp("dhcp-server", 2, GOOD)))),
            "dhcp-for-neighbour": e(EVIL, 0x0800, frames.ipv4(
                "0.0.0.0", "255.255.255.255", 17, frames.udp(68, 67, frames.dhcp("dhcp-for-neighbour", 1, GOOD)))),
            "dhcp-release": e(EVIL, 0x0800, frames.ipv4(
                mine, "10.77.1.1", 17, frames.udp(68, 67, frames.dhcp("dhcp-release", 1, GOOD)))),
            "dhcp-fragment": e(EVIL, 0x0800, frames.ipv4(
                mine, "255.255.255.255", 17, frames.udp(68, 67, frames.mark("dhcp-fragment")), fragment=0x2000)),
            "igmp-query": e(EVIL, 0x0800, frames.ipv4(
                mine, "224.0.0.1", 2, b"\x11\0\0\0" + frames.mark("igmp-query"))),
            "ip6-neighbour": e(EVIL, 0x86DD, packet6("ip6-neighbour", SIX_GOOD), ALL6_MAC),
            "ip6-router": e(EVIL, 0x86DD, packet6("ip6-router", "fd77:1::1"), ALL6_MAC),
            "ip6-elsewhere": e(EVIL, 0x86DD, packet6("ip6-elsewhere", "2001:db8::7"), ALL6_MAC),
            "na-neighbour": e(EVIL, 0x86DD, frames.neighbour("na-neighbour", SIX, ALL6, SIX_GOOD), ALL6_MAC),
            "na-router": e(EVIL, 0x86DD, frames.neighbour("na-router", SIX, ALL6, "fd77:1::1"), ALL6_MAC),
            "dad-neighbour": e(EVIL, 0x86DD, frames.neighbour("dad-neighbour", "::", ALL6, SIX_GOOD, 135), ALL6_MAC),
            "ra": e(EVIL, 0x86DD, frames.ipv6(SIX, ALL6, 58, advertise("ra", SIX)), ALL6_MAC),
            "ra-hop": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 0, bytes([58, 0, 1, 4, 0, 0, 0, 0]) + advertise("ra-hop", SIX)), ALL6_MAC),
            "ra-options": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 60, bytes([58, 0, 1, 4, 0, 0, 0, 0]) + advertise("ra-options", SIX)), ALL6_MAC),
            "ra-fragment": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 44, bytes([58, 0, 0, 1, 0, 0, 0, 9]) + advertise("ra-fragment", SIX)), ALL6_MAC),
            "ra-fragment-options": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 44, bytes([60, 0, 0, 1, 0, 0, 0, 9, 58, 0, 1, 4, 0, 0, 0, 0])
                + frames.mark("ra-fragment-options")), ALL6_MAC),
            "redirect": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 58, frames.icmp6("redirect", SIX, ALL6, 137)), ALL6_MAC),
            "mld-query": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 58, frames.icmp6("mld-query", SIX, ALL6, 130)), ALL6_MAC),
            "dhcp6-server": e(EVIL, 0x86DD, frames.ipv6(
                SIX, ALL6, 17, frames.udp(547, 546, frames.mark("dhcp6-server"))), ALL6_MAC),
            "vlan": e(EVIL, 0x0806, frames.arp("vlan", EVIL, "10.77.1.1"), tags=(0x8100,)),
            "vlan-service": e(EVIL, 0x0806, frames.arp("vlan-service", EVIL, "10.77.1.1"), tags=(0x88A8,)),
            "vlan-double": e(EVIL, 0x0806, frames.arp("vlan-double", EVIL, "10.77.1.1"), tags=(0x88A8, 0x8100)),
            "vlan-own": e(EVIL, 0x0800, packet("vlan-own", mine), tags=(0x8100,)),
            "llc": e(EVIL, 60, b"\xaa\xaa\x03\0\0\0\x08\x06" + frames.arp("llc", EVIL, "10.77.1.1")),
            "lldp": e(EVIL, 0x88CC, frames.mark("lldp")),
            "own-protocol": e(EVIL, 0x88B5, frames.mark("own-protocol")),
        }  # fmt: skip
        arrived = heard(lab, good, evil, end, right | wrong)
        assert arrived == set(right), arrived ^ set(right)
        refused = {row["user"]: row["refused"] for row in info(lab, "lab")["ports"]}
        # All of them but one: the kernel itself takes nothing from a group's MAC, such as broadcast's.
        assert refused == {"lxc/evil": len(wrong) - 1, "lxc/good": 0}, refused
        # An address that a guest has made itself is its own, also when another's start has the rules replaced.
        cells.append(Cell(lab, "late", "52:54:00:66:00:03"))
        good_end = e(GOOD, 0x0806, frames.arp("end", GOOD, theirs))
        late = {
            "na-taken": e(GOOD, 0x86DD, frames.neighbour("na-taken", SIX_GOOD, ALL6, "fd77:1::aa"), ALL6_MAC),
            "ip6-taken": e(GOOD, 0x86DD, packet6("ip6-taken", "fe80::1234"), ALL6_MAC),
            "dad-taken": e(GOOD, 0x86DD, frames.neighbour("dad-taken", "::", ALL6, "fd77:1::aa", 135), ALL6_MAC),
        }  # fmt: skip
        assert heard(lab, evil, good, good_end, late) == set()
        cells.pop().end()
        # Past the bridge, to the host itself: frames to a group that bridges don't forward.
        outer = "203.0.113.1"
        with outside(lab):
            server = spawn(lab, "python3", "-c", _ANSWER, outer, "99")
            assert server.stdout is not None
            server.stdout.readline()
            lab.sh("sysctl -qw net.ipv4.conf.all.rp_filter=0")
            evil.send(*[
                e(EVIL, 0x0800, frames.ipv4(mine, outer, 17, frames.udp(9, 99, b"x")), f"01:80:c2:00:00:{last:02x}")
                for last in range(1, 16)  # what is sent to the first one, bridges without STP treat as any other
            ])  # fmt: skip
            assert "open" in lab.run("python3", "-c", _ASK, outer, "99").stdout  # it has served all that came before
            server.terminate()
            assert mine not in server.communicate(timeout=20)[0]
        # Its MAC is its own without any rules, too.
        lab.sh("systemctl stop virtd.socket virtd.service; nft flush ruleset")
        try:
            locked = {name: wrong[name] for name in ("mac-neighbour", "mac-bridge", "mac-other", "mac-broadcast")}
            assert heard(lab, good, evil, end, locked | {"ip-own": right["ip-own"]}) == {"ip-own"}
        finally:
            lab.sh("systemctl start virtd.socket virtd.service")
        lab.wait("the rules", lambda: lab.sh("nft list table bridge virtd-lab", check=False), 10)
        assert heard(lab, good, evil, end, right | wrong) == set(right)
        assert lab.json("status")["problems"] == []
        cells.pop(0).end()
        # Who is trusted sends what it likes.
        cells.append(Cell(lab, "evil", EVIL, "trusted = true\n", address=mine))
        assert heard(lab, good, cells[-1], end, wrong) >= {
            "arp-router",
            "mac-other",
            "ra",
            "dhcp-server",
            "ip-elsewhere",
        }
    finally:
        for cell in cells:
            cell.end()


MACHINE = "52:54:00:66:00:09"  # somebody else's


def test_a_guest_in_a_bridge_of_the_hosts_sends_as_itself_only(lab: Lab) -> None:
    """Other machines are there too, of which virtd knows nothing; it touches none of theirs."""
    lab.sh(small.MAKE, timeout=300)
    lab.sh("ip link add br0 type bridge; ip link set br0 up; ip address add 10.88.0.1/24 dev br0")
    host = lab.sh("cat /sys/class/net/br0/address").strip()
    cells: list[Cell] = []
    e, mine, theirs, others = frames.ethernet, "10.88.0.2", "10.88.0.3", "10.88.0.9"

    def packet(name: str, source: str) -> bytes:
        return frames.ipv4(source, "255.255.255.255", 17, frames.udp(9, 9, frames.mark(name)))

    def server(name: str) -> bytes:
        answer = frames.udp(67, 68, frames.dhcp(name, 2, GOOD))
        return e(EVIL, 0x0800, frames.ipv4(mine, "255.255.255.255", 17, answer))

    advertised = frames.icmp6("ra", SIX, ALL6, 134, bytes.fromhex("4000070800000000") + bytes(4))
    six, taken = "fe80::5054:ff:fe66:1", "fe80::5054:ff:fe66:2"
    right = {
        "arp-own": e(EVIL, 0x0806, frames.arp("arp-own", EVIL, mine)),
        "ip-own": e(EVIL, 0x0800, packet("ip-own", mine)),
        "dhcp": e(EVIL, 0x0800, frames.ipv4("0.0.0.0", "255.255.255.255", 17,
                                            frames.udp(68, 67, frames.dhcp("dhcp", 1, EVIL)))),
        "na-own": e(EVIL, 0x86DD, frames.neighbour("na-own", six, ALL6, six), ALL6_MAC),
    }  # fmt: skip
    wrong = {
        **{f"mac-{who}": e(mac, 0x0800, packet(f"mac-{who}", mine))
           for who, mac in (("neighbour", GOOD), ("machine", MACHINE), ("host", host))},
        "arp-mac": e(EVIL, 0x0806, frames.arp("arp-mac", MACHINE, mine)),
        "arp-neighbour": e(EVIL, 0x0806, frames.arp("arp-neighbour", EVIL, theirs)),
        "arp-machine": e(EVIL, 0x0806, frames.arp("arp-machine", EVIL, others)),
        "arp-host": e(EVIL, 0x0806, frames.arp("arp-host", EVIL, "10.88.0.1")),
        "ip-neighbour": e(EVIL, 0x0800, packet("ip-neighbour", theirs)),
        "ip-machine": e(EVIL, 0x0800, packet("ip-machine", others)),
        "na-neighbour": e(EVIL, 0x86DD, frames.neighbour("na-neighbour", six, ALL6, taken), ALL6_MAC),
        "dhcp-server": server("dhcp-server"),
        "ra": e(EVIL, 0x86DD, frames.ipv6(SIX, ALL6, 58, advertised), ALL6_MAC),
        "vlan": e(EVIL, 0x0806, frames.arp("vlan", EVIL, mine), tags=(0x8100,)),
    }  # fmt: skip
    end = e(EVIL, 0x0806, frames.arp("end", EVIL, mine))
    try:
        define(lab, 'name = "lab"\nmode = "bridge"\nbridge = "br0"\n')
        with neighbour(lab, "machine", "br0", f"{others}/24", "10.88.0.1") as machine:
            lab.sh(f"ip -n machine link set eth0 address {MACHINE}")
            cells += [Cell(lab, "good", GOOD, address=theirs), Cell(lab, "evil", EVIL, address=mine)]
            good, evil = cells
            # Each has asked for another, as whoever does anything does all the time.
            assert lab.run(*machine.split(), "ping", "-c1", "-W5", theirs).returncode == 0
            lab.run("ip", "neighbour", "flush", "dev", "br0")
            assert lab.run("ping", "-c1", "-W5", others).returncode == 0
            arrived = heard(lab, good, evil, end, right | wrong)
            assert arrived == set(right), arrived ^ set(right)
            # What others send is their own business, and what they claim takes nothing from who has it already.
            claim = e(MACHINE, 0x0806, frames.arp("claim", MACHINE, mine, operation=1))
            lab.run(*machine.split(), "python3", "-c", frames.SEND, stdin=f"{claim.hex()}\n")
            assert heard(lab, good, evil, end, right | wrong) == set(right)
            assert lab.run(*machine.split(), "ping", "-c1", "-W5", mine).returncode == 0
            # Neither does a start of another, which has the rules replaced, let go of anything.
            cells.append(Cell(lab, "late", "52:54:00:66:00:04", address="10.88.0.4"))
            assert heard(lab, good, evil, end, right | wrong) == set(right)
            cells.pop().end()
            cells.remove(evil)
            evil.end()
            cells.append(Cell(lab, "evil", EVIL, "trusted = true\n", address=mine))
            assert heard(lab, good, cells[-1], end, right | wrong) >= set(right) | set(wrong) - {"mac-neighbour"}
    finally:
        for cell in cells:
            cell.end()
        lab.virtdctl("network", "stop", "lab", check=False)
        lab.sh("ip link del br0", check=False)


def test_neighbours_that_do_not_see_each_other(lab: Lab) -> None:
    """isolated_ports: neither through the bridge nor through the host, with and without rules; put in force live."""
    lab.sh(small.MAKE, timeout=300)
    define(lab, network("lab", 1))
    cells: list[Cell] = []

    def reached() -> tuple[bool, bool, bool]:
        """The neighbour, the neighbour by way of the host, the host."""
        one, two = cells
        for cell, other in ((one, two), (two, one)):
            cell.run("ip", "route", "replace", "10.77.1.1", "dev", "eth0")
            cell.run("ip", "route", "del", f"{other.address}/32", check=False)
        straight = ping(lab, " ".join(one.enter), two.address)[0]
        for cell, other in ((one, two), (two, one)):
            cell.run("ip", "route", "replace", f"{other.address}/32", "via", "10.77.1.1")
        around = ping(lab, " ".join(one.enter), two.address)[0]
        return straight, around, ping(lab, " ".join(one.enter), "10.77.1.1")[0]

    try:
        cells += [Cell(lab, "one", EVIL), Cell(lab, "two", GOOD)]
        assert reached() == (True, True, True)
        lab.virtdctl("network", "define", "-", stdin=network("lab", 1, head="isolated_ports = true"))
        assert reached() == (False, False, True)
        lab.sh("systemctl stop virtd.socket virtd.service; nft flush ruleset")
        try:
            assert reached()[0] is False
        finally:
            lab.sh("systemctl start virtd.socket virtd.service")
        lab.wait("the rules", lambda: rules(lab, "lab"), 10)
        assert reached() == (False, False, True)
        lab.virtdctl("network", "define", "-", stdin=network("lab", 1))
        assert reached() == (True, True, True)
    finally:
        for cell in cells:
            cell.end()


def test_systemd_networkd_leaves_interfaces_alone(lab: Lab) -> None:
    """Its own 80-vm-vt.network takes taps, and a catch-all of the administrator's takes everything; but not these."""
    lab.sh(small.MAKE, timeout=300)
    define(lab, network("lab", 1))
    catch_all = "/etc/systemd/network/50-all.network"
    cell = Cell(lab, "one", EVIL)
    try:
        networks.guest(lab, "web1", "lab", GOOD)
        (port,) = (row["interface"] for row in info(lab, "lab")["ports"] if row["user"] == "lxc/one")
        mine = ("vd-lab", "vt-web1-0", port)
        state = "for one in {}; do ip -o addr show dev $one; ip -o link show dev $one; done"
        before = lab.sh(state.format(" ".join(mine)))
        assert before.count("master vd-lab") == 2
        lab.write(catch_all, "[Match]\nName=vd-* vt-* vl*\n[Network]\nAddress=198.51.100.1/24\n")
        # What isn't ours is taken, so it does its work; the names only look alike.
        lab.sh("ip link add vlan7 type veth peer name vlan8")
        lab.sh("systemctl restart systemd-networkd.service")
        lab.wait("its work", lambda: "198.51.100.1" in lab.sh("ip addr show dev vlan7"), 30)
        listed = {line.split()[1]: line.split()[-1] for line in lab.sh("networkctl --no-legend list").splitlines()}
        assert {listed[name] for name in mine} == {"unmanaged"}, listed
        assert lab.sh(state.format(" ".join(mine))) == before
    finally:
        lab.sh(
            f"systemctl stop systemd-networkd.service systemd-networkd.socket; ip link del vlan7; rm -f {catch_all}"
        )
        cell.end()
