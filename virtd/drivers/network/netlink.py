# SPDX-License-Identifier: LGPL-2.1-or-later
"""netlink(7): the layout of messages and their attributes, and the sockets that carry them.

Written by hand, because it is short: pyroute2 (measured: 0.7.7 on Python 3.13) takes 90 ms to import and 15 MB of
memory, as much as the whole daemon, for 262 modules that include an HTTP server and unittest. The layout is the
kernel's, include/uapi/linux/netlink.h.

rtnetlink.py contains what virtd changes of the kernel's routing, kernel.py what it reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_ERROR = struct.Struct("=iI")  # nlmsgerr: the error, and the header of the request that caused it
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400  # NLM_F_*, in requests that create something
_CAPPED, _WITH_TEXT = 0x100, 0x200  # NLM_F_CAPPED and NLM_F_ACK_TLVS, in replies
_NESTED, _KIND = 0x8000, 0x3FFF  # NLA_F_NESTED, NLA_TYPE_MASK
_ERROR_TEXT = 1  # NLMSGERR_ATTR_MSG
_SOL_NETLINK, _ADD_MEMBERSHIP, _CAP_ACK, _EXT_ACK = 270, 1, 10, 11
_MOST = 1 << 16  # bytes of one datagram

NETFILTER, SOCK_DIAG = 12, 4  # NETLINK_NETFILTER, NETLINK_SOCK_DIAG
NFGEN = struct.Struct("=BBH")  # nfgenmsg, which begins every netfilter message: family, version, resource
NFTABLES, CONNTRACK = 10 << 8, 1 << 8  # NFNL_SUBSYS_*: the netfilter subsystem of a message


class NetlinkError(OSError):
    """The kernel refused; `strerror` is the kernel's own text if there is one."""


class Attributes(dict[int, bytes]):
    """A message's attributes by number. Decoding stops at the first truncated one."""

    def __init__(self, data: bytes) -> None:
        super().__init__(_attributes(data))

    def text(self, kind: int) -> str:
        """An attribute's text; "" if it is missing."""
        return _text(self.get(kind, b""))

    def number(self, kind: int, order: Literal["little", "big"] = sys.byteorder, *, signed: bool = False) -> int:
        """An attribute's number; 0 if it is missing."""
        return int.from_bytes(self.get(kind, b""), order, signed=signed)

    def within(self, kind: int) -> Attributes:
        """The attributes nested in this one."""
        return Attributes(self.get(kind, b""))


class Message(NamedTuple):
    kind: int
    flags: int
    sequence: int
    body: bytes

    def head(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fields before the attributes. Raises struct.error."""
        return layout.unpack_from(self.body)

    def attributes(self, layout: struct.Struct) -> Attributes:
        return Attributes(self.body[layout.size :])

    def text(self, layout: struct.Struct, kind: int) -> str:
        """The text of one attribute, without decoding those after it."""
        return next((_text(value) for one, value in _attributes(self.body[layout.size :]) if one == kind), "")


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. Raises NetlinkError at the first malformed one."""
    while len(data) >= _HEADER.size:
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            raise _unknown()
        yield Message(kind, flags, sequence, data[_HEADER.size : length])
        data = data[length + 3 & ~3 :]


def attribute(kind: int, value: bytes | str | int) -> bytes:
    """Encode one attribute; a number takes 32 bits in the machine's byte order."""
    if isinstance(value, str):
        value = value.encode() + b"\0"
    elif isinstance(value, int):
        value = value.to_bytes(4, sys.byteorder)
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that consists of others, flagged as nested: newer parts of the kernel require that."""
    return attribute(kind | _NESTED, b"".join(parts))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _KIND, data[_ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """Turn errors in decoding a reply into NetlinkError."""
    try:
        yield
    except (struct.error, LookupError, ValueError, OverflowError):
        raise _unknown() from None


def _unknown() -> NetlinkError:
    return NetlinkError(errno.EBADMSG, "the kernel's answer isn't one that virtd knows")


def _check(message: Message) -> None:
    """Raise the error in an NLMSG_ERROR; the number 0 is an acknowledgement."""
    with understood():
        number = -struct.unpack_from("=i", message.body)[0]
    if number == 0:
        return
    if not 0 < number < 4096:  # MAX_ERRNO
        raise _unknown()
    words = os.strerror(number)
    if message.flags & _WITH_TEXT:
        rest = message.body[4 + _HEADER.size :]
        if not message.flags & _CAPPED and rest:
            rest = message.body[4 + _ERROR.unpack_from(message.body)[1] :]
        text = Attributes(rest).text(_ERROR_TEXT)
        words = f"{words} ({text})" if text else words
    raise NetlinkError(number, words)


class _Socket:
    """A netlink socket. Close it, or use it in a with statement."""

    def __init__(self, protocol: int, flags: int, options: Iterable[tuple[int, int]]) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | flags, protocol)
        try:
            self._socket.bind((0, 0))
            for option, value in options:
                self._socket.setsockopt(_SOL_NETLINK, option, value)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


class Requests(_Socket):
    """Sends requests and waits for the kernel's replies: mostly microseconds, but deletions wait for the kernel's
    grace periods, so they belong in a thread.
    """

    def __init__(self, protocol: int) -> None:
        super().__init__(protocol, 0, [(_CAP_ACK, 1), (_EXT_ACK, 1)])
        self._sequence = 0

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Make a change. Raises NetlinkError."""
        self._send(kind, flags | _ACK, body)
        for message in self._answers():
            if message.kind == _NLMSG_ERROR:
                _check(message)
                return

    def answer(self, kind: int, body: bytes) -> Message:
        """The single message that answers a request for one thing. Raises NetlinkError."""
        self._send(kind, 0, body)
        message = next(self._answers())
        if message.kind == _NLMSG_ERROR:
            _check(message)
        return message

    def dump(self, kind: int, body: bytes) -> Iterator[Message]:
        """All messages that answer a request for everything. Raises NetlinkError."""
        self._send(kind, _DUMP, body)
        for message in self._answers():
            if message.kind == _NLMSG_DONE:
                return
            if message.kind == _NLMSG_ERROR:
                _check(message)
            yield message

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        head = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(head + body)

    def _answers(self) -> Iterator[Message]:
        """The messages that answer the last request."""
        while True:
            for message in messages(self._socket.recv(_MOST)):
                if message.sequence == self._sequence:
                    yield message


class Multicast(_Socket):
    """Receives multicast notifications; never blocks."""

    def __init__(self, protocol: int, *groups: int) -> None:
        super().__init__(protocol, socket.SOCK_NONBLOCK, [(_ADD_MEMBERSHIP, group) for group in groups])

    def fileno(self) -> int:
        return self._socket.fileno()

    def heard(self) -> Iterator[Message | None]:
        """The messages received so far; None where some were lost because they arrived faster than they were read."""
        while True:
            try:
                data = self._socket.recv(_MOST)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            with contextlib.suppress(NetlinkError):
                yield from messages(data)
