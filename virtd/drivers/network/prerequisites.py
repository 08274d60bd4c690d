# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks need of the host: routes, forwarding, dnsmasq and the user that it runs as."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from ... import errors, hostroot
from ...children import programs
from ...model.network import Mode
from . import links

if TYPE_CHECKING:
    from ...children.facts import Facts
    from ...model.network import Network
    from ...model.settings import Dnsmasq

PROC = "/proc"
# Hidden by dnsmasq's sandbox, see dnsmasq.py.
HIDDEN = ("/boot", "/home", "/root", "/srv", "/tmp")
FORWARD4 = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"


class Account(NamedTuple):
    """The user that dnsmasq runs as."""

    user: str
    uid: int
    gid: int


def account(settings: Dnsmasq, facts: Facts) -> Account:
    """The configured user. Raises HostError if that user doesn't exist, or is root."""
    hint = "systemd-sysusers virtd.conf makes one; or set dnsmasq.user in virtd.toml to another user."
    uid, gid = facts.ids(settings.user, None, "dnsmasq", hint)
    return Account(settings.user, uid, gid)


def dnsmasq(settings: Dnsmasq) -> str:
    """The path of the program. Raises HostError if it is missing or not executable."""
    if settings.binary and os.access(settings.binary, os.X_OK):
        for place in (settings.binary, os.path.realpath(settings.binary)):
            if f"/{place.split('/')[1]}" in HIDDEN:
                raise errors.HostError(
                    f"dnsmasq can't be run as {place}: its sandbox hides that directory",
                    hint="Install it in /usr/local/sbin or /opt, and set dnsmasq.binary in virtd.toml.",
                )
        return settings.binary
    if not settings.binary and (path := programs.find("dnsmasq")) is not None:
        return path
    raise errors.HostError(
        f"dnsmasq is missing: no {settings.binary or 'dnsmasq in ' + ', '.join(programs.PLACES)}",
        hint="Install dnsmasq (Debian: dnsmasq-base), or set dnsmasq.binary in virtd.toml.",
    )


def check_bridge(network: Network, source: str, mac: str) -> None:
    """Refuse a bridge name that is taken by something else or, in mode "bridge", one that no bridge has."""
    name = network.bridge_name
    if not network.own:
        if not links.is_bridge(name):
            what = "it is no bridge" if links.exists(name) else "there is no such interface"
            raise errors.InvalidDefinition(source, "bridge", f"expected a bridge of the host's: {name}: {what}")
        return
    if links.exists(name) and not (links.is_bridge(name) and links.mac(name) == mac):
        what = "a bridge" if links.is_bridge(name) else "an interface"
        raise errors.InvalidDefinition(
            source,
            "bridge",
            f"{name} is the name of {what} that isn't virtd's",
            hint='Choose another name, or, to use that bridge as it is, mode = "bridge".',
        )


# The kernel's settings


def sysctl(name: str) -> str | None:
    try:
        with open(f"{PROC}/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def dotted(name: str) -> str:
    """A setting's name as sysctl(8) writes it, which replaces dots in interface names with slashes."""
    return name.translate(str.maketrans("/.", "./"))


def set_sysctl(name: str, value: str) -> None:
    """Write a setting unless it already has that value; skip it if this kernel doesn't have it. Raises HostError."""
    if sysctl(name) in (value, None):
        return
    try:
        with open(hostroot.seen(f"{PROC}/sys/{name}"), "w", encoding="ascii") as file:
            file.write(value)
    except OSError as exc:
        raise errors.HostError(f"Cannot set {dotted(name)} to {value}: {exc.strerror}") from exc


def forwarding(key: str) -> str:
    """The setting for all interfaces that corresponds to an interface's `key` ("ipv4/forwarding")."""
    return FORWARD4 if key.startswith("ipv4") else FORWARD6


def forwarding_needed(network: Network) -> list[str]:
    """The settings that must be on for the network's guests."""
    if network.mode not in (Mode.NAT, Mode.ROUTED):
        return []
    return [path for path, ip in ((FORWARD4, network.ipv4), (FORWARD6, network.ipv6)) if ip is not None]


def written_elsewhere(path: str) -> str:
    """A hint for a setting that can't be written from here."""
    return f"sysctl -w {dotted(path)}=1 does it, where /proc/sys can be written; or a file in sysctl.d(5)."


def allow_forwarding(network: Network) -> list[str]:
    """Make the host forward what the network needs. Returns the settings that were changed.

    They are never reset: others may have come to rely on them.
    """
    changed = []
    for path in forwarding_needed(network):
        if sysctl(path) != "0":
            continue
        try:
            if path == FORWARD6:
                changed += _keep_advertisements()
            set_sysctl(path, "1")
        except errors.HostError as exc:
            raise errors.HostError(exc.message, hint=written_elsewhere(path)) from exc
        changed.append(f"{dotted(path)}=1")
    return changed


def _keep_advertisements() -> list[str]:
    """Have the host go on accepting router advertisements. Returns the settings that were changed.

    A kernel that forwards ignores them and drops the routes learned from them, unless the interface is set to 2: the
    host would lose its connection.
    """
    changed = []
    with contextlib.suppress(OSError):
        for interface in os.listdir(f"{PROC}/sys/net/ipv6/conf"):
            path = f"net/ipv6/conf/{interface}/accept_ra"
            if interface not in ("all", "lo") and sysctl(path) == "1":
                set_sysctl(path, "2")
                changed.append(f"{dotted(path)}=2")
    return changed


def calm(wanted: bool) -> dict[str, int]:  # noqa: FBT001
    """The bridge's IPv6 settings: it has the definition's addresses, and no guest can give it others.

    `wanted`: whether the network has IPv6.
    """
    return {
        # The link-local address is derived from the MAC, so the rules that reserve it know it.
        "ipv6/addr_gen_mode": 0,
        "ipv6/disable_ipv6": 0 if wanted else 1,
        "ipv6/accept_ra": 0,
        "ipv6/autoconf": 0,
    }


def addresses(network: Network) -> list[tuple[str, int]]:
    """The bridge's addresses as the kernel prints them, with their prefix lengths."""
    return [
        (canonical(str(interface.ip)), interface.network.prefixlen)
        for interface in (network.interface4, network.interface6)
        if interface is not None
    ]


def lines(path: str, most: int | None = None, skip: int = 0) -> list[str]:
    """The lines of a file below /proc, after the first `skip`, at most `most`."""
    try:
        with open(f"{PROC}/{path}", encoding="ascii") as file:
            return list(itertools.islice(file, skip, None if most is None else skip + most))
    except OSError:
        return []


def legacy_tables(file: str) -> list[str]:
    """The legacy iptables tables listed in `file`: "ip_tables_names" or "ip6_tables_names"."""
    return [line.rstrip("\n") for line in lines(f"net/{file}")]


def canonical(address: str) -> str:
    """An address as the kernel prints it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))
