# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations, by Varlink interface: which exist, and which module answers each.

A module has METHODS, and may name the module of its kind of D-Bus objects as OBJECTS (kinds.py). The interface's
text, with the parameters that are accepted, is the file of its name beside the module. Modules are imported at their
first call. D-Bus's methods are answered by the same METHODS (members.py).
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from ..host import Caller, Host, WithDescriptors
from ..host.access import Right
from ..replies import Reply

Answer = Callable[[Host, Caller, dict[str, Any]], Awaitable[Any]]
Stream = Callable[[Host, Caller, dict[str, Any]], AsyncIterator[Reply | WithDescriptors]]


class Method(NamedTuple):
    """One method: the right that it takes (virtd.host.access), and what answers it, or, for one that is called with
    `more`, what makes its replies.

    `waiting` ones change nothing and may last until somebody else does something. They end when the client hangs up,
    as do all that only look. `shared` ones are expensive: unprivileged users who ask for the same get the same
    answer, which may be a second old. The last reply of a stream is the one with an "event".
    """

    right: Right
    answer: Answer | None = None
    stream: Stream | None = None
    waiting: bool = False
    shared: bool = False


def look(
    answer: Answer | None = None, *, stream: Stream | None = None, waiting: bool = False, shared: bool = False
) -> Method:
    return Method(Right.LOOK, answer, stream, waiting, shared)


def overhear(answer: Answer | None = None, *, stream: Stream | None = None, waiting: bool = False) -> Method:
    return Method(Right.OVERHEAR, answer, stream, waiting)


def change(answer: Answer | None = None, *, stream: Stream | None = None) -> Method:
    return Method(Right.CHANGE, answer, stream)


MODULES: dict[str, str] = {
    "org.virtd1": "virtd.api.domains",
    "org.virtd1.Network": "virtd.api.networks",
    "org.virtd1.Container": "virtd.api.containers",
    "org.virtd1.Pool": "virtd.api.pools",
    "org.virtd1.Volume": "virtd.api.volumes",
}


def methods(interface: str) -> dict[str, Method]:
    """The methods of one of MODULES."""
    table: dict[str, Method] = importlib.import_module(MODULES[interface]).METHODS
    return table


def operation(name: str) -> Method:
    """The operation of that name, such as "org.virtd1.Pool.Build"."""
    interface, _, method = name.rpartition(".")
    return methods(interface)[method]


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that were not left out."""
    return {key: value for key, value in parameters.items() if value is not None}


async def under(key: str, result: Awaitable[Any]) -> dict[str, Any]:
    """A reply with the result as its field `key`."""
    return {key: await result}
