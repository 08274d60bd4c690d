# SPDX-License-Identifier: LGPL-2.1-or-later
"""D-Bus's methods as operations, answered by the same functions as on Varlink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..host import WithDescriptors
from ..systemd.bus import Descriptor
from . import idl, interfaces
from .variants import dictionary

if TYPE_CHECKING:
    from ..host import Caller, Host
    from ..replies import Reply
    from .introspection import Method


async def answer(
    host: Host, method: Method, subject: str | None, args: tuple[Any, ...], by: Caller
) -> tuple[Any, ...]:
    """The values that `method` returns; `subject`: the name of the object that it was called on."""
    operation = interfaces.operation(method.operation)
    assert operation.answer is not None
    reply: Any = await operation.answer(host, by, parameters(method, subject, args))
    value, fds = (reply.value, reply.fds) if isinstance(reply, WithDescriptors) else (reply, [])
    return tuple(_value(value, source, signature, fds) for source, signature in method.gives.sources)


def parameters(method: Method, subject: str | None, args: tuple[Any, ...]) -> dict[str, Any]:
    """As Varlink has them. What may be left out there is left out when it is empty, as D-Bus has no null; so is a
    time limit of 0 or less.
    """
    interface, _, name = method.operation.rpartition(".")
    optional = {parameter.name for parameter in idl.methods(interface)[name] if parameter.optional}
    found: dict[str, Any] = {}
    if subject is not None:
        found["pool" if interface == "org.virtd1.Volume" else "name"] = subject
    for (source, signature), value in zip(method.takes.sources, args, strict=True):
        if source not in optional or (value > 0 if signature == "d" else value):
            found[source] = value
    return found


def _value(reply: Reply | dict[str, Any], source: str, signature: str, fds: list[int]) -> Any:
    if signature == "h":
        return Descriptor(fds.pop(0))
    value: Any = reply
    for key in source.split("."):
        value = value[key]
    match signature:
        case "a{sv}":
            return dictionary(value)
        case "aa{sv}":
            return [dictionary(row) for row in value]
        case "s":
            return value or ""
    return value
