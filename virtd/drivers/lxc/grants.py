# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which IDs of the host root may give to containers, by subuid(5), subgid(5), passwd(5) and group(5)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ... import errors
from .. import ids
from ..ids import Range

if TYPE_CHECKING:
    from ...model import container as model


def own(etc: str, file: str) -> list[Range]:
    """What root may give to containers: its lines, or our default range if it has none."""
    return [entry for entry in ids.grants(f"{etc}/{file}") if entry.owner in ("root", "0")] or [ids.CONTAINERS]


def others(etc: str, guests: Range) -> list[Range]:
    """What is granted to anybody but root, belongs to a user or a group, or is reserved for guests."""
    found = [guests]
    for file in ("subuid", "subgid"):
        found += [
            entry._replace(owner=f"{entry.owner} ({etc}/{file})")
            for entry in ids.grants(f"{etc}/{file}")
            if entry.owner not in ("root", "0")
        ]
    for file, noun in (("passwd", "user"), ("group", "group")):
        try:
            with open(f"{etc}/{file}", encoding="utf-8", errors="replace") as lines:
                rows = [line.split(":") for line in lines]
        except OSError:
            continue
        found += [
            Range(f"{noun} {row[0]}", int(row[2]), 1)
            for row in rows
            if row[2:] and re.fullmatch("[0-9]{1,10}", row[2])
        ]
    return found


def check(wanted: model.IdMap, source: str, guests: Range = ids.GUESTS, *, etc: str = "/etc") -> None:
    """Refuse a map that the host's files don't allow. Raises InvalidDefinition."""
    first, last = wanted.first, wanted.first + wanted.count - 1
    for file in ("subuid", "subgid"):
        mine = own(etc, file)
        if not any(entry.holds(first, wanted.count) for entry in mine):
            allowed = ", ".join(f"{entry.first} to {entry.last}" for entry in mine)
            raise errors.InvalidDefinition(
                source,
                "idmap",
                f"expected IDs that {etc}/{file} allows root to give away ({allowed}), got {first} to {last}",
                hint=f"Choose others, or add a line to /etc/subuid and /etc/subgid: root:{first}:{wanted.count}.",
            )
    for entry in others(etc, guests):
        if entry.meets(first, wanted.count):
            has = f"got {first} to {last}, of which {entry.owner} has some"
            raise errors.InvalidDefinition(source, "idmap", f"expected IDs that nobody else has, {has}")
