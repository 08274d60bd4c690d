# SPDX-License-Identifier: LGPL-2.1-or-later
"""Definition files of all drivers. They are changed as little as possible, because people write them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid as uuidlib
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .. import __version__, errors, files, journal, strictmodes, untrusted
from ..messages import Message
from ..model.document import BOM, LIMIT
from ..text import plain, word
from .protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..paths import Listing

AT_ONCE = 16  # threads that write definitions: a file system's journal commits so many with one flush
D = TypeVar("D")

_AUTOSTART = r"(?m)^autostart[ \t]*=[ \t]*(?:true|false)\b"
_TABLE = r"(?m)^[ \t]*\["


def read(path: str) -> str:
    """A definition's text; its file may be a symbolic link.

    Raises InvalidDefinition when it isn't a file that only root can write, or not in UTF-8; or OSError.
    """
    try:
        link = stat.S_ISLNK(os.lstat(path).st_mode)
        fd = untrusted.open_regular(path, follow=link)
        try:
            strictmodes.require(path, os.fstat(fd))
            if link:
                strictmodes.require_directories(path)
            raw = untrusted.read_open(fd, path, LIMIT)
        finally:
            os.close(fd)
    except untrusted.Unfit as exc:
        raise errors.InvalidDefinition(path, "", f"can't be read: {exc.strerror}") from exc
    return decoded(raw, path)


def decoded(raw: bytes, source: str) -> str:
    """A definition's text. Raises InvalidDefinition."""
    try:
        return raw.decode().removeprefix(BOM)
    except UnicodeDecodeError as exc:
        raise errors.InvalidDefinition(source, "", f"UTF-8 text expected, but byte {exc.start} isn't") from exc


def troubles(directory: str, found: Listing) -> Iterator[tuple[str, Problem]]:
    """What is wrong with a directory of definitions, as ("", problem), and with files whose names no object can have,
    as (name, problem).
    """
    if found.wrong:
        text = f"{directory} can't be read: {found.wrong}"
        hint = "What was last read from it is in force. Fix it, then: systemctl reload virtd."
        journal.send(text, message_id=Message.DEFINITION_PROBLEM, level="error", VIRTD_FILE=directory)
        yield "", Problem(text, hint)
        return
    with contextlib.suppress(OSError):
        for where, wrong in strictmodes.faults_above(f"{os.path.realpath(directory)}/any"):
            text = f"Definitions in {where} can be replaced by others than root: {wrong}"
            journal.send(text, message_id=Message.DEFINITION_PROBLEM, level="warning", VIRTD_FILE=where)
            yield "", Problem(text, f"chown root: {word(where)}; chmod go-w {word(where)}; systemctl reload virtd.")
    for name in found.odd:
        stem = plain(name.removesuffix(".toml"))
        expected = "expected a file that is called as its object: 1 to 64 letters, digits, '.', '_' or '-', and .toml"
        yield stem, complain(f"{directory}/{name}", errors.InvalidDefinition(f"{directory}/{name}", "", expected))


def write(path: str, text: str, *, sync: bool = True) -> None:
    """Write a definition's file atomically. Raises HostError.

    A symbolic link stays one, and an existing file keeps its group and mode. Without `sync` the caller syncs the
    directory.
    """
    try:
        files.make_directory(os.path.dirname(path), 0o755)
        target = os.path.realpath(path)
        if target != path:
            strictmodes.require_directories(path)
        mode, group = 0o644, -1
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(target, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and not strictmodes.fault(status):
                mode, group = stat.S_IMODE(status.st_mode), status.st_gid
    except OSError as exc:
        raise errors.HostError(f"Cannot write {path}: {exc.strerror}", hint=files.hint(exc)) from exc
    except errors.InvalidDefinition as exc:
        raise errors.HostError(f"Cannot write {exc.message}", hint=exc.hint) from exc
    files.write(target, text.encode(), mode=mode, group=group, sync_directory=sync)


def write_all(texts: Mapping[str, str]) -> dict[str, errors.HostError]:
    """Write definitions by path; returns those that couldn't be written, and why.

    Each waits for the disk, so a thousand written one after the other would take a minute.
    """

    def one(path: str) -> errors.HostError | None:
        try:
            write(path, texts[path], sync=False)
        except errors.HostError as exc:
            return exc
        return None

    if not texts:
        return {}
    from concurrent.futures import ThreadPoolExecutor  # no start of the daemon needs it otherwise

    with ThreadPoolExecutor(min(AT_ONCE, len(texts))) as pool:
        results = dict(zip(texts, pool.map(one, texts), strict=True))
    for directory in {os.path.dirname(os.path.realpath(path)) for path in texts}:
        files.sync(directory)
    return {path: exc for path, exc in results.items() if exc is not None}


def with_uuid(text: str, uuid: str = "") -> str:
    """The text of a definition without a uuid, with `uuid` or a new one as its first key."""
    return f'uuid = "{uuid or uuidlib.uuid4()}"\n{text.removeprefix(BOM)}'


def with_autostart(text: str, *, enable: bool) -> str:
    """The text with its top-level key `autostart` set, and otherwise unchanged."""
    text = text.removeprefix(BOM)
    table = re.search(_TABLE, text)
    head, tail = (text[: table.start()], text[table.start() :]) if table else (text, "")
    line = f"autostart = {str(enable).lower()}"
    head, count = re.subn(_AUTOSTART, line, head, count=1)
    return head + tail if count else f"{line}\n{text}"


def in_force(definition: Any, text: str) -> dict[str, Any]:
    """The part of a record that holds the definition that an object was started with."""
    return {"definition": text, "parsed": msgspec.to_builtins(definition), "parsed_by": __version__}


def text_in_force(data: dict[str, Any]) -> str:
    """The text of that definition in a record's `data`; "" if there is none."""
    text = data.get("definition")
    return text if isinstance(text, str) else ""


def parsed(data: dict[str, Any], text: str, kind: type[D]) -> D | None:
    """The definition in `text`, if this version of virtd has put it into a record's `data`.

    That takes microseconds, while parsing TOML takes a millisecond.
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
    """The problem of a definition that can't be read, which is also logged."""
    known = exc if isinstance(exc, errors.VirtdError) else None
    said = exc.strerror if isinstance(exc, OSError) else str(exc)
    text = plain(known.message if known is not None else f"{path}: {said}")
    hint = known.hint if known is not None and known.hint else "Fix it, then: systemctl reload virtd."
    journal.send(text, message_id=Message.DEFINITION_PROBLEM, level="error", VIRTD_FILE=path)
    return Problem(text, hint)
