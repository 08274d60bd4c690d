# SPDX-License-Identifier: LGPL-2.1-or-later
"""Aliases for odd paths in a unit's properties, which mean the same to every systemd.

systemd writes the properties that it gets over D-Bus to a file, which counts after a daemon-reload. There a space
ends a path, a colon begins the next, and quotes, "\\", "%" and "$" have special meanings; and since 254 the process
that sets up a sandbox always reads such a text, from which 257 loses quotes. So an odd path is replaced by a link to
it, such as /run/virtd/paths/qemu.web1/0: systemd follows links, in both the source and the destination of a bind
mount. The directory of the links is bound as well, because /run may be hidden by the time that the destination is
resolved.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

from .. import errors, files

if TYPE_CHECKING:
    from collections.abc import Iterable

Property = tuple[str, str, Any]

PLAIN: Final = r"/[A-Za-z0-9/._+,@=-]*"
# Text without a special meaning to systemd in any property: no specifiers, variables, escapes or quotes. The escapes
# in names of units are preserved.
WORDS: Final = r"[ !#&()*+,./0-9:<=>?@A-Z\[\]^_a-z{|}~-]*"
UNITS: Final = r"[A-Za-z0-9/._@:\\-]*"

BINDS: Final = ("BindPaths", "BindReadOnlyPaths")
LISTS: Final = ("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths")
DEPENDENCIES: Final = ("After", "Before", "Requires", "Wants", "BindsTo", "Conflicts")
# Quoted in the file; how systemd 252 reads a quoted "$" or ";" there doesn't affect a program that runs already.
COMMANDS: Final = ("ExecStart",)


def harmless(properties: Iterable[Property], directory: str) -> tuple[list[Property], list[str]]:
    """The properties with odd paths replaced by aliases in `directory`, and these paths, beginning with alias 0.

    Raises HostError for other text whose meaning would change. Pure.
    """
    odd: list[str] = []

    def named(path: str) -> str:
        if re.fullmatch(PLAIN, path):
            return path
        if path not in odd:
            odd.append(path)
        return f"{directory}/{odd.index(path)}"

    found: list[Property] = []
    for key, signature, value in properties:
        if key in BINDS:
            value = [(named(source), named(target), *rest) for source, target, *rest in value]
        elif key in LISTS:
            value = [entry[: entry.index("/")] + named(entry[entry.index("/") :]) for entry in value]
        elif key == "TemporaryFileSystem":
            value = [(named(path), options) for path, options in value]
        elif key not in COMMANDS:
            _check(key, value)
        found.append((key, signature, value))
    if odd and not directory:
        raise errors.HostError(f"systemd could mistake a part of {odd[0]!r}")
    if odd:
        found.append(("BindReadOnlyPaths", "a(ssbt)", [(directory, directory, True, 0)]))
    return found, odd


def _check(key: str, value: Any) -> None:
    """Raise HostError if a text in `value` isn't plain."""
    match value:
        case str() if not re.fullmatch(UNITS if key in DEPENDENCIES else WORDS, value):
            raise errors.HostError(f"systemd could mistake a part of {key}={value!r}")
        case list() | tuple():
            for item in value:
                _check(key, item)
        case _:
            pass


def make(directory: str, odd: list[str]) -> None:
    """Make links to `odd` in a new directory. Raises HostError, with nothing left behind."""
    remove(directory)
    if not odd:
        return
    try:
        files.make_directory(os.path.dirname(directory), 0o700)
        os.mkdir(directory, 0o700)
        for number, path in enumerate(odd):
            os.symlink(path, f"{directory}/{number}")
    except OSError as exc:
        remove(directory)
        raise errors.HostError(f"Cannot make {directory}: {exc.strerror}", hint=files.hint(exc)) from exc


def remove(directory: str) -> None:
    """Idempotent; what can't be removed stays."""
    if os.path.lexists(directory):
        files.remove_tree(directory)
