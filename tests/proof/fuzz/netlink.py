# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of netlink(7): the kernel's, but names and aliases in them are other people's."""

from __future__ import annotations

import contextlib
import socket
import struct

from virtd.drivers.network import kernel as kernel_
from virtd.drivers.network import trace, watch

_ATTRIBUTE = struct.pack("=HH4s", 8, 3, b"eth0")
_LINK = struct.pack("=BxHiII", 0, 1, 2, 1, 0) + _ATTRIBUTE
_ADDRESS = struct.pack("=BBBBi", 2, 24, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes([10, 0, 0, 1]))


def _message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


_DONE = _message(3, struct.pack("=i", 0))
SEEDS = (
    b"\0" + _message(16, _LINK) + _message(17, _LINK),
    b"\0" + _message(0x0A00, b"\2\0\0\0" + struct.pack("=HH8s", 12, 1, b"virtd-a\0")) + _message(0x0A0F, b""),
    b"\0"
    + _message(
        0x0A11,
        b"\1\0\0\0"
        + struct.pack("=HH4sHH4s", 8, 1, b"a\0\0\0", 8, 2, b"b\0\0\0")
        + struct.pack("=HHHH4sHH4s", 20, 5, 8, 1, b"\xff\xff\xff\xfd", 8, 2, b"c\0\0\0"),
    ),
    b"\3" + _message(20, _ADDRESS) + _DONE,
    b"\1" + _message(16, _LINK) + _DONE,
    b"\2" + _message(2, struct.pack("=i", 0)),
    b"\2" + _message(2, struct.pack("=i", -(1 << 31))),  # once an OverflowError
    b"\2" + _message(2, struct.pack("=i", -17) + _message(16, b"") + struct.pack("=HH4s", 8, 1, b"no!\0"), 0x300),
)
WORDS = (struct.pack("=I", 16), struct.pack("=H", 2), struct.pack("=H", 3), b"\0\0\0\0", _DONE)


class Answering(kernel_.Kernel):
    """Whatever is asked, the kernel says `data`, and then that this was all."""

    def __init__(self, data: bytes) -> None:
        self._ours, self._socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sequence = 0
        self.numbers = {}
        for message in (data, _DONE, _message(2, struct.pack("=i", 0))):
            self._ours.send(message)
        self._socket.setblocking(False)

    def _send(self, _kind: int, _flags: int, _body: bytes) -> None:
        self._sequence = 1

    def close(self) -> None:
        self._ours.close()
        self._socket.close()


def target(data: bytes) -> None:
    if not data or not data[1:]:
        return
    match data[0] % 6:
        case 0:
            for found in (*watch.tables(data[1:]), *(name for name, _index in watch.links(data[1:]))):
                assert found.isprintable() or found
            for step in trace.parse(data[1:]):
                assert 0 <= step.number < 1 << 16
        case kind:
            kernel = Answering(data[1:])
            try:
                with contextlib.suppress(OSError):  # NetlinkError, or nothing more to read
                    if kind == 1:
                        assert kernel.links({"eth0"}).keys() <= {"eth0"}
                    elif kind == 3:
                        kernel.all_addresses({1: "lo"})
                    elif kind == 4:
                        kernel.neighbours_of_ports({1: "lo"})
                    elif kind == 5:
                        kernel.route_to("10.0.0.1")
                    else:
                        kernel.delete_address("lo", "127.9.9.9", 8)
            finally:
                kernel.close()
