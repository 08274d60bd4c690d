# SPDX-License-Identifier: LGPL-2.1-or-later
"""How objects are identified: the rules for names and UUIDs are the same for every kind."""

from __future__ import annotations

import re
import uuid as uuidlib
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from .document import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from .. import errors

# Not compiled here: a daemon that takes running guests over has no definition to check.
NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,63})"
# What no name may end in: its NAME.log would be the console log of the one without that ending, and its directory in
# /run/virtd be where the record of that one is, or the mark of its making.
ENDINGS = (".console", ".json", ".creating")
# A volume is a file of this name in a pool's directory, or a logical volume. lvm(8) allows a few characters less.
VOLUME = r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,126}"
UUID = r"[0-9A-Fa-f]{8}(-?)(?:[0-9A-Fa-f]{4}\1){3}[0-9A-Fa-f]{12}"
MAC = r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}"


class Named(Protocol):
    """A definition."""

    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> str | None: ...


T = TypeVar("T", bound=msgspec.Struct)


def check(
    one: Named, refuse: Callable[[str, str], errors.InvalidDefinition], endings: tuple[str, ...] = ENDINGS
) -> None:
    """Check the name and the UUID. Raises what `refuse(key, expected)` returns."""
    if not re.fullmatch(NAME, one.name):
        raise refuse(
            "name",
            f"expected 1 to 64 letters, digits, '.', '_' or '-', the first one no '.' or '-', got {shown(one.name)}",
        )
    if one.name.endswith(endings):
        raise refuse("name", f"expected a name that doesn't end in {' or '.join(endings)}, got {shown(one.name)}")
    if one.uuid is not None and canonical_uuid(one.uuid) is None:
        raise refuse("uuid", f"expected a UUID such as {uuidlib.UUID(int=0)}, got {shown(one.uuid)}")


def canonical(one: T, uuid: str | None) -> T:
    """The checked definition with its UUID in one spelling: the same UUID written in two ways is still the same."""
    return msgspec.structs.replace(one, uuid=canonical_uuid(uuid)) if uuid is not None else one


def canonical_uuid(text: str) -> str | None:
    """The UUID in lower case with hyphens, or None when `text` isn't one."""
    # uuid.UUID alone takes much more for one: digits of other scripts, underscores, "urn:" anywhere.
    return str(uuidlib.UUID(text)) if re.fullmatch(UUID, text) else None
