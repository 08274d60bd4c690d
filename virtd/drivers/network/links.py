# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's interfaces as sysfs shows them, and the taps made for guests.

Reading costs microseconds and needs no privilege, so a listing may ask the kernel each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

CLASS = "/sys/class/net"
TUN = "/dev/net/tun"
PROBE = "vt--probe-"  # prefix of probe.py's taps; no guest's: domain names don't begin with "-"

# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


class Port(NamedTuple):
    """An interface in one of our networks and its user, both taken from its alias."""

    interface: str
    network: str
    user: str  # "qemu/web1"


def exists(name: str) -> bool:
    return os.path.exists(f"{CLASS}/{name}")


def is_bridge(name: str) -> bool:
    return os.path.isdir(f"{CLASS}/{name}/bridge")


def read(name: str, what: str) -> str:
    """The text of one of the interface's files in sysfs; "" if it doesn't exist."""
    try:
        with open(f"{CLASS}/{name}/{what}", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def mac(name: str) -> str:
    return read(name, "address")


def is_tap(name: str) -> bool:
    return os.path.exists(f"{CLASS}/{name}/tun_flags")


def mtu(name: str) -> int:
    return int(read(name, "mtu") or 0)


def is_up(name: str) -> bool:
    return bool(int(read(name, "flags") or "0", 16) & 1)


def master(name: str) -> str:
    """The bridge that the interface is in, or ""."""
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"{CLASS}/{name}/master"))
    return ""


def members(bridge: str) -> list[str]:
    """The interfaces in a bridge, whoever put them there."""
    try:
        return sorted(os.listdir(f"{CLASS}/{bridge}/brif"))
    except OSError:
        return []


def all_names() -> list[str]:
    try:
        return sorted(os.listdir(CLASS))
    except OSError:
        return []


def alias_of(network: str, user: str) -> str:
    """The alias of our interfaces, by which people (`ip link` shows it) and the next daemon recognise them."""
    return f"virtd network {network} for {user}"


def ports() -> list[Port]:
    """All interfaces that carry such an alias."""
    found = []
    for name in all_names():
        words = read(name, "ifalias").split(" ")
        if len(words) == 5 and words[:2] == ["virtd", "network"] and words[3] == "for":
            found.append(Port(name, words[2], words[4]))
    return found


def bearing(alias: str, mac: str = "", besides: Collection[str] = ()) -> str:
    """The only interface with this alias, and MAC if given, whatever its name; "" if there are none or several."""
    found = [name for name in all_names() if name not in besides and read(name, "ifalias") == alias]
    found = [name for name in found if mac in ("", read(name, "address"))]
    return found[0] if len(found) == 1 else ""


def make_tap(name: str, uid: int) -> None:
    """Make, or take over, a persistent tap that processes of `uid` may open. Raises OSError."""
    fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETOWNER, uid)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)
