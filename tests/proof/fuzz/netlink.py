# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of netlink(7): the kernel's, but names and aliases in them are other people's."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

from virtd.drivers.network import kernel as kernel_
from virtd.drivers.network import listening, trace, watch
from virtd.drivers.network import netlink as netlink_

if TYPE_CHECKING:
    from collections.abc import Callable

_ATTRIBUTE = struct.pack("=HH4s", 8, 3, b"eth0")
_LINK = struct.pack("=BxHiII", 0, 1, 2, 1, 0) + _ATTRIBUTE
_ROUTE = struct.pack("=8BIHHI", 2, 24, 0, 0, 254, 2, 0, 1, 0, 8, 4, 1) + struct.pack(
    "=HH4s", 8, 1, bytes([10, 0, 0, 0])
)
_RULE = struct.pack("=8BI", 2, 24, 0, 0, 254, 0, 0, 8, 0) + struct.pack(
    "=HH4sHHB3x", 8, 1, bytes([10, 7, 0, 0]), 5, 21, 86
)
_SOCKET = struct.pack("=BBBB HH 16s16sI8x IIIII", 2, 10, 0, 0, 0x5000, 0, b"", b"", 0, 0, 0, 0, 0, 7)
_ADDRESS = struct.pack("=BBBBi", 2, 24, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes([10, 0, 0, 1]))


def _message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


_DONE = _message(3, struct.pack("=i", 0))
SEEDS = (
    b"\0" + _message(16, _LINK) + _message(17, _LINK) + _message(24, _ROUTE) + _message(33, _RULE),
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
    b"\4" + _message(28, struct.pack("=BxxxiHBBHH6s2xHHI", 7, 1, 0x42, 4, 0, 10, 2, b"RT\0\0\0\1", 8, 9, 3)) + _DONE,
    b"\5" + _message(24, _ROUTE),
    b"\6" + _message(24, _ROUTE),
    b"\7" + _message(20, _ADDRESS) + _DONE,
    b"\x08" + _message(32, _RULE) + _DONE,
    b"\x09" + _message(20, _SOCKET) + _DONE,
)
WORDS = (struct.pack("=I", 16), struct.pack("=H", 2), struct.pack("=H", 3), b"\0\0\0\0", _DONE)


def _answering(kind: type[netlink_.Requests], data: bytes) -> Any:
    """A socket of this kind on which the kernel says `data` whatever it is asked, and then that this was all."""

    class Answering(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self._ours, self._socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sequence, self.numbers = 0, {"lo": 1}
            for message in (data, _DONE, _message(2, struct.pack("=i", 0))):
                self._ours.send(message)
            self._socket.setblocking(False)

        def _send(self, _kind: int, _flags: int, _body: bytes) -> None:
            self._sequence = 1

        def close(self) -> None:
            self._ours.close()
            super().close()

        __exit__ = lambda self, *_exception: self.close()  # noqa: E731

    return Answering()


def _notified(data: bytes) -> None:
    with contextlib.suppress(OSError):  # NetlinkError
        for message in netlink_.messages(data):
            table, step = watch.table_of(message), trace.parse(message)
            assert table is None or table.isprintable() or table
            assert step is None or 0 <= step.number < 1 << 16
            with contextlib.suppress(OSError):
                kernel_.changed(message)


def _linked(kernel: kernel_.Kernel) -> None:
    assert kernel.links({"eth0"}).keys() <= {"eth0"}


ASKED: tuple[Callable[[kernel_.Kernel], object], ...] = (
    _linked,
    lambda kernel: kernel.delete_address("lo", "127.9.9.9", 8),
    lambda kernel: kernel.all_addresses({1: "lo"}),
    lambda kernel: kernel.neighbours_of_ports({1: "lo"}),
    lambda kernel: kernel.route_to("10.0.0.1"),
    lambda kernel: kernel.route("10.0.0.1", source="10.7.0.9", iif="lo"),
    lambda kernel: kernel.addresses("lo"),
    lambda kernel: kernel.routing_rules(86),
)


def target(data: bytes) -> None:
    if not data or not data[1:]:
        return
    match data[0] % (len(ASKED) + 2):
        case 0:
            _notified(data[1:])
        case number if number <= len(ASKED):
            with contextlib.suppress(OSError), _answering(kernel_.Kernel, data[1:]) as kernel:
                ASKED[number - 1](kernel)
        case _:
            with contextlib.suppress(OSError), _answering(listening.Diag, data[1:]) as diag:
                assert all(one.protocol == "tcp" for one in diag.listeners(socket.AF_INET, socket.IPPROTO_TCP))
