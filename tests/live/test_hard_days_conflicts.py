# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only one of all that runs on a host can have: MAC addresses, disks and ports, of which others know nothing."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab, definition
from tests.live.networks import define, network
from tests.live.tools import Journal
from tests.proof.survival import containers as small
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

MAC = "52:54:00:aa:bb:01"
MINI = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'  # what small.ROOT needs besides
NIC = f'[[nic]]\nnetwork = "lab"\nmac = "{MAC}"\n'
LISTEN = (
    "import socket, sys, time; f = int(sys.argv[1]); s = socket.socket(f, int(sys.argv[2])); "
    "f == 10 and s.setsockopt(41, 26, int(sys.argv[5])); s.bind((sys.argv[3], int(sys.argv[4]))); "
    "sys.argv[2] == '1' and s.listen(); time.sleep(1000)"
)
TCP, UDP, V4, V6 = "1", "2", "2", "10"


def container(lab: Lab, name: str, more: str = "") -> str:
    """Define a container that sleeps; what it is warned of."""
    lab.sh(small.MAKE)
    text = f'name = "{name}"\nrootfs = "{small.ROOT}"\ncommand = ["/bin/sleep", "1000"]\n{MINI}{more}\n'
    lab.write(f"/root/{name}.toml", text)
    return lab.virtdctl("container", "define", f"/root/{name}.toml").stderr


@pytest.fixture
def containers(lab: Lab) -> Iterator[Lab]:
    yield lab
    for item in lab.json("container", "list"):
        lab.virtdctl("container", "stop", item["name"], check=False)
        lab.virtdctl("container", "undefine", item["name"], check=False)
    lab.sh("rm -f /var/log/virtd/lxc/*")


def refused(lab: Lab, *arguments: str) -> str:
    done = lab.virtdctl(*arguments, check=False)
    assert done.returncode != 0, f"{arguments} was to be refused"
    return done.stderr


def define_domain(lab: Lab, name: str, more: str) -> str:
    lab.write(f"/root/{name}.toml", definition(name, more=more))
    return lab.virtdctl("define", f"/root/{name}.toml").stderr


@contextlib.contextmanager
def listening(lab: Lab, family: str, kind: str, address: str, port: int, *, only6: bool = False) -> Iterator[None]:
    lab.sh(
        f'systemd-run --quiet --unit=listener python3 -c "{LISTEN}" {family} {kind} {address} {port} {int(only6)}; '
        f"until grep -qi ':{port:04X} ' /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6; do sleep .1; done"
    )
    try:
        yield
    finally:
        lab.sh("systemctl stop listener.service")


def test_one_mac_in_a_domain_and_a_container(containers: Lab) -> None:
    lab = containers
    define(lab, network("lab", 50))
    assert define_domain(lab, "g", NIC) == ""
    warning = define_domain(lab, "h", NIC)
    assert f"nic[0]: MAC address {MAC} in network lab is domain g's as well" in warning
    assert "domain g's as well" in container(lab, "c", NIC)
    lab.virtdctl("start", "g")
    for arguments in (("start", "h"), ("container", "start", "c")):
        said = refused(lab, *arguments)
        assert f"MAC address {MAC} in network lab (nic[0]) is in use by domain g" in said
        assert "Stop domain g first" in said
    lab.sh("systemctl restart virtd.service")
    assert "is in use by domain g" in refused(lab, "container", "start", "c")
    lab.virtdctl("stop", "g")
    lab.virtdctl("container", "start", "c")
    lab.sh("systemctl restart virtd.service")
    assert "is in use by container c" in refused(lab, "start", "g")
    # The bridge's own.
    bridge = lab.sh("cat /sys/class/net/vd-lab/address").strip()
    define_domain(lab, "h", NIC.replace(MAC, bridge))
    assert "is in use by network lab" in refused(lab, "start", "h")
    # In another network it is nobody's.
    define(lab, network("other", 51))
    define_domain(lab, "h", NIC.replace("lab", "other"))
    lab.virtdctl("start", "h")
    lab.virtdctl("container", "stop", "c")
    lab.virtdctl("stop", "h")


def test_two_networks_that_forward_one_port(lab: Lab) -> None:
    forward = '[[forward]]\nport = 8080\nto = "10.77.{}.9"\nto_port = 80\n'
    define(lab, network("one", 50, more=forward.format(50)))
    lab.write("/root/two.toml", network("two", 51, more=forward.format(51)))
    assert (
        "tcp port 8080 of the host is network one's as well"
        in lab.virtdctl("network", "define", "/root/two.toml").stderr
    )
    assert "is in use by network one" in refused(lab, "network", "start", "two")
    assert lab.json("network", "info", "two")["state"] == "inactive"
    lab.write("/root/two.toml", network("two", 51, more=forward.format(51) + 'protocol = "udp"\n'))
    assert lab.virtdctl("network", "define", "/root/two.toml").stderr == ""
    lab.virtdctl("network", "start", "two")


def test_a_forward_of_what_the_host_serves(lab: Lab) -> None:
    text = network("one", 50, more='[[forward]]\nport = 2222\nto = "10.77.50.9"\nto_port = 22\n')
    lab.write("/root/one.toml", text)
    with listening(lab, V4, TCP, "0.0.0.0", 2222):
        said = lab.virtdctl("network", "define", "/root/one.toml").stderr
        assert "forward[0]: tcp port 2222 of the host is served by python3" in said
        said = refused(lab, "network", "start", "one")
        assert "listener.service) at 0.0.0.0:2222" in said
        assert "systemctl stop listener.service" in said
    for family, kind, address, only6 in (
        (V4, UDP, "0.0.0.0", False),
        (V4, TCP, "127.0.0.1", False),
        (V6, TCP, "::", True),
    ):
        with listening(lab, family, kind, address, 2222, only6=only6):
            assert "served by" not in lab.virtdctl("network", "define", "/root/one.toml").stderr
    with listening(lab, V6, TCP, "::", 2222):
        assert "at [::]:2222" in refused(lab, "network", "start", "one")
    # Its own dnsmasq doesn't count, nor what comes to listen while it is active.
    lab.write("/root/one.toml", text.replace("2222", "53"))
    lab.virtdctl("network", "define", "/root/one.toml")
    lab.virtdctl("network", "start", "one")
    lab.write("/root/one.toml", text)
    with listening(lab, V4, TCP, "0.0.0.0", 2222):
        assert "served by python3" in refused(lab, "network", "define", "/root/one.toml")
        assert "port = 53" in lab.virtdctl("network", "dump", "one").stdout
    lab.virtdctl("network", "define", "/root/one.toml")
    with listening(lab, V4, TCP, "0.0.0.0", 2222):
        lab.sh("systemctl restart virtd.service")
        assert lab.json("network", "info", "one")["state"] == "active"
        lab.virtdctl("network", "start", "one")


def test_who_comes_to_listen_on_a_forwarded_port(lab: Lab) -> None:
    """A problem while he does, and said once; also of UDP, and of IPv6."""
    more = "".join(
        f'[[forward]]\nport = {port}\nto = "{to}"\nprotocol = "{protocol}"\n'
        for port, to, protocol in ((2222, "10.77.50.9", "tcp"), (2223, "10.77.50.9", "udp"), (2224, "fd77::9", "tcp"))
    )
    define(lab, network("one", 50, more=f'[ipv6]\naddress = "fd77::1/64"\n{more}'))

    def told() -> list[str]:
        status = json.loads(lab.virtdctl("status", "--json", check=False).stdout)
        return [problem["text"] for problem in status["problems"]]

    for number, (family, kind, address, port) in enumerate(
        ((V4, TCP, "0.0.0.0", 2222), (V4, UDP, "0.0.0.0", 2223), (V6, TCP, "::", 2224))
    ):
        journal = Journal.now(lab)
        with listening(lab, family, kind, address, port):
            (text,) = lab.wait("the problem", told, 60)
            assert text.startswith(f"forward[{number}]: ")
            assert "is served by python3" in text
            assert "listener.service" in text
            (problem,) = lab.json("network", "info", "one")["problems"]
            assert "systemctl stop listener.service" in problem["hint"]
            lab.sh("systemctl restart virtd.service")
            assert lab.wait("the problem, again", told, 60) == [text]
        lab.wait("the end of it", lambda: told() == [], 60)
        entries = journal.entries(f"MESSAGE_ID={Message.NETWORK_PORT_SERVED}")
        assert [entry["VIRTD_NAME"] for entry in entries] == ["one"]
    for family, kind, address, port in ((V4, TCP, "127.0.0.1", 2222), (V4, TCP, "0.0.0.0", 2223)):
        with listening(lab, family, kind, address, port):
            assert lab.json("network", "info", "one")["problems"] == []
