# SPDX-License-Identifier: LGPL-2.1-or-later
"""The types of the Varlink interfaces, generated from the replies' Structs: what is described is what is sent.

An interface has the types that its methods' text names, and those nested in them.
"""

from __future__ import annotations

import functools
import importlib
import re
import types
import typing
from typing import Any

from ..replies import Reply
from . import idl

MODULES = tuple(f"virtd.replies{name}" for name in ("", ".daemon", ".events", ".guests", ".networks", ".storage"))
_BASIC = {str: "string", bool: "bool", int: "int", float: "float", Any: "object"}


@functools.cache
def structs() -> dict[str, type[Reply]]:
    """All replies, by name."""
    return {
        name: cls
        for module in map(importlib.import_module, MODULES)
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, Reply) and cls is not Reply
    }


def description(interface: str) -> str:
    """The interface's text with its types: the answer to GetInterfaceDescription."""
    text = idl.text(interface)
    wanted = re.findall(r": \??(?:\[\])?([A-Z]\w*)", text)
    found: dict[str, str] = {}
    while wanted:
        name = wanted.pop(0)
        if name not in found:
            found[name] = "\n".join(_type(name, structs()[name], wanted))
    return "\n\n".join([text.rstrip("\n"), *found.values()]) + "\n"


def fields(cls: type[Reply]) -> dict[str, Any]:
    """The annotations of a Struct by field, in order."""
    hints = typing.get_type_hints(cls, localns=dict(structs()), include_extras=True)
    return {name: hints[name] for name in cls.__struct_fields__}


def _type(name: str, cls: type[Reply], wanted: list[str]) -> list[str]:
    """Comments on fields are put before the type: not every parser of these texts accepts them inside."""
    said = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()]
    rows = []
    for field, annotated in fields(cls).items():
        hint = annotated
        if typing.get_origin(hint) is typing.Annotated:
            hint, words = typing.get_args(hint)[:2]
            said.append(f"  {field}: {words}")
        rows.append(f"  {field}: {written(hint, wanted)}")
    return [*(f"# {line}".rstrip() for line in said), f"type {name} (", ",\n".join(rows), ")"]


def written(hint: Any, wanted: list[str]) -> str:
    """A type in Varlink's notation; the names of Structs in it are added to `wanted`."""
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case types.UnionType | typing.Union:
            (inner,) = (arg for arg in args if arg is not type(None))
            return f"?{written(inner, wanted)}"
        case origin if origin is list:
            return f"[]{written(args[0], wanted)}"
        case origin if origin is dict:
            return f"[string]{written(args[1], wanted)}"
    if isinstance(hint, type) and issubclass(hint, Reply):
        wanted.append(hint.__name__)
        return hint.__name__
    return _BASIC[hint]
