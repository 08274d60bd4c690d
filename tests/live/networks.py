# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of networks share: guests that run commands, neighbours in network namespaces, streams with gaps."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.harness import Lab, definition

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

OUTSIDE = "203.0.113.2"  # a server beyond the host, in a namespace that knows no way to the guests' prefixes
SERVER = "/root/stream_server.py"

# Takes streams of lines "N padding" on one port, one connection after the other; for each it prints, as JSON, what
# came and the longest time in which nothing did.
_SERVER = """
import json, select, socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.socket(family)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen()
print("listening", flush=True)
while True:
    connection, peer = listener.accept()
    rest, count, total, gap, wrong, error = b"", 0, 0, 0.0, 0, ""
    last = time.monotonic()
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError as exc:
            error = str(exc)
            break
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        if not data:
            break
        total += len(data)
        *lines, rest = (rest + data).split(b"\\n")
        for line in lines:
            count += 1
            wrong += int(line.split()[0]) != count
    connection.close()
    print(json.dumps({"peer": peer[0], "lines": count, "bytes": total, "stall": round(gap, 3), "wrong": wrong,
                      "error": error}), flush=True)
"""

# A DHCPv6 client, as far as it takes to be given an address: it asks on eth0 for the MAC that it is told.
DHCPV6 = """
import socket, struct, sys, time
def option(kind, data):
    return struct.pack("!HH", kind, len(data)) + data
def options(data):
    found = {}
    while data:
        kind, size = struct.unpack_from("!HH", data)
        found[kind], data = data[4 : 4 + size], data[4 + size :]
    return found
client = option(1, bytes.fromhex("00030001" + sys.argv[1].replace(":", "")))
one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
one.bind(("::", 546))
one.settimeout(2)
def exchange(kind, more):
    for _ in range(20):
        try:
            message = bytes([kind]) + b"abc" + client + more + option(8, bytes(2))
            one.sendto(message, ("ff02::1:2", 547, 0, socket.if_nametoindex("eth0")))
            return options(one.recv(1500)[4:])
        except OSError:
            time.sleep(0.2)
    sys.exit("no answer")
offer = exchange(1, option(3, struct.pack("!III", 1, 0, 0)))
reply = exchange(3, option(2, offer[2]) + option(3, offer[3]))
print(socket.inet_ntop(socket.AF_INET6, options(reply[3][12:])[5][:16]))
"""

# Asks for a lease to be renewed (RFC 2131, 4.3.2) on behalf of a guest that can't be told to: MAC, address, server.
# The answer goes to the guest.
_RENEW = """
import socket, struct, sys
mac, mine = bytes.fromhex(sys.argv[1].replace(":", "")), socket.inet_aton(sys.argv[2])
head = struct.pack("!4BIHH4s4s4s4s16s192s4s", 1, 1, 6, 0, 77, 0, 0, mine, bytes(4), bytes(4), bytes(4), mac, b"",
                   bytes.fromhex("63825363"))
options = bytes([53, 1, 3, 61, 7, 1]) + mac + bytes([255])
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("", 68))
one.sendto(head + options, (sys.argv[3], 67))
"""

# What the server does, in a guest, where there is awk and no more. busybox's nc ends a connection when its input
# ends, so its input is a FIFO that nobody writes to. The clock of /proc/uptime has hundredths of a second.
RECEIVE = (
    "mkfifo /tmp/never 2>/dev/null; exec 3<>/tmp/never; nc -l -p 5000 <&3 |"
    ' awk \'{ getline up < "/proc/uptime"; close("/proc/uptime"); split(up, t, " ");'
    " if (NR > 1 && t[1] - last > gap) gap = t[1] - last; last = t[1]; bytes += length($0) + 1;"
    ' if ($1 != NR) wrong++ } END { print "got", NR, bytes, gap + 0, wrong + 0 }\''
)


def stream(*to: str, port: int = 5000) -> str:
    """A shell command for a guest that goes on in the background: lines of 1000 bytes, some 400 a second, to each.

    `end_streams` ends them.
    """
    one = (
        '(awk \'BEGIN {{ p = sprintf("%0990d", 0); while (!over) {{ printf "%-8d %s\\n", ++n, p;'
        ' if (n % 20 == 0) {{ fflush(); over = !system("usleep 30000; test -e /tmp/stop") }} }}'
        ' print n >"/tmp/sent-{to}" }}\' | nc {to} {port}) & '
    )
    all_of_them = "".join(one.format(to=address, port=port) for address in to)
    return f"rm -f /tmp/stop /tmp/over /tmp/sent-*; ({all_of_them} wait; touch /tmp/over) >/dev/null 2>&1 &"


def end_streams(lab: Lab, domain: str, *to: str) -> list[int]:
    """How many lines the guest sent to each; 0 for a stream that was cut off."""
    status, said = run(lab, domain, "test -e /tmp/over && echo over")
    assert status != 0, "the streams ended by themselves"
    ended = "touch /tmp/stop; for i in $(seq 600); do test -e /tmp/over && break; usleep 100000; done; "
    status, said = run(lab, domain, ended + "; ".join(f"cat /tmp/sent-{address} || echo 0" for address in to), 120)
    assert status == 0, said
    return [int(number) for number in re.findall(r"(?m)^\d+$", said)]


def network(name: str, third: int, *, more: str = "", head: str = "") -> str:
    """A definition with the prefix 10.77.THIRD.0/24; DHCP doesn't wait for pings that nobody answers."""
    return (
        f'name = "{name}"\n{head}\ndnsmasq = ["no-ping"]\n[ipv4]\naddress = "10.77.{third}.1/24"\n'
        f'first = "10.77.{third}.100"\nlast = "10.77.{third}.199"\n{more}\n'
    )


def define(lab: Lab, text: str, *, start: bool = True) -> None:
    lab.virtdctl("network", "define", "-", stdin=text)
    if start:
        lab.virtdctl("network", "start", text.partition('"')[2].partition('"')[0])


def info(lab: Lab, name: str) -> dict[str, Any]:
    value: dict[str, Any] = lab.json("network", "info", name)
    return value


def rules(lab: Lab, name: str) -> str:
    """The table as the kernel lists it, handles included; "" when there is none."""
    return lab.sh(f"nft -a list table inet virtd-{name} 2>/dev/null", check=False)


def guest(lab: Lab, name: str, network_name: str, mac: str) -> None:
    """Define and start one of the lab's guests in a network."""
    card = f'[[nic]]\nnetwork = "{network_name}"\nmac = "{mac}"\n'
    lab.virtdctl("define", "-", stdin=definition(name, more=card))
    lab.virtdctl("start", name)


def begin(lab: Lab, domain: str, command: str) -> int:
    """Have a guest run a shell command: how many it had ended before."""
    before = lab.console(domain).count(b"sh exit ")
    lab.virtdctl("console", "--timeout", "0", domain, stdin=f"sh {command}\n")
    return before


def finish(lab: Lab, domain: str, before: int, timeout: float = 60) -> tuple[int, str]:
    """The exit status and the output of the command that `begin` began."""
    lab.wait(f"the end of {domain}'s command", lambda: lab.console(domain).count(b"sh exit ") > before, timeout)
    parts = re.split(rb"sh exit (\d+)\r?\n", lab.console(domain))
    text = parts[2 * before].decode(errors="replace")
    said = [line.removeprefix("sh: ").rstrip("\r") for line in text.splitlines() if line.startswith("sh: ")]
    return int(parts[2 * before + 1]), "\n".join(said)


def run(lab: Lab, domain: str, command: str, timeout: float = 60) -> tuple[int, str]:
    """Run a shell command in a guest: exit status and output."""
    return finish(lab, domain, begin(lab, domain, command), timeout)


def lease(lab: Lab, domain: str) -> str:
    """Have a guest ask for a lease, under its own name, and keep it; the address."""
    status, said = run(
        lab, domain,
        f"udhcpc -i eth0 -s /etc/udhcpc -x hostname:{domain} -p /tmp/udhcpc.pid -t 20 -T 1 >/tmp/udhcpc 2>&1;"
        " s=$?; cat /tmp/udhcpc; exit $s",
    )  # fmt: skip
    assert status == 0, said
    return str(re.findall(r"lease of (\S+) obtained", said)[-1])


def renew(lab: Lab, domain: str, network_name: str, mac: str) -> str:
    """Have dnsmasq asked for a guest's lease again, and see that it lasts longer now; the address.

    The guest asks, unless its console is lost: then a neighbour does.
    """

    def mine() -> dict[str, Any]:
        found = [row for row in lab.json("network", "leases", network_name) if row["mac"] == mac]
        return found[0] if found else {}

    before = mine().get("expires") or ""
    if f"qemu/{domain}/stdin" in lab.info(domain)["slots"]:
        run(lab, domain, "kill -USR1 $(cat /tmp/udhcpc.pid)")
    else:
        served = info(lab, network_name)
        server = served["ipv4"].partition("/")[0]
        beside = f"{server.rpartition('.')[0]}.250/24"
        with neighbour(lab, "beside", served["bridge"], beside, server) as inside:
            lab.run(*inside.split(), "python3", "-c", _RENEW, mac, mine()["address"], server)
    lab.wait("a renewed lease", lambda: (mine().get("expires") or "") > before, 30)
    return str(mine()["address"])


@dataclass
class Server:
    """A stream server that runs somewhere in the lab; `reports` has what it printed of each connection."""

    process: subprocess.Popen[str]

    @classmethod
    def started(cls, lab: Lab, *where: str, address: str, port: int = 5000) -> Server:
        from tests.live.tools import spawn, write

        write(lab, SERVER, _SERVER)
        process = spawn(lab, *where, "python3", SERVER, address, str(port))
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n", process.stderr.read() if process.stderr else ""
        return cls(process)

    def report(self) -> dict[str, Any]:
        """Of the next connection that ends."""
        assert self.process.stdout is not None
        value: dict[str, Any] = json.loads(self.process.stdout.readline())
        return value

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)


@contextlib.contextmanager
def outside(lab: Lab) -> Iterator[None]:
    """A namespace "outside" behind a link of the host's: no network of ours, and no route back to the guests."""
    lab.sh(
        "ip netns add outside; ip link add up0 type veth peer name eth0 netns outside;"
        " ip address add 203.0.113.1/24 dev up0; ip -6 address add 2001:db8:1::1/64 dev up0 nodad;"
        " ip link set up0 up;"
        " ip -n outside link set lo up; ip -n outside link set eth0 up;"
        f" ip -n outside address add {OUTSIDE}/24 dev eth0;"
        " ip -n outside -6 address add 2001:db8:1::2/64 dev eth0 nodad"
    )
    try:
        yield
    finally:
        lab.sh("ip netns del outside; ip link del up0 2>/dev/null; sleep 0.1", check=False)


@contextlib.contextmanager
def neighbour(lab: Lab, name: str, bridge: str, address: str, router: str) -> Iterator[str]:
    """A namespace with a foot in a bridge, as a container has: `ip netns exec NAME`."""
    lab.sh(
        f"ip netns add {name}; ip link add {name}0 type veth peer name eth0 netns {name};"
        f" ip link set {name}0 master {bridge} up; ip -n {name} link set lo up; ip -n {name} link set eth0 up;"
        f" ip -n {name} address add {address} dev eth0; ip -n {name} route add default via {router}"
    )
    try:
        yield f"ip netns exec {name}"
    finally:
        lab.sh(f"ip netns del {name}; ip link del {name}0 2>/dev/null", check=False)


def eventually(lab: Lab, what: str, condition: Any, within: float) -> float:
    """Seconds until `condition` was true; Failed when it wasn't `within` so many."""
    begun = time.monotonic()
    lab.wait(what, condition, within)
    return time.monotonic() - begun
