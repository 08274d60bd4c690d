# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in D-Bus messages: values that Python has no type for, calls that came in, and answers that are tables."""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from .text import plain

if TYPE_CHECKING:
    from collections.abc import Container, Sequence


class Var(NamedTuple):
    """A value for a `v`, with the signature that D-Bus needs and Python doesn't have."""

    signature: str
    value: Any


class Descriptor(NamedTuple):
    """A value for an `h` of a reply. It is closed when the reply is under way."""

    fd: int


NO_REPLY_EXPECTED: Final = 1  # a flag of messages, as the D-Bus specification has it
RANGES: Final = {
    "n": (-1 << 15, (1 << 15) - 1), "q": (0, (1 << 16) - 1), "i": (-1 << 31, (1 << 31) - 1),
    "u": (0, (1 << 32) - 1), "x": (-1 << 63, (1 << 63) - 1), "t": (0, (1 << 64) - 1),
}  # fmt: skip


def sendable(value: Any) -> Any:
    """The same values with all text in them plain, and numbers that are too large as large as they may be."""
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


class Connection(Protocol):
    """What a call came by; see bus.Bus."""

    def pack(self, signature: str, values: Sequence[Any]) -> Any: ...
    def unpack(self, message: Any) -> tuple[Any, ...]: ...
    def attach(self, message: Any, fds: Sequence[int]) -> None: ...
    def send(self, message: Any) -> None: ...


class MethodCall:
    """A call that a peer made to us. Exactly one of `reply` and `error` has to follow, at any time."""

    def __init__(self, bus: Connection, message: Any) -> None:
        self._bus = bus
        self._message = message
        self.sender: str = message.get_sender() or ""
        self.path: str = message.get_path() or ""  # missing where its header is of another type
        self.interface: str = message.get_interface() or ""
        self.member: str = message.get_member() or ""
        self.signature: str = message.get_signature()

    @functools.cached_property
    def args(self) -> tuple[Any, ...]:
        """To be asked for when `signature` is as expected: what a stranger sends may be of any kind and size."""
        return self._bus.unpack(self._message)

    def answer(self, body: Any) -> int:
        """Reply with what Bus.pack made; its size in bytes."""
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
                reply.set_body(self._bus.pack(signature, plain))
                self._bus.attach(reply, fds)
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
    """An answer that is an array of structs. Rows become Python values when they are asked for.

    To unpack all of a large one takes PyGObject 8 microseconds for each value.
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
