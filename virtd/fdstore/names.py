# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which names of slots PID 1 preserves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtd.fdstore.errors import BadName

if TYPE_CHECKING:
    from collections.abc import Iterable

# systemd's fdname_is_valid(): printable ASCII without the colon that separates the names in $LISTEN_FDNAMES. A
# descriptor with any other name isn't refused by PID 1 but stored under the name "stored", and so lost to its owner.
# A backslash PID 1 keeps, but libsystemd takes it for an escape when it reads $LISTEN_FDNAMES.
LONGEST = 255
# Reserved for boxes (boxes.py).
BOX = "fdstore/box/"
_FIRST, _LAST = " ", "~"


def check(name: str) -> str:
    """`name` itself if it can name a slot, else BadName.

    Two or more parts joined by "/", none of them empty: the slash distinguishes slots from the sockets of a socket
    unit, whose names are unit names unless FileDescriptorName= says otherwise.
    """
    if len(name) > LONGEST:
        raise BadName(f"slot name of {len(name)} characters, the longest allowed is {LONGEST}: {name[:40]!r}...")
    if not all(_FIRST <= character <= _LAST for character in name):
        raise BadName(f"slot name {name!r} has a character that is not printable ASCII")
    if ":" in name or "\\" in name:
        raise BadName(f"slot name {name!r} has a colon or a backslash, which $LISTEN_FDNAMES can't carry")
    if name.startswith(BOX):
        raise BadName(f"slot name {name!r} is reserved for the store")
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise BadName(f"slot name {name!r} is not made of parts joined by /, as in qemu/web1/stdin")
    return name


def is_slot(name: str) -> bool:
    """Whether an inherited descriptor of this name is a stored one; those of socket units have no slash."""
    return "/" in name


def below(names: Iterable[str], prefix: str) -> list[str]:
    """Those of `names` that are `prefix` or lie below it, part by part: qemu/web1 is not above qemu/web10/stdin."""
    prefix = prefix.rstrip("/")
    return [name for name in names if name == prefix or name.startswith(prefix + "/")]
