# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks need of the host: its routes, its forwarding, dnsmasq and the user that this runs as."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from ...children import programs
from ...model.network import Mode
from . import links

if TYPE_CHECKING:
    from ...children.facts import Facts
    from ...model.network import Network
    from ...model.settings import Dnsmasq

PROC = "/proc"
# What dnsmasq's sandbox hides, see dnsmasq.py.
HIDDEN = ("/boot", "/home", "/root", "/srv", "/tmp")
FORWARD4 = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"


class Account(NamedTuple):
    """The user that dnsmasq runs as."""

    user: str
    uid: int
    gid: int


def account(settings: Dnsmasq, facts: Facts) -> Account:
    """The configured user. Raises HostError when there is no such user, or it is root."""
    hint = "systemd-sysusers virtd.conf makes one; or set dnsmasq.user in virtd.toml to another user."
    uid, gid = facts.ids(settings.user, None, "dnsmasq", hint)
    return Account(settings.user, uid, gid)


def dnsmasq(settings: Dnsmasq) -> str:
    """The program. Raises HostError when it is missing or not executable."""
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
    """Refuse a name that something else has, or, for mode "bridge", one that no bridge has."""
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


# Settings of the kernel's


def sysctl(name: str) -> str | None:
    try:
        with open(f"{PROC}/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def dotted(name: str) -> str:
    """A setting's name as sysctl(8) has it, which takes a dot in an interface's name as a slash."""
    return name.translate(str.maketrans("/.", "./"))


def set_sysctl(name: str, value: str) -> None:
    """Write a setting unless it says so already. One that this kernel doesn't have is left out. Raises HostError."""
    if sysctl(name) in (value, None):
        return
    try:
        with open(f"{PROC}/sys/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError as exc:
        raise errors.HostError(f"Cannot set {dotted(name)} to {value}: {exc.strerror}") from exc


def forwarding(key: str) -> str:
    """The setting for all interfaces, of which `key` ("ipv4/forwarding") is one interface's."""
    return FORWARD4 if key.startswith("ipv4") else FORWARD6


def forwarding_needed(network: Network) -> list[str]:
    """The settings that have to be on for the network's guests."""
    if network.mode not in (Mode.NAT, Mode.ROUTED):
        return []
    return [path for path, ip in ((FORWARD4, network.ipv4), (FORWARD6, network.ipv6)) if ip is not None]


def written_elsewhere(path: str) -> str:
    """A hint for a setting that can't be written from here."""
    return f"sysctl -w {dotted(path)}=1 does it, where /proc/sys can be written; or a file in sysctl.d(5)."


def allow_forwarding(network: Network) -> list[str]:
    """Have the host forward what the network needs. Returns the settings that were changed.

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
    """Have the host go on taking router advertisements. Returns the settings that were changed.

    A kernel that forwards takes none, and drops the routes that it has of them, unless the interface says 2: the host
    would be off the net.
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
    """The bridge's settings of IPv6: its addresses are those of the definition, and no guest tells it any others.

    `wanted`: whether the network has IPv6.
    """
    return {
        # Its link-local address is made of its MAC, and so known to the rules that keep others from using it.
        "ipv6/addr_gen_mode": 0,
        "ipv6/disable_ipv6": 0 if wanted else 1,
        "ipv6/accept_ra": 0,
        "ipv6/autoconf": 0,
    }


def addresses(network: Network) -> list[tuple[str, int]]:
    """The bridge's addresses, as the kernel shows them, and the lengths of their prefixes."""
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
    """The tables of an iptables that isn't nftables: "ip_tables_names" or "ip6_tables_names"."""
    return [line.rstrip("\n") for line in lines(f"net/{file}")]


def canonical(address: str) -> str:
    """An address as the kernel prints it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))
