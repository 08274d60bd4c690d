# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether an interface leaves checksums to the hardware: SIOCETHTOOL, linux/ethtool.h."""

from __future__ import annotations

import array
import fcntl
import socket
import struct

_SIOCETHTOOL, _GTXCSUM, _STXCSUM = 0x8946, 0x16, 0x17  # linux/sockios.h, linux/ethtool.h


def checksums(name: str) -> bool | None:
    """Whether the hardware computes the checksums of packets that are sent; None if that can't be queried."""
    try:
        return bool(_ethtool(name, _GTXCSUM, 0))
    except OSError:
        return None


def set_checksums(name: str, *, offload: bool) -> None:
    """Set whether it does. Raises OSError."""
    _ethtool(name, _STXCSUM, int(offload))


def _ethtool(name: str, command: int, value: int) -> int:
    argument = array.array("I", [command, value])
    request = struct.pack("16sP16x", name.encode(), argument.buffer_info()[0])
    # Any socket will do, and virtd's unit allows no other kind.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
        fcntl.ioctl(one, _SIOCETHTOOL, request)
    return argument[1]
