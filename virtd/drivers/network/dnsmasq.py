# SPDX-License-Identifier: LGPL-2.1-or-later
"""dnsmasq for one network: its files, its command line and its unit.

dnsmasq reads dnsmasq.conf only when it starts. It rereads the two other files at SIGHUP: static leases and names
change live.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...children.hardening import HARDENED, Property
from ...children.programs import ENVIRONMENT
from ...model.network import Mode
from ...systemd.transient import UnitSpec
from . import leases

if TYPE_CHECKING:
    from ...model.network import Network
    from .ports import Port
    from .prerequisites import Account

READY = b"started, version"  # logged once its sockets are open

# capabilities(7), by number: ports below 1024; ARP entries for clients without an address yet; pings.
CAPABILITIES = (1 << 10) | (1 << 12) | (1 << 13)

LEASES6 = 32768  # for DHCPv6


class Files(NamedTuple):
    """The paths of its files. `leases` is on disk, and the only one that dnsmasq may write."""

    config: str
    hosts: str
    names: str
    leases: str


def files_in(runtime: str, state: str) -> Files:
    return Files(f"{runtime}/dnsmasq.conf", f"{runtime}/hosts", f"{runtime}/names", f"{state}/leases")


def config(network: Network, files: Files) -> str:
    """The text of dnsmasq.conf: one option of dnsmasq(8) per line, without the hyphens."""
    isolated = network.mode is Mode.ISOLATED
    lines = [
        f"# Network {network.name}: written by virtd, and again at each change.",
        f"interface={network.bridge_name}",
        "except-interface=lo",
        # Serves addresses and bridges that appear later too, and leaves other dnsmasqs theirs.
        "bind-dynamic",
        f"dhcp-leasefile={files.leases}",
        f"dhcp-hostsfile={files.hosts}",
    ]
    if network.dns:
        lines += ["no-hosts", f"addn-hosts={files.names}", "domain-needed", "bogus-priv"]
        if isolated:
            lines.append("no-resolv")  # DNS is a way out, too
    else:
        lines.append("port=0")
    if network.domain is not None:
        lines += [f"domain={network.domain}", "expand-hosts"]
        if network.dns:
            lines.append(f"local=/{network.domain}/")
    lines += _dhcp4(network, isolated=isolated) + _dhcp6(network, isolated=isolated)
    return "\n".join([*lines, *network.dnsmasq]) + "\n"


def _dhcp4(network: Network, *, isolated: bool) -> list[str]:
    given = network.range4
    if given is None or network.ipv4 is None or network.interface4 is None:
        return []
    mask = network.interface4.netmask
    lines = [f"dhcp-range={given[0]},{given[1]},{mask},{network.ipv4.lease}", "dhcp-authoritative"]
    # A guest has one MAC (ethernet.py), but can invent client identifiers at will: it gets one address.
    lines += ["dhcp-no-override", "dhcp-ignore-clid"]
    # IPv4 and IPv6 share this limit; invented DUIDs must not use up the leases that others need for IPv4.
    beside = LEASES6 if network.range6 is not None else 0
    lines.append(f"dhcp-lease-max={min(int(given[1]) - int(given[0]) + 1 + beside, 65536)}")
    # No guest may take a name by which programs discover their environment (CERT VU#598349).
    lines += [*(f"dhcp-name-match=set:surroundings,{name}" for name in ("wpad", "isatap"))]
    lines.append("dhcp-ignore-names=tag:surroundings")
    if isolated:
        lines.append("dhcp-option=option:router")  # without a value: announce no router
    if network.mtu is not None:
        lines.append(f"dhcp-option=option:mtu,{network.mtu}")
    return lines


def _dhcp6(network: Network, *, isolated: bool) -> list[str]:
    if network.ipv6 is None or network.interface6 is None or not network.ipv6.dhcp:
        return []
    given = network.range6
    if given is None:
        # DHCPv6 serves static leases even if it has none for other guests.
        kind = "static,slaac" if any(host.ipv6 for host in network.host) else "slaac"
        lines = [f"dhcp-range={network.interface6.network.network_address},{kind},64,{network.ipv6.lease}"]
    else:
        lines = [f"dhcp-range={given[0]},{given[1]},slaac,64,{network.ipv6.lease}"]
    lines.append("enable-ra")
    mtu = f"mtu:{network.mtu}," if network.mtu is not None else ""
    if isolated:
        lines.append(f"ra-param={network.bridge_name},{mtu}0,0")  # lifetime 0: not a default router
    elif mtu:
        lines.append(f"ra-param={network.bridge_name},{mtu}600")
    return lines


def hosts(network: Network, ports: tuple[Port, ...] = ()) -> str:
    """The text of dhcp-hostsfile: static leases, and the addresses reserved for ports."""
    lines = []
    aside = {port.mac: port.ipv4 for port in ports if port.ipv4}
    for host in network.host:
        ipv4 = host.ipv4 or aside.get(host.mac.lower())
        parts = [host.mac.lower(), ipv4, f"[{host.ipv6}]" if host.ipv6 else None, host.name]
        lines.append(",".join(part for part in parts if part))
    known = {host.mac.lower() for host in network.host}
    lines += [f"{mac},{address}" for mac, address in sorted(aside.items()) if mac not in known]
    return "".join(f"{line}\n" for line in lines)


def names(network: Network) -> str:
    """The names that DNS knows besides those of leases, in the format of hosts(5).

    Names of static leases are included, so they resolve even before their guests have asked for a lease.
    """
    lines = [f"{record.address} {record.name}" for record in network.record]
    for host in network.host:
        lines += [f"{address} {host.name}" for address in (host.ipv4, host.ipv6) if address and host.name]
    return "".join(f"{line}\n" for line in lines)


def spec(network: Network, unit: str, binary: str, files: Files, account: Account) -> UnitSpec:
    return UnitSpec(
        name=unit,
        description=f"DHCP and DNS of network {network.name}",
        slice="virtd-network.slice",
        once=True,
        argv=(binary, "--keep-in-foreground", "--log-facility=-", "--pid-file=", f"--conf-file={files.config}"),
        environment=ENVIRONMENT,
        user=account.user,
        properties=tuple(_sandbox(files)),
        ground=True,
    )


def _sandbox(files: Files) -> list[Property]:
    return [
        *HARDENED,
        ("CapabilityBoundingSet", "t", CAPABILITIES),
        ("AmbientCapabilities", "t", CAPABILITIES),
        ("ProtectSystem", "s", "strict"),
        ("ReadWritePaths", "as", [files.leases]),
        ("InaccessiblePaths", "as", ["-/boot", "-/root", "-/srv", "-/tmp", "-/var/log", "-/var/tmp"]),
        ("ProtectHome", "s", "yes"),
        ("PrivateDevices", "b", True),
        ("ProtectProc", "s", "invisible"),
        ("ProtectKernelModules", "b", True),
        ("ProtectHostname", "b", True),
        ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"])),
        ("SystemCallFilter", "(bas)", (True, ["@system-service"])),
        ("MemoryDenyWriteExecute", "b", True),
        ("UMask", "u", 0o027),
        # It writes only the lease file, in a directory where it can't create others.
        ("LimitFSIZE", "t", leases.LIMIT),
        ("TimeoutStopUSec", "t", 5_000_000),
        # 65,536 leases take some 20 MiB, and it forks for each DNS query over TCP, up to 20 times.
        ("MemoryMax", "t", 256 << 20),
        ("TasksMax", "t", 64),
    ]
