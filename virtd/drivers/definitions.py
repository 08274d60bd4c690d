# SPDX-License-Identifier: LGPL-2.1-or-later
"""Definition files as all drivers keep them: changed in place as little as possible, for a person wrote them."""

from __future__ import annotations

import os
import re
import uuid as uuidlib
from typing import Any, TypeVar

import msgspec

from .. import __version__, errors, files, journal
from ..messages import Message
from .protocol import Problem

D = TypeVar("D")

_AUTOSTART = r"(?m)^autostart[ \t]*=[ \t]*(?:true|false)\b"
_TABLE = r"(?m)^[ \t]*\["


def read(path: str) -> str:
    """A definition's text. Raises OSError, or UnicodeDecodeError, which is a ValueError."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Put a definition in its place, whole or not at all. Raises HostError."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    except OSError as exc:
        raise errors.HostError(f"Cannot make {os.path.dirname(path)}: {exc.strerror}") from exc
    files.write(path, text.encode(), mode=0o644)


def with_uuid(text: str, uuid: str = "") -> str:
    """A definition that has none, with `uuid`, or a new one, as its first key."""
    return f'uuid = "{uuid or uuidlib.uuid4()}"\n{text}'


def with_autostart(text: str, *, enable: bool) -> str:
    """A definition with its top-level key `autostart` set; the rest of the text stays as it is."""
    table = re.search(_TABLE, text)
    head, tail = (text[: table.start()], text[table.start() :]) if table else (text, "")
    line = f"autostart = {str(enable).lower()}"
    head, count = re.subn(_AUTOSTART, line, head, count=1)
    return head + tail if count else f"{line}\n{text}"


def in_force(definition: Any, text: str) -> dict[str, Any]:
    """What a record holds of the definition that an object was started with."""
    return {"definition": text, "parsed": msgspec.to_builtins(definition), "parsed_by": __version__}


def parsed(data: dict[str, Any], text: str, kind: type[D]) -> D | None:
    """The definition that `text` holds, if a record's `data` has it, put there by this version of virtd.

    That takes microseconds, where TOML takes a millisecond for each.
    """
    if data.get("definition") != text or data.get("parsed_by") != __version__:
        return None
    try:
        return msgspec.convert(data.get("parsed"), kind)
    except msgspec.ValidationError:
        return None


def check_name(name: str, stem: str, path: str) -> None:
    """Raise InvalidDefinition when a definition's `name` isn't its file's, `stem`."""
    if name != stem:
        raise errors.InvalidDefinition(path, "name", f'expected "{stem}", as the file is called, got "{name}"')


def complain(path: str, exc: Exception) -> Problem:
    """The problem that a file which can't be read makes; the journal is told."""
    known = exc if isinstance(exc, errors.VirtdError) else None
    text = known.message if known is not None else f"{path}: {exc}"
    hint = known.hint if known is not None and known.hint else "Mend it, then: systemctl reload virtd."
    journal.send(text, message_id=Message.DEFINITION_PROBLEM, level="error", VIRTD_FILE=path)
    return Problem(text, hint)
