# SPDX-License-Identifier: LGPL-2.1-or-later
"""What somebody else changes of a network is put back within moments, and said once; what can't be is told of."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import definition, network_state
from tests.live.networks import define, guest, info, lease, neighbour, run
from tests.live.tools import Journal, away
from tests.proof.survival import containers as small
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

PUT_BACK = f"MESSAGE_ID={Message.NETWORK_PUT_BACK}"
NET = 'name = "lab"\n[ipv4]\naddress = "192.168.150.1/24"\n[ipv6]\naddress = "fd00:9::1/64"\n'
GUARD = "not guarded as a port of vd-lab"

# What is done, and what is said of it. `hard`: the kernel tells nobody, so it is seen at the next look.
AT_ONCE = {
    "ip link set vt-g-0 nomaster": "vt-g-0: in no bridge instead of vd-lab",
    "ip link set vt-g-0 master br9": "vt-g-0: in br9 instead of vd-lab",
    "ip link set vt-g-0 down": "vt-g-0: down",
    "ip link set vt-g-0 mtu 1300": "vt-g-0: MTU 1300 instead of 1500",
    "ip link set vt-g-0 alias x": "vt-g-0: no alias virtd network lab for qemu/g",
    "ip addr add 192.168.77.1/28 dev vt-g-0": "vt-g-0: an address that isn't virtd's, 192.168.77.1/28",
    "sysctl -qw net.ipv6.conf.vt-g-0.disable_ipv6=0": "net.ipv6.conf.vt-g-0.disable_ipv6: 0 instead of 1",
    "bridge link set dev vt-g-0 isolated on": f"vt-g-0: {GUARD}",
    "bridge link set dev vt-g-0 locked off": f"vt-g-0: {GUARD}",
    "bridge link set dev vt-g-0 state 0": "vt-g-0: switched off",
    "ip link set vt-g-0 down; ip link set vt-g-0 name foo; ip link set foo up": "vt-g-0: renamed to foo",
    "ip link del vd-lab": "vd-lab: gone",
    "ip link set vd-lab down": "vd-lab: down",
    "ip link set vd-lab arp off": "vd-lab: ARP is off",
    "ip link set vd-lab mtu 1400": "vd-lab: MTU 1400 instead of 1500",
    "ip link set vd-lab alias x": "vd-lab: no alias virtd network lab",
    "ip link set vd-lab address 02:00:00:00:00:01": "vd-lab: MAC address 02:00:00:00:00:01 instead of ",
    "ip link set vd-lab type bridge stp_state 1": "vd-lab: spanning tree or a delay",
    "ip addr flush dev vd-lab": "vd-lab: no address 192.168.150.1/24",
    "ip addr add 192.168.7.1/24 dev vd-lab": "vd-lab: an address that isn't virtd's, 192.168.7.1/24",
    "ip route del 192.168.150.0/24": "vd-lab: no route to 192.168.150.0/24",
    "ip -6 route del fd00:9::/64": "vd-lab: no route to fd00:9::/64",
    "sysctl -qw net.ipv6.conf.vd-lab.disable_ipv6=1": "net.ipv6.conf.vd-lab.disable_ipv6: 1 instead of 0",
    "sysctl -qw net.ipv4.conf.vd-lab.forwarding=0": "net.ipv4.conf.vd-lab.forwarding: 0 instead of 1",
    "sysctl -qw net.ipv4.ip_forward=0": "net.ipv4.ip_forward: 0 instead of 1",
    "sysctl -qw net.ipv6.conf.all.forwarding=0": "net.ipv6.conf.all.forwarding: 0 instead of 1",
}
LATER = {
    "bridge fdb del $(bridge fdb show dev vt-g-0 | awk '/static/ { print $1; exit }') dev vt-g-0 master": GUARD,
    "sysctl -qw net.ipv4.conf.vt-g-0.arp_ignore=0": "net.ipv4.conf.vt-g-0.arp_ignore: 0 instead of 8",
    "sysctl -qw net.ipv6.conf.vd-lab.accept_ra=2": "net.ipv6.conf.vd-lab.accept_ra: 2 instead of 0",
}
EVERYTHING = network_state("vd-lab", "vt-g-0")


# Asks for a lease by raw packets, as old DHCP clients do, and says whether the UDP checksum of the answer is right.
RAW = """
import socket, struct
def total(data):
    data += bytes(len(data) % 2)
    value = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xffff) + (value >> 16)
    return value
one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x800))
one.bind(("eth0", 0))
one.settimeout(2)
mac = one.getsockname()[4]
dhcp = struct.pack("!4BIHH16s16s192s4s", 1, 1, 6, 0, 77, 0, 0x8000, b"", mac, b"", bytes.fromhex("63825363"))
dhcp += bytes([53, 1, 1, 255])
udp = struct.pack("!4H", 68, 67, 8 + len(dhcp), 0) + dhcp
ip = struct.pack("!2B3H2BH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), b"\\xff" * 4)
ip = ip[:10] + struct.pack("!H", 0xffff ^ total(ip)) + ip[12:]
for _ in range(20):
    one.send(b"\\xff" * 6 + mac + b"\\x08\\0" + ip + udp)
    try:
        while True:
            frame = one.recv(2000)
            if frame[23] == 17 and frame[34:38] == struct.pack("!2H", 67, 68):
                length = int.from_bytes(frame[38:40], "big")
                pseudo = frame[26:34] + struct.pack("!2H", 17, length)
                print(total(pseudo + frame[34 : 34 + length]) == 0xffff)
                raise SystemExit
    except TimeoutError:
        pass
"""


MAC = "52:54:00:00:00:0b"
BRIDGE = "vd-lab"
# The first program of a container, which has it rebooted when it is told to.
REBOOTS = (
    "import ctypes, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); "
    "signal.sigwait([signal.SIGUSR1]); ctypes.CDLL(None).reboot(0x1234567)"
)
# How often the host answers who asks from a MAC address whether an address of its own is taken (RFC 5227).
HEARD = """
import socket, sys
mac, times = bytes.fromhex(sys.argv[1].replace(":", "")), int(sys.argv[2])
one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x806))
one.bind(("eth0", 0))
one.settimeout(1)
ask = bytes.fromhex("08060001080006040001") + mac + bytes(10) + bytes([192, 168, 150, 1])
heard = 0
for _ in range(times):
    one.send(b"\\xff" * 6 + mac + ask)
    try:
        while True:
            heard += one.recv(2000)[20:22] == bytes([0, 2])
    except TimeoutError:
        pass
print(heard > 0)
"""


@pytest.fixture
def g(lab: Lab) -> Iterator[Lab]:
    """A guest in the network `lab`, and a bridge of somebody else's."""
    define(lab, NET)
    lab.virtdctl("define", "-", stdin=definition("g", more='[[nic]]\nnetwork = "lab"\n'))
    lab.virtdctl("start", "g")
    lab.sh("ip link add br9 type bridge && ip link set br9 up")
    try:
        yield lab
    finally:
        lab.virtdctl("stop", "g", check=False)
        lab.sh("ip link del br9; ip link del br0", check=False)


def problems(lab: Lab) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return found


def change(lab: Lab, command: str, said: str) -> None:
    """Do it, and see it put back and said."""
    lab.virtdctl("network", "start", "lab")  # it may have been changed often in this minute
    journal = Journal.now(lab)
    lab.sh(command)
    entry: dict[str, Any] = lab.wait(
        f"{said!r} after {command}",
        lambda: next((one for one in journal.entries(PUT_BACK) if said in one["MESSAGE"]), None),
        30,
    )
    assert entry["VIRTD_NAME"] == "lab"
    lab.wait("a tidy status", lambda: lab.virtdctl("status", check=False).returncode == 0, 20)
    assert info(lab, "lab")["problems"] == []


def test_what_the_kernel_tells_of(g: Lab) -> None:
    before = g.sh(EVERYTHING)
    for command, said in AT_ONCE.items():
        change(g, command, said)
        g.wait(f"all as before {command}", lambda: g.sh(EVERYTHING) == before, 10)
    assert g.json("fsck")["differences"] == []
    g.wait_ready("g")
    assert lease(g, "g").startswith("192.168.150.")


@pytest.mark.hard
def test_what_it_does_not_tell_of(g: Lab) -> None:
    before = g.sh(EVERYTHING)
    for command, said in LATER.items():
        change(g, command, said)
        g.wait(f"all as before {command}", lambda: g.sh(EVERYTHING) == before, 10)
    # Whoever asks has it looked at there and then.
    g.sh("sysctl -qw net.ipv6.conf.vd-lab.accept_ra=2")
    info(g, "lab")
    assert g.sh("cat /proc/sys/net/ipv6/conf/vd-lab/accept_ra") == "0\n"


def test_what_was_changed_while_virtd_was_away(g: Lab) -> None:
    before = g.sh(EVERYTHING)
    journal = Journal.now(g)
    with away(g):
        g.sh(
            "ip link set vt-g-0 master br9; ip addr flush dev vd-lab; sysctl -qw net.ipv4.ip_forward=0; "
            "ip addr add 192.168.77.1/28 dev vt-g-0"
        )
    entries = journal.await_entries(PUT_BACK)
    assert len(entries) == 1
    assert "while virtd was away" in entries[0]["MESSAGE"]
    assert g.sh(EVERYTHING) == before
    assert problems(g) == []


def test_who_fights_is_left_to_it(g: Lab) -> None:
    """A program that takes a tap out again and again isn't fought for ever, and is told of."""
    journal = Journal.now(g)
    g.sh("systemd-run -q --unit=fight sh -c 'while sleep .2; do ip link set vt-g-0 master br9 2>/dev/null; done'")
    try:
        (problem,) = g.wait(
            "the problem", lambda: [one for one in problems(g) if "put back 5 times" in one["text"]], 60
        )
        assert "vt-g-0: in br9 instead of vd-lab" in problem["text"]
        assert "virtdctl network start lab" in problem["hint"]
        count = len(journal.entries(PUT_BACK))
        g.sh("sleep 5")
        assert len(journal.entries(PUT_BACK)) == count, "the war goes on"
        assert [one["object"] for one in problems(g)] == ["network/lab"]
    finally:
        g.sh("systemctl stop fight")
    g.virtdctl("network", "start", "lab")
    assert problems(g) == []
    assert "master vd-lab" in g.sh("ip link show vt-g-0")


def test_a_bridge_of_the_hosts_is_made_again(lab: Lab) -> None:
    lab.sh("ip link add br0 type bridge && ip link set br0 up")
    define(lab, 'name = "lab"\nmode = "bridge"\nbridge = "br0"\n')
    lab.virtdctl("define", "-", stdin=definition("g", more='[[nic]]\nnetwork = "lab"\n'))
    lab.virtdctl("start", "g")
    try:
        lab.sh("ip link del br0")
        (problem,) = lab.wait("the problem", lambda: problems(lab), 20)
        assert "br0: the host's bridge is gone" in problem["text"]
        assert "ip link add br0 type bridge" in problem["hint"]
        assert "network start" not in problem["hint"]
        journal = Journal.now(lab)
        lab.sh("ip link add br0 type bridge && ip link set br0 up")
        lab.wait("the port", lambda: "master br0" in lab.sh("ip link show vt-g-0"), 20)
        lab.wait("a tidy status", lambda: problems(lab) == [], 20)
        assert journal.await_entries(PUT_BACK)
        assert "isolated off" in lab.sh("bridge -d link show dev vt-g-0")
        assert "locked on" in lab.sh("bridge -d link show dev vt-g-0")
        lab.sh("ip link set vt-g-0 nomaster")
        lab.wait("the port", lambda: "master br0" in lab.sh("ip link show vt-g-0"), 20)
        lab.wait("a tidy status", lambda: problems(lab) == [], 20)
    finally:
        lab.virtdctl("stop", "g", check=False)
        lab.virtdctl("network", "stop", "lab", check=False)
        lab.sh("ip link del br0", check=False)


def test_another_bridge_of_its_name(g: Lab) -> None:
    """What isn't virtd's isn't removed; once it has gone, the network's own is back."""
    # virtd would make its own in between, if it could.
    stop, go = "kill -STOP $(systemctl show -P MainPID virtd)", "kill -CONT $(systemctl show -P MainPID virtd)"
    changes = "ip link set vd-lab down && ip link set vd-lab name br0 && ip link add vd-lab type bridge"
    g.sh(f"{stop}; trap '{go}' EXIT; {changes} && ip link del br0")
    said(g, "vd-lab: replaced by something that isn't virtd's")
    g.sh("ip link del vd-lab")
    g.wait("a tidy status", lambda: problems(g) == [], 20)
    assert "master vd-lab" in g.sh("ip link show vt-g-0")
    # If it does, all is as before, but for the route to what was its bridge.
    number = g.sh("cat /sys/class/net/vd-lab/ifindex")
    g.sh("ip link set vd-lab down && ip link set vd-lab name br0 && ip link set br0 up")
    g.wait("another bridge", lambda: g.sh("cat /sys/class/net/vd-lab/ifindex", check=False) not in ("", number), 20)
    said(g, "to which the host has a route through br0")
    hint = "br0 was the network's bridge until it was renamed: ip link delete br0."
    g.wait("what helps", lambda: [one["hint"] for one in problems(g)] == [hint], 20)
    g.sh("ip link delete br0")
    g.wait("a tidy status", lambda: problems(g) == [], 20)
    assert "master vd-lab" in g.sh("ip link show vt-g-0")


def said(lab: Lab, what: str) -> None:
    """Wait for a problem of the network's alone, with these words."""
    lab.wait(what, lambda: [what in one["text"] for one in problems(lab)] == [True], 20)


def tidy(lab: Lab) -> None:
    lab.wait("a tidy status", lambda: problems(lab) == [], 20)


def test_routes_of_others(lab: Lab) -> None:
    """Those that win are told of for as long as they do; a VPN that takes all is in nobody's way."""
    lab.sh(
        "ip link add d0 type veth peer name d1; ip link set d0 up; ip link set d1 up; ip route add 0.0.0.0/1 dev d0; "
        "ip route add 128.0.0.0/1 dev d0; ip route add unreachable 192.168.0.0/16"
    )
    try:
        lab.virtdctl("network", "define", "default")
        lab.virtdctl("network", "undefine", "default")
        define(lab, NET)
        tidy(lab)
        for route in ("192.168.150.128/25", "192.168.150.0/24 metric 50", "unreachable 192.168.150.77"):
            device = "" if "unreachable" in route else " dev d0"
            lab.sh(f"ip route add {route}{device}")
            said(lab, "192.168.150.0/24 collides with")
            lab.sh(f"ip route del {route}{device}")
            tidy(lab)
        lab.sh("ip route add default dev d0 table 77")
        for rule in ("to 192.168.150.0/24", "from all"):
            lab.sh(f"ip rule add {rule} lookup 77 priority 1000")
            said(lab, "through d0 in table 77, by a rule of policy routing")
            lab.sh("ip rule del priority 1000")
            tidy(lab)
        lab.sh("ip rule add to 192.168.150.0/24 unreachable priority 1000")
        said(lab, "what is for 192.168.150.254 is refused by a rule of policy routing")
        lab.sh("ip rule del priority 1000")
        tidy(lab)
        # As wg-quick does it: the main table's routes come first, but for the default one.
        lab.sh("ip rule add table main suppress_prefixlength 0 priority 1000; ip rule add lookup 77 priority 1001")
        lab.sh("systemctl reload virtd")
        assert problems(lab) == []
        lab.sh("ip rule del priority 1001; ip rule del priority 1000; ip route add 192.168.150.128/25 dev d0")
        lab.virtdctl("network", "stop", "lab")
        refused = lab.virtdctl("network", "start", "lab", check=False)
        assert refused.returncode == 1
        assert "collides with 192.168.150.128/25" in refused.stderr
        lab.sh("ip route del 192.168.150.128/25 dev d0")
        lab.virtdctl("network", "start", "lab")
    finally:
        lab.sh("ip rule del priority 1000; ip rule del priority 1001; ip link del d0", check=False)
        lab.sh("ip route del unreachable 192.168.0.0/16", check=False)


def test_a_forwarded_port_from_inside(lab: Lab) -> None:
    """From a neighbour, from the guest itself that it leads to, and from the host; with br_netfilter and without."""
    forward = '[[forward]]\nport = 8080\nto = "192.168.150.50"\nto_port = 80\n'
    define(lab, f'{NET}[[host]]\nmac = "52:54:00:00:00:0a"\nipv4 = "192.168.150.50"\n{forward}')
    guest(lab, "g", "lab", "52:54:00:00:00:0a")
    ask = "import socket; print(socket.create_connection(('192.168.150.1', 8080), 10).recv(99).decode())"
    try:
        lab.wait_ready("g")
        assert lease(lab, "g") == "192.168.150.50"
        assert run(lab, "g", "(while :; do echo hello | nc -l -p 80; done) >/dev/null 2>&1 &")[0] == 0
        with neighbour(lab, "b", "vd-lab", "192.168.150.51/24", "192.168.150.1"):
            for filtered in (1, 0):
                lab.sh(f"sysctl -qw net.bridge.bridge-nf-call-iptables={filtered}")
                assert lab.sh(f'ip netns exec b python3 -c "{ask}"').strip() == "hello"
                assert lab.sh(f'python3 -c "{ask}"').strip() == "hello"
                assert run(lab, "g", "nc -w 20 192.168.150.1 8080 </dev/null") == (0, "hello")
        assert problems(lab) == []
    finally:
        lab.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1")
        lab.virtdctl("stop", "g", check=False)


@pytest.mark.parametrize("offload", [False, True])
def test_answers_with_whole_checksums(lab: Lab, *, offload: bool) -> None:
    define(lab, f"checksum_offload = {str(offload).lower()}\n{NET}", start=False)
    lab.virtdctl("network", "start", "lab")
    lab.write("/root/raw.py", RAW)
    with neighbour(lab, "b", "vd-lab", "192.168.150.51/24", "192.168.150.1"):
        assert lab.sh("ip netns exec b python3 /root/raw.py") == f"{not offload}\n"


def test_a_container_that_reboots_itself(lab: Lab) -> None:
    """LXC makes its interface anew: it is in the bridge again, and guarded, and nobody is said to have changed it."""
    define(lab, NET)
    lab.sh(small.MAKE)
    lab.write("/root/heard.py", HEARD)
    usr = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'
    nic = f'[[nic]]\nnetwork = "lab"\nmac = "{MAC}"\n'
    text = f'name = "c"\nrootfs = "{small.ROOT}"\ncommand = {json.dumps(["/usr/bin/python3", "-c", REBOOTS])}\n'
    lab.virtdctl("container", "define", "-", stdin=text + usr + nic)
    lab.virtdctl("container", "start", "c")
    try:
        name = lab.json("container", "info", "c")["interfaces"][0]
        about = f"bridge -d link show dev {name}; bridge fdb show dev {name} | grep static"
        about += f"; cat /sys/class/net/{name}/ifalias"

        def seen() -> str:
            """Its number differs, and that of its other end."""
            return re.sub(rf"(?m)^\d+: |(?<={name})@\S+|link-netnsid \d+", "", lab.sh(about, check=False))

        def index() -> str:
            return lab.sh(f"cat /sys/class/net/{name}/ifindex", check=False)

        def first() -> int | None:
            pid: int | None = lab.json("container", "info", "c")["pid"]
            return pid

        before = seen()
        assert f"master {BRIDGE}" in before
        assert "locked on" in before
        assert MAC in before
        journal = Journal.now(lab)
        for _ in range(3):
            number, pid = index(), first()
            lab.sh(f"kill -USR1 {pid}")
            lab.wait("another first process", lambda pid=pid: first() not in (None, pid), 60)
            lab.wait("its interface, guarded", lambda: seen() == before, 30)
            assert index() != number
            # By its own address it is heard, by another's not.
            asks = f"nsenter -n -t {first()} python3 /root/heard.py"
            assert lab.sh(f"{asks} {MAC} 10") == "True\n"
            assert lab.sh(f"{asks} 52:54:00:00:00:0c 2") == "False\n"
        assert lab.json("container", "info", "c")["interfaces"] == [name]
        assert any(port["refused"] for port in info(lab, "lab")["ports"])
        tidy(lab)
        assert lab.json("fsck")["differences"] == []
        assert journal.entries(PUT_BACK) == []
    finally:
        lab.virtdctl("container", "stop", "c", check=False)
        lab.virtdctl("container", "undefine", "c", check=False)
        lab.sh("rm -f /var/log/virtd/lxc/*")


def test_settings_that_cannot_be_written(lab: Lab) -> None:
    """A network of IPv4 alone does without them, and says so; one that needs them says what it needs."""
    lab.virtdctl("network", "define", "-", stdin='name = "lab"\n[ipv4]\naddress = "192.168.150.1/24"\n')
    lab.virtdctl("network", "define", "-", stdin='name = "six"\n[ipv6]\naddress = "fd00:77::1/64"\n')
    lab.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=0")
    lab.sh("mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; systemctl restart virtd")
    try:
        lab.virtdctl("network", "start", "lab")
        said(lab, "net.ipv6.conf.vd-lab.disable_ipv6: 0 instead of 1 (Read-only file system)")
        refused = lab.virtdctl("network", "start", "six", check=False)
        assert refused.returncode == 1
        assert "net.ipv6.conf.all.forwarding" in refused.stderr
        assert "sysctl -w net.ipv6.conf.all.forwarding=1" in refused.stderr
    finally:
        lab.sh("umount /proc/sys")
    tidy(lab)
    assert lab.sh("cat /proc/sys/net/ipv6/conf/vd-lab/disable_ipv6") == "1\n"
    lab.virtdctl("network", "start", "six")
