# SPDX-License-Identifier: LGPL-2.1-or-later
"""The content of D-Bus messages: values, incoming calls, tables in answers, and errors."""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ... import errors
from ...text import plain

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from ...hints import Hint

DBUS: Final = "org.freedesktop.DBus"
DBUS_PATH: Final = "/org/freedesktop/DBus"
DISCONNECTED: Final = "org.freedesktop.DBus.Error.Disconnected"


class BusError(errors.HostError):
    """An error reply. `name` is its D-Bus name, as in org.freedesktop.systemd1.NoSuchUnit."""

    def __init__(self, name: str, message: str, *, hint: Hint = "") -> None:
        super().__init__(message or name, hint=hint)
        self.name = name


class Var(NamedTuple):
    """A value for a `v`, with the signature that D-Bus needs and a Python value doesn't have."""

    signature: str
    value: Any


class Descriptor(NamedTuple):
    """A value for an `h` of a reply. It is closed when the reply has been sent."""

    fd: int


NO_REPLY_EXPECTED: Final = 1  # a flag of messages, D-Bus specification
RANGES: Final = {
    "n": (-1 << 15, (1 << 15) - 1), "q": (0, (1 << 16) - 1), "i": (-1 << 31, (1 << 31) - 1),
    "u": (0, (1 << 32) - 1), "x": (-1 << 63, (1 << 63) - 1), "t": (0, (1 << 64) - 1),
}  # fmt: skip


def sendable(value: Any) -> Any:
    """The same values with all text in them plain, and numbers that are too large reduced to what fits."""
    match value:
        case str():
            return plain(value)
        case Var(signature, int() as number) if signature in RANGES:
            least, most = RANGES[signature]
            return Var(signature, max(least, min(most, number)))
        case Var():
            return Var(value.signature, sendable(value.value))
        case dict():
            return {sendable(key): sendable(item) for key, item in value.items()}
        case list():
            return [sendable(item) for item in value]
        case tuple():
            return tuple(sendable(item) for item in value)
        case _:
            return value


class Codec:
    """Converts between Python's values and the bodies of messages. It holds gi's modules, which are imported late."""

    def __init__(self, gio: Any, glib: Any) -> None:
        self.gio = gio
        self.kinds = gio.DBusMessageType
        self._glib = glib

    def attach(self, message: Any, fds: Sequence[int]) -> None:
        """Attach duplicates of these to a message, whose `h` are indices into them."""
        if fds:
            handles = self.gio.UnixFDList.new()
            for fd in fds:
                handles.append(fd)
            message.set_unix_fd_list(handles)

    def pack(self, signature: str, values: Sequence[Any]) -> Any:
        """A body for what we send to others, which never fails: see `sendable`."""
        try:
            return self.pack_as_is(signature, values)
        except (UnicodeEncodeError, OverflowError):
            return self.pack_as_is(signature, sendable(tuple(values)))

    def pack_as_is(self, signature: str, values: Sequence[Any]) -> Any:
        """A body; UnicodeEncodeError or OverflowError for values that D-Bus can't represent."""
        return self._glib.Variant(f"({signature})", tuple(self._wrap(value) for value in values))

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, Var):
            return self._glib.Variant(value.signature, self._wrap(value.value))
        if isinstance(value, tuple):
            return tuple(self._wrap(item) for item in value)
        if isinstance(value, list):
            return [self._wrap(item) for item in value]
        if isinstance(value, dict):
            return {key: self._wrap(item) for key, item in value.items()}
        return value

    def unpack(self, message: Any) -> tuple[Any, ...]:
        """The values of a message; the caller closes descriptors in it."""
        body = message.get_body()
        if body is None:
            return ()
        values: tuple[Any, ...] = body.unpack()
        if message.get_num_unix_fds() == 0:
            return values
        fds = list(message.get_unix_fd_list().steal_fds())
        unclaimed = set(fds)
        result = []
        for number, value in enumerate(values):
            if body.get_child_value(number).get_type_string() == "h":
                unclaimed.discard(fds[value])
                result.append(fds[value])
            else:
                result.append(value)
        for fd in unclaimed:
            os.close(fd)
        return tuple(result)


class Connection(Protocol):
    """The connection of a call; see Bus."""

    @property
    def codec(self) -> Codec: ...
    def send(self, message: Any) -> None: ...


class MethodCall:
    """A call by a peer to us. Exactly one of `reply` and `error` has to follow, at any time."""

    def __init__(self, bus: Connection, message: Any) -> None:
        self._bus = bus
        self._message = message
        self.sender: str = message.get_sender() or ""
        self.path: str = message.get_path() or ""  # missing if its header is of another type
        self.interface: str = message.get_interface() or ""
        self.member: str = message.get_member() or ""
        self.signature: str = message.get_signature()

    @functools.cached_property
    def args(self) -> tuple[Any, ...]:
        """To be read only if `signature` is as expected: a stranger may send values of any type and size."""
        return self._bus.codec.unpack(self._message)

    def answer(self, body: Any) -> int:
        """Reply with a body from Codec.pack; returns its size in bytes."""
        if self._wants_reply():
            reply = self._message.new_method_reply()
            reply.set_body(body)
            self._bus.send(reply)
        size: int = body.get_size()
        return size

    def reply(self, signature: str = "", *values: Any) -> None:
        fds = [value.fd for value in values if isinstance(value, Descriptor)]
        try:
            if self._wants_reply():
                numbers = itertools.count()
                plain = [next(numbers) if isinstance(value, Descriptor) else value for value in values]
                reply = self._message.new_method_reply()
                reply.set_body(self._bus.codec.pack(signature, plain))
                self._bus.codec.attach(reply, fds)
                self._bus.send(reply)
        finally:
            for fd in fds:
                os.close(fd)

    def error(self, name: str, message: str) -> None:
        if self._wants_reply():
            # A literal, because the other constructor takes a printf format.
            self._bus.send(self._message.new_method_error_literal(name, plain(message)))

    def _wants_reply(self) -> bool:
        return not self._message.get_flags() & NO_REPLY_EXPECTED


class Table:
    """An array of structs in an answer. Rows are converted to Python values on demand.

    Unpacking a large one takes PyGObject 8 microseconds for each value.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    def rows(self, columns: Sequence[int], keys: Container[str] | None = None) -> list[tuple[Any, ...]]:
        """These columns of all rows, or of those whose first column, a string, is one of `keys`."""
        found = []
        for number in range(self._array.n_children()):
            row = self._array.get_child_value(number)
            if keys is None or row.get_child_value(0).get_string() in keys:
                found.append(tuple(row.get_child_value(column).unpack() for column in columns))
        return found
