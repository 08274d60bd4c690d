# SPDX-License-Identifier: LGPL-2.1-or-later
"""Definitions of networks: what is taken, and what is refused with the key and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec import to_builtins

from tests.unit.test_untrusted import odd_files
from virtd import errors
from virtd.drivers.network import dnsmasq, ethernet, firewall, leases, ports
from virtd.drivers.network.adapting import fixed
from virtd.drivers.network.ports import Ground
from virtd.model import network as model
from virtd.model import networkchecks

if TYPE_CHECKING:
    from pathlib import Path

V4 = '[ipv4]\naddress = "192.168.150.1/24"\n'
V6 = '[ipv6]\naddress = "fd00:1::1/64"\n'
MAC = "52:54:00:00:00:0"
FILES = dnsmasq.files_in("/run/x", "/var/x")


def parse(text: str, **keys: str) -> model.Network:
    head = "".join(f"{key} = {value}\n" for key, value in ({"name": '"lab"'} | keys).items())
    return networkchecks.parse(head + text, "lab.toml")


def refused(text: str, **keys: str) -> str:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse(text, **keys)
    assert caught.value.file == "lab.toml"
    return caught.value.message.removeprefix("lab.toml: ")


def host(number: int, rest: str) -> str:
    return f'[[host]]\nmac = "{MAC}{number}"\n{rest}\n'


def test_a_network_with_everything() -> None:
    network = parse(
        V4 + 'first = "192.168.150.100"\nlast = "192.168.150.200"\nlease = "12h"\n' + V6
        + host(1, 'name = "web1"\nipv4 = "192.168.150.10"\nipv6 = "fd00:1::10"') + host(2, 'name = "db"')
        + '[[record]]\nname = "mirror.example"\naddress = "10.0.0.1"\n'
        + '[[forward]]\nport = 8080\nto = "192.168.150.10"\nto_port = 80\n'
        + '[[forward]]\nport = 8080\nto = "192.168.150.10"\nprotocol = "udp"\n'
        + '[[forward]]\nport = 8080\nto = "fd00:1::10"\n',
        uuid='"0123456789ABCDEF0123456789ABCDEF"', domain='"lab.internal"', mtu="1400", dnsmasq='["log-queries"]',
    )  # fmt: skip
    assert network.uuid == "01234567-89ab-cdef-0123-456789abcdef"
    assert (network.bridge_name, network.own, network.serves) == ("vd-lab", True, True)
    assert [str(subnet) for _key, subnet in network.subnets()] == ["192.168.150.0/24", "fd00:1::/64"]


def test_names_of_bridges() -> None:
    assert parse("").bridge_name == "vd-lab"
    assert networkchecks.parse('name = "twelve-chars"\n', "x").bridge_name == "vd-twelve-chars"
    names = [networkchecks.parse(f'name = "{"n" * length}"\n', "x").bridge_name for length in range(1, 65)]
    assert max(map(len, names)) == 15
    assert len(set(names)) == 64


@pytest.mark.parametrize(
    ("address", "given"),
    [
        ("192.168.150.1/24", ("192.168.150.2", "192.168.150.254")),
        ("192.168.150.254/24", ("192.168.150.1", "192.168.150.253")),
        ("192.168.150.130/24", ("192.168.150.1", "192.168.150.129")),
        ("10.0.0.1/30", ("10.0.0.2", "10.0.0.2")),
    ],
)
def test_the_range_is_what_the_prefix_has(address: str, given: tuple[str, str]) -> None:
    found = parse(f'[ipv4]\naddress = "{address}"\n').range4
    assert found is not None
    assert (str(found[0]), str(found[1])) == given


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("", {"name": '"-x"'}, "name: expected 1 to 64"),
        ("", {"name": '"x.console"'}, "name: expected a name that"),
        ("", {"name": '"x.json"'}, "name: expected a name that"),
        ("", {"uuid": '"x"'}, "uuid: expected a UUID"),
        ("", {"mode": '"vpn"'}, 'mode: expected one of "nat", "routed", "isolated", "bridge"'),
        ("", {"bridge": '"a-name-of-sixteen"'}, "bridge: expected at most 15 characters, the limit of Linux, got 17"),
        ("", {"bridge": '"a/b"'}, "bridge: expected letters"),
        ("", {"bridge": '"default"'}, "bridge: expected letters"),
        ("", {"mode": '"bridge"'}, "bridge: expected the name of a bridge"),
        (V4, {"mode": '"bridge"', "bridge": '"br0"'}, "ipv4: expected nothing here"),
        ("", {"mtu": "100"}, "mtu: expected"),
        (V6, {"mtu": "1000"}, "mtu: expected at least 1280"),
        ("", {"domain": '"a..b"'}, "domain: expected a name"),
        ("", {"colour": '"red"'}, "colour: unknown key"),
        ('[ipv4]\naddress = "192.168.150.1"\n', {}, "ipv4.address: expected the host's address and the prefix"),
        ('[ipv4]\naddress = "192.168.150.0/24"\n', {}, "ipv4.address: expected an address of a host's"),
        ('[ipv4]\naddress = "192.168.150.255/24"\n', {}, "ipv4.address: expected an address of a host's"),
        ('[ipv4]\naddress = "10.0.0.1/31"\n', {}, "ipv4.address: expected a prefix of /8 to /30, got /31"),
        ('[ipv4]\naddress = "224.0.0.1/24"\n', {}, "ipv4.address: expected a unicast address"),
        ('[ipv4]\naddress = "fd00::1/64"\n', {}, "ipv4.address: expected the host's address"),
        (V4 + 'first = "192.168.150.10"\n', {}, "ipv4.last: expected this key"),
        (V4 + 'first = "192.168.151.10"\nlast = "192.168.151.20"\n', {},
         "ipv4.first: expected an address in 192.168.150.0/24, the subnet, got 192.168.151.10"),
        (V4 + 'first = "192.168.150.20"\nlast = "192.168.150.10"\n', {}, "ipv4.last: expected an address after"),
        (V4 + 'first = "192.168.150.1"\nlast = "192.168.150.9"\n', {}, "ipv4.first: the range 192.168.150.1 to"),
        (V4 + 'first = "192.168.150.9"\nlast = "192.168.150.255"\n', {}, "ipv4.last: expected an address of a"),
        (V4 + 'dhcp = false\nfirst = "192.168.150.9"\nlast = "192.168.150.10"\n', {}, "ipv4.first: expected no"),
        (V4 + 'lease = "10s"\n', {}, "ipv4.lease: expected a time of 2m"),
        (V4 + 'lease = "soon"\n', {}, "ipv4.lease: expected a time of 2m"),
        ('[ipv6]\naddress = "fd00::1/80"\n', {}, "ipv6.address: expected a prefix of /64"),
        ('[ipv6]\naddress = "fe80::1/64"\n', {}, "ipv6.address: expected a unicast address, not a link-local"),
        (V6 + 'first = "fd00:2::1"\nlast = "fd00:2::9"\n', {}, "ipv6.first: expected an address in fd00:1::/64"),
        (V4 + '[[host]]\nmac = "52:54:00:00:00"\nname = "a"\n', {}, "host[0].mac: expected a unicast address"),
        (V4 + '[[host]]\nmac = "53:54:00:00:00:01"\nname = "a"\n', {}, "host[0].mac: expected a unicast address"),
        (V4 + host(1, ""), {}, "host[0]: expected a name"),
        (V4 + host(1, 'name = "a"') + host(1, 'name = "b"'), {}, "host[1].mac: 52:54:00:00:00:01 is the MAC"),
        (V4 + host(1, 'name = "a"') + host(2, 'name = "A"'), {}, "host[1].name: a is the name of host[0] already"),
        (V4 + host(1, 'ipv4 = "192.168.150.9"') + host(2, 'ipv4 = "192.168.150.9"'), {},
         "host[1].ipv4: 192.168.150.9 is the address of host[0] already"),
        (V4 + host(1, 'ipv4 = "192.168.151.9"'), {}, "host[0].ipv4: expected an address in 192.168.150.0/24"),
        (V4 + host(1, 'ipv4 = "192.168.150.1"'), {}, "host[0].ipv4: 192.168.150.1 is the host's own"),
        (V4 + host(1, 'ipv6 = "fd00::9"'), {}, "host[0].ipv6: expected no address, since the network has no DHCP"),
        (V4 + host(1, 'name = "a b"'), {}, "host[0].name: expected a host's name"),
        (V4 + '[[record]]\nname = "x"\naddress = "y"\n', {}, "record[0].address: expected an address"),
        (V4 + '[[forward]]\nport = 80\nto = "10.0.0.1"\n', {}, "forward[0].to: expected an address in 192"),
        (V4 + '[[forward]]\nport = 0\nto = "192.168.150.9"\n', {}, "forward[0].port: expected"),
        (V4 + '[[forward]]\nport = 80\nto = "192.168.150.9"\n' * 2, {}, "forward[1].port: tcp port 80 is forwarded"),
        (V4 + '[[forward]]\nport = 80\nto = "192.168.150.9"\n', {"mode": '"routed"'}, "forward: expected none"),
        (V4, {"dnsmasq": '["interface=eth0"]'}, "dnsmasq[0]: interface is set by virtd itself"),
        (V4, {"dnsmasq": '["a\\nuser=root"]'}, "dnsmasq[0]: expected an option"),
        (V4, {"dnsmasq": '["--user=root"]'}, "dnsmasq[0]: expected an option"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, keys: dict[str, str], message: str) -> None:
    assert refused(text, **keys).startswith(message)


def test_what_cannot_be_changed_live() -> None:
    old = parse(V4 + V6)
    assert fixed(old, parse(V4 + V6 + host(1, 'name = "a"'), domain='"x.y"', autostart="true")) == []
    assert fixed(old, parse(V4 + V6, mode='"routed"')) == []
    assert fixed(old, parse(V4 + V6, mtu="1400", bridge='"br7"')) == ["bridge", "mtu"]
    assert fixed(old, parse('[ipv4]\naddress = "192.168.150.2/24"\n')) == ["ipv4.address", "ipv6.address"]
    assert fixed(old, parse("", mode='"bridge"', bridge='"vd-lab"')) == ["mode", "ipv4.address", "ipv6.address"]


# dnsmasq's files


def config(text: str, **keys: str) -> list[str]:
    return dnsmasq.config(parse(text, **keys), FILES).splitlines()


def test_dnsmasq_serves_its_own_bridge_only() -> None:
    lines = config(V4)
    assert {"interface=vd-lab", "except-interface=lo", "bind-dynamic", "no-hosts"} <= set(lines)
    assert "dhcp-range=192.168.150.2,192.168.150.254,255.255.255.0,1h" in lines
    assert not any(line.startswith(("enable-ra", "domain=", "port=", "no-resolv")) for line in lines)


def test_an_isolated_network_has_no_router_and_asks_nobody() -> None:
    lines = config(V4 + V6, mode='"isolated"')
    assert {"dhcp-option=option:router", "no-resolv", "ra-param=vd-lab,0,0"} <= set(lines)


def test_domain_mtu_and_options() -> None:
    lines = config(V4 + V6, domain='"lab.internal"', mtu="1400", dnsmasq='["log-queries", "dhcp-option=42,0.0.0.0"]')
    assert {"domain=lab.internal", "expand-hosts", "local=/lab.internal/", "dhcp-option=option:mtu,1400"} <= set(
        lines
    )
    assert {"ra-param=vd-lab,mtu:1400,600", "dhcp-range=fd00:1::,slaac,64,1h", "enable-ra"} <= set(lines)
    assert lines[-2:] == ["log-queries", "dhcp-option=42,0.0.0.0"]
    assert "port=0" in config(V4, dns="false")


def test_static_leases_and_names() -> None:
    network = parse(
        V4 + V6 + host(1, 'name = "web1"\nipv4 = "192.168.150.10"\nipv6 = "fd00:1::10"') + host(2, 'name = "db"')
        + '[[record]]\nname = "mirror"\naddress = "10.0.0.1"\n'
    )  # fmt: skip
    assert dnsmasq.hosts(network) == ("52:54:00:00:00:01,192.168.150.10,[fd00:1::10],web1\n52:54:00:00:00:02,db\n")
    assert dnsmasq.names(network) == "10.0.0.1 mirror\n192.168.150.10 web1\nfd00:1::10 web1\n"


def test_leases_are_read() -> None:
    lines = [
        "2000 52:54:00:00:00:02 192.168.150.10 web1 01:52:54:00:00:00:02",
        "0 52:54:00:00:00:01 192.168.150.9 * *",
        "900 52:54:00:00:00:03 192.168.150.8 gone *",
        "duid 00:01:00:01:2f:00:00:00:56:44:00:00:00:01",
        "2000 1234 fd00:1::10 web1 00:01:00:01:2f:00:00:00:52:54:00:00:00:02",
        "2000 1234 fd00:1::11 * 00:04:aa:bb",
        "rubbish",
    ]
    found = leases.parse(lines, 1000.0)
    assert [(lease.address, lease.mac, lease.name, lease.expires) for lease in found] == [
        ("192.168.150.9", "52:54:00:00:00:01", "", 0),
        ("192.168.150.10", "52:54:00:00:00:02", "web1", 2000),
        ("fd00:1::10", "52:54:00:00:00:02", "web1", 2000),
        ("fd00:1::11", "", "", 2000),
    ]
    assert to_builtins(found[0].described()) == {
        "address": "192.168.150.9", "family": "ipv4", "mac": "52:54:00:00:00:01", "name": None, "expires": None,
    }  # fmt: skip


# Rules; the kernel's opinion of them is asked in tests/live/test_networks.py


def inet(text: str, **keys: str) -> str:
    found, _, bridge = firewall.rules(Ground(parse(text, **keys), "56:44:00:00:00:01", ())).partition(
        "add table bridge"
    )
    assert bridge
    return found


def chains(text: str, **keys: str) -> list[str]:
    lines = inet(text, **keys).splitlines()
    assert lines[:3] == ["add table inet virtd-lab", "delete table inet virtd-lab", "table inet virtd-lab {"]
    return [line.split()[1] for line in lines if line.startswith("\tchain")]


def test_each_mode_has_its_chains() -> None:
    forward = '[[forward]]\nport = 80\nto = "192.168.150.9"\n'
    assert chains(V4) == ["arriving", "forward", "postrouting"]
    assert chains(V4 + forward) == ["arriving", "forward", "postrouting", "prerouting", "output"]
    assert chains(V4, mode='"routed"') == ["arriving", "forward"]
    assert chains(V4, mode='"isolated"') == ["arriving", "forward", "input"]
    isolated = inet(V4, mode='"isolated"')
    assert "saddr" not in isolated
    assert 'iifname "vd-lab" reject' in isolated
    assert "udp dport 53 accept" not in isolated
    assert "ether daddr 56:44:00:00:00:01 reject" in inet(V4, isolated_ports="true")


# Ports


def test_an_address_is_set_aside() -> None:
    """The one that it has, else always the same; nobody else's, and an error when there is none."""
    lab = parse(V4 + '[[host]]\nmac = "52:54:00:00:00:09"\nipv4 = "192.168.150.9"\n')
    mac = "52:54:00:00:00:01"
    first = ports.set_aside(lab, mac, [], [])
    assert first == ports.set_aside(lab, mac, [], [])
    assert first is not None
    assert ports.set_aside(lab, "52:54:00:00:00:09", [], []) is None
    lease = leases.Lease("192.168.150.77", mac, "", 0)
    assert ports.set_aside(lab, mac, [], [lease]) == "192.168.150.77"
    other = ports.Port("vt-other-0", "qemu/other", "52:54:00:00:00:02", ipv4="192.168.150.77")
    assert ports.set_aside(lab, mac, [other], [lease]) == first
    theirs = leases.Lease(first, other.mac, "", 0)
    assert ports.set_aside(lab, mac, [], [theirs]) not in (None, first)
    small = parse('[ipv4]\naddress = "10.7.0.1/24"\nfirst = "10.7.0.8"\nlast = "10.7.0.9"\n')
    full = [ports.Port(f"vt-{last}", "qemu/x", f"52:54:00:00:00:0{last}", ipv4=f"10.7.0.{last}") for last in (8, 9)]
    assert ports.set_aside(small, mac, full[:1], []) == "10.7.0.9"
    with pytest.raises(errors.HostError, match=r"no IPv4 address left: all of 10\.7\.0\.8 to 10\.7\.0\.9"):
        ports.set_aside(small, mac, full, [])
    assert ports.set_aside(parse('[ipv4]\naddress = "10.7.0.1/24"\ndhcp = false\n'), mac, [], []) is None
    assert dnsmasq.hosts(lab, (other,)) == ("52:54:00:00:00:09,192.168.150.9\n52:54:00:00:00:02,192.168.150.77\n")


def test_what_the_kernel_has_noted_is_kept() -> None:
    """As libnftables 1.0.6 and 1.1.3 list it; not that of ports which are gone."""
    value = {"concat": ["vt-a-0", "0xfe800000000000000000000000001234"]}
    gone = {"concat": ["vt-b-0", "0xfe800000000000000000000000005678"]}
    counted = {"elem": {"val": "vt-a-0", "counter": {"packets": 3, "bytes": 180}}}
    items: list[dict[str, Any]] = [
        {"set": {"name": "first6", "elem": [{"elem": {"val": value, "expires": 7199}}, {"elem": {"val": gone}}]}},
        {"set": {"name": "dropped", "elem": [counted, {"elem": {"val": "vt-b-0"}}]}},
        {"set": {"name": "pace", "elem": ["vt-a-0"]}},
    ]
    kept = ethernet.filled(items, ["vt-a-0"])
    assert kept == {
        "first6": ['"vt-a-0" . 0xfe800000000000000000000000001234'],
        "dropped": ['"vt-a-0" counter packets 3 bytes 180'],
    }
    port = ports.Port("vt-a-0", "qemu/a", "52:54:00:00:00:01")
    text = ethernet.rules(ports.Ground(parse(V4), "56:44:00:00:00:01", (port,)), "virtd-lab", kept)
    assert "elements = { 0xfe800000000000000000000000001234 }" in text  # nobody else's, too


def test_what_others_in_a_bridge_of_the_hosts_use_is_theirs() -> None:
    items: list[dict[str, Any]] = [
        {"set": {"name": "others4", "elem": [{"elem": {"val": "10.7.0.9", "timeout": 120, "expires": 7}}]}},
        {"set": {"name": "others6", "elem": [{"elem": {"val": "0xfe800000000000000000000000001234"}}]}},
    ]
    kept = ethernet.filled(items, [])
    assert kept == {"others4": ["10.7.0.9"], "others6": ["0xfe800000000000000000000000001234"]}
    port = ports.Port("vt-a-0", "qemu/a", "52:54:00:00:00:01")
    lan = networkchecks.parse('name = "lan"\nmode = "bridge"\nbridge = "br0"\n', "x")
    ground = ports.Ground(lan, "", (port,), ("eth0",))
    text = ethernet.rules(ground, "virtd-lan", kept)
    assert 'set others { type ifname; elements = { "eth0" } }' in text
    assert "elements = { 10.7.0.9 }" in text
    # Whose it is already comes first.
    assert text.index("arp saddr ip @first4") < text.index("arp saddr ip @others4 goto refuse")
    # That somebody put something else into the bridge doesn't make other rules of them.
    assert firewall.made_of(ground) == firewall.made_of(ground._replace(others=()))
    assert "others" not in ethernet.rules(ports.Ground(parse(V4), "56:44:00:00:00:01", (port,)), "virtd-lab", {})


def test_whatever_lies_where_the_leases_are_is_no_lease(tmp_path: Path) -> None:
    """A FIFO there hung the daemon at the next `network leases` of anybody, a link to /dev/zero had it killed."""
    for kind, path in odd_files(tmp_path).items():
        assert leases.read(str(path)) == [], kind
    (tmp_path / "large").write_bytes(b"0 52:54:00:12:34:56 10.0.0.1 a *\n" * (leases.LIMIT // 30))
    assert leases.read(str(tmp_path / "large")) == []


def test_one_guest_takes_one_lease_and_no_name_of_the_surroundings() -> None:
    """By client identifiers and DUIDs, which are its own to make up, it would take its neighbours' addresses."""
    text = V4 + '[ipv6]\naddress = "fd00:1::1/64"\nfirst = "fd00:1::100"\nlast = "fd00:1::200"\n'
    network, lines = parse(text), config(text)
    assert "dhcp-ignore-clid" in lines
    assert {"dhcp-name-match=set:surroundings,wpad", "dhcp-ignore-names=tag:surroundings"} <= set(lines)
    most = next(int(line.partition("=")[2]) for line in lines if line.startswith("dhcp-lease-max="))
    given = network.range4
    assert given is not None
    assert most >= int(given[1]) - int(given[0]) + 1 + 0x101
