# SPDX-License-Identifier: LGPL-2.1-or-later
"""From TOML text to a checked struct, with errors that name the file, the key and what was expected."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, TypeVar, get_type_hints

import msgspec

from .. import errors

T = TypeVar("T", bound=msgspec.Struct)

_AT = r"(?s)(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?"
_UNKNOWN = r"(?s)Object contains unknown field `(.*)`"
_MISSING = r"Object missing required field `(.*)`"

# msgspec names Python's and JSON's types; readers of its errors know TOML's.
_WORDS = ((" | null", ""), ("`object`", "table"), ("`str`", "string"), ("`int`", "integer"), ("`bool`", "boolean"))

LIMIT = 1 << 20  # a definition of more than 1 MiB is a mistake (a disk image, most likely)

# tomllib's time for a dotted key grows with the square of its parts: 5 s for 20,000. No definition is that deep.
PARTS = 128
LONG_NUMBER = "expected integers of at most 64 bits"
BOM = "\ufeff"  # what some editors put before UTF-8; TOML doesn't mention it, and it means nothing
_PART = r"""(?:"[^"\n]*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_DOTTED = rf"{_PART}(?:[ \t]*+\.[ \t]*+{_PART})*+"


def decode(text: str, source: str, kind: type[T]) -> T:
    """The `kind` that the TOML in `text` describes. Raises InvalidDefinition, whose `file` is `source`."""
    if len(text) > LIMIT:
        raise too_large(source, len(text))
    if text.count(".") >= PARTS and any(text.count(".", *key.span()) >= PARTS for key in re.finditer(_DOTTED, text)):
        raise errors.InvalidDefinition(source, "", f"expected keys of at most {PARTS} parts")
    import tomllib  # 2 ms, which a daemon whose guests all run doesn't need before it answers

    try:
        table = tomllib.loads(text.removeprefix(BOM))
    except tomllib.TOMLDecodeError as exc:
        raise errors.InvalidDefinition(source, "", f"expected TOML: {exc}") from exc
    except RecursionError as exc:
        raise errors.InvalidDefinition(source, "", "expected TOML that isn't nested as deeply") from exc
    except ValueError as exc:  # of int(), which reads some thousands of digits
        raise errors.InvalidDefinition(source, "", LONG_NUMBER) from exc
    if not _fits(table):
        raise errors.InvalidDefinition(source, "", LONG_NUMBER)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as exc:
        raise _explain(exc, source, kind) from exc


def _fits(table: dict[str, object]) -> bool:
    """Whether all integers have at most TOML's 64 bits. Python reads longer ones, but can't always print them."""
    left: list[object] = [table]
    while left:
        match left.pop():
            case dict() as inner:
                left += inner.values()
            case list() as inner:
                left += inner
            case int() as number if not -(1 << 63) <= number < 1 << 63:
                return False
            case _:
                pass
    return True


def too_large(source: str, size: int) -> errors.InvalidDefinition:
    """The error for a file that is too large to be a definition."""
    return errors.InvalidDefinition(source, "", f"expected a definition in TOML of at most 1 MiB, got {size} bytes")


def _explain(exc: msgspec.ValidationError, source: str, kind: type[msgspec.Struct]) -> errors.InvalidDefinition:
    """From msgspec's message, such as "Expected `int`, got `str` - at `$.disk[0].path`"."""
    match = re.fullmatch(_AT, str(exc))
    what, path = (match["what"], match["path"] or "") if match else (str(exc), "")
    if unknown := re.fullmatch(_UNKNOWN, what):
        import difflib  # 3 ms that only a mistake needs

        known = _fields(kind, path)
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return errors.InvalidDefinition(
            source,
            _join(path, unknown[1]),
            "unknown key",
            hint=f"Did you mean {close[0]}?" if close else f"Keys here: {', '.join(known)}.",
        )
    if missing := re.fullmatch(_MISSING, what):
        return errors.InvalidDefinition(source, _join(path, missing[1]), "expected this key, which is missing")
    if what.startswith("Invalid enum value"):
        what = f"Expected one of {', '.join(_choices(kind, path))}, got {what.removeprefix('Invalid enum value ')}"
    for theirs, ours in _WORDS:
        what = what.replace(theirs, ours)
    return errors.InvalidDefinition(source, path, what[:1].lower() + what[1:].replace("`", ""))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _fields(kind: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    """The keys that are known at `path`, such as `disk[0]` or `disk[...]`."""
    here = _type_at(kind, path)
    if isinstance(here, type) and issubclass(here, msgspec.Struct):
        return tuple(field.encode_name for field in msgspec.structs.fields(here))
    return ()


def _choices(kind: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    """The values that the key at `path` can have, quoted."""
    here = _type_at(kind, path)
    return tuple(f'"{member.value}"' for member in here) if isinstance(here, type) and issubclass(here, Enum) else ()


def _type_at(kind: type[msgspec.Struct], path: str) -> Any:
    """The struct or enumeration at `path`; None for anything else."""
    here: Any = kind
    for part in filter(None, re.sub(r"\[[^]]*\]", "", path).split(".")):
        hint = get_type_hints(here).get(part)
        here = None
        for candidate in (hint, *getattr(hint, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, (msgspec.Struct, Enum)):
                here = candidate
                break
        if here is None:
            return None
    return here


def shown(value: object) -> str:
    """A value as an error shows it: quoted, and cut where it is long."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
