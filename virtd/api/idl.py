# SPDX-License-Identifier: LGPL-2.1-or-later
"""The texts of the Varlink interfaces, parsed for what the server must know: each method's parameters and types.

The text is what a client gets from GetInterfaceDescription (https://varlink.org/Interface-Definition), so description
and behaviour can't differ.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from typing import Any, NamedTuple

from .interfaces import MODULES

_METHOD = re.compile(r"^method (\w+)\(([^)]*)\) ->", re.MULTILINE)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "object": (dict,),
}


class Parameter(NamedTuple):
    """One parameter: `?` makes it optional, `[]` a list."""

    name: str
    kind: str
    optional: bool
    many: bool

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.many:
            return isinstance(value, list) and all(self._fits(item) for item in value)
        return self._fits(value)

    def _fits(self, value: Any) -> bool:
        return isinstance(value, _TYPES[self.kind]) and (self.kind == "bool" or not isinstance(value, bool))


@functools.cache
def text(interface: str) -> str:
    """The file beside the module that answers the interface."""
    found = importlib.util.find_spec(MODULES[interface])
    assert found is not None
    assert found.origin is not None
    with open(os.path.join(os.path.dirname(found.origin), f"{interface}.varlink"), encoding="utf-8") as file:
        return file.read()


@functools.cache
def methods(interface: str) -> dict[str, tuple[Parameter, ...]]:
    """Parameters by method name, without the interface's name."""
    return {
        match[1]: tuple(map(_parameter, filter(None, match[2].split(", "))))
        for match in _METHOD.finditer(text(interface))
    }


def _parameter(item: str) -> Parameter:
    name, _, kind = item.partition(": ")
    optional, kind = kind.startswith("?"), kind.removeprefix("?")
    return Parameter(name, kind.removeprefix("[]"), optional=optional, many=kind.startswith("[]"))


def problem(interface: str, method: str, parameters: dict[str, Any]) -> str | None:
    """The first parameter of `method` that is missing, unknown or of the wrong type; None if all are valid."""
    known = {parameter.name: parameter for parameter in methods(interface)[method]}
    for name in parameters:
        if name not in known:
            return name
    for name, parameter in known.items():
        if not parameter.accepts(parameters.get(name)):
            return name
    return None
