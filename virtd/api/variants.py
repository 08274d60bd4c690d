# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conversion of the host's answers to D-Bus's types, and back."""

from __future__ import annotations

from typing import Any

import msgspec

from ..replies import Reply
from ..systemd.bus import Var
from ..systemd.names import unit_name
from ..text import plain

Object = Reply

INT_END = 1 << 63  # end of D-Bus's largest signed type


def dictionary(value: Reply | dict[str, Any]) -> dict[str, Var]:
    """A reply, or a JSON object, as a{sv}. D-Bus has no null: those keys are left out."""
    table = value if isinstance(value, dict) else msgspec.structs.asdict(value)
    return {plain(key): variant(item) for key, item in table.items() if item is not None}


def variant(value: Any) -> Var:
    """A JSON value as the variant that comes closest."""
    match value:
        case bool():
            return Var("b", value)
        case int() if -INT_END <= value < INT_END:
            return Var("x", value)
        case float():
            return Var("d", value)
        case dict() | Reply():
            return Var("a{sv}", dictionary(value))
        case list() | tuple() if all(isinstance(item, str) for item in value):
            return Var("as", [plain(item) for item in value])
        case list() | tuple():
            return Var("av", [variant(item) for item in value if item is not None])
        case _:
            return Var("s", plain(str(value)))


def common(item: Object) -> dict[str, Var]:
    """The properties that every object has (introspection.COMMON), from its short form."""
    return {
        "Name": Var("s", item["name"]),
        "Driver": Var("s", item["driver"]),
        "Uuid": Var("s", item["uuid"]),
        "State": Var("s", str(item["state"])),
        "Reason": Var("s", plain(item.get("reason") or "")),
        "Since": Var("s", item.get("since") or ""),
        "Autostart": Var("b", bool(item.get("autostart"))),
    }


def supervised(item: Object) -> dict[str, Var]:
    """Likewise for introspection.SUPERVISED; Exit is only in the long form."""
    found = common(item) | {
        "Unit": Var("s", item.get("unit") or unit_name(item["driver"], item["name"])),
        "Pid": Var("u", item.get("pid") or 0),
    }
    if "exit" in item:
        found["Exit"] = Var("a{sv}", dictionary(item["exit"] or {}))
    return found
