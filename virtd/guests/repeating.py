# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies a child's stderr to the journal; the record says how far, so that no line is copied twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from ..logs.chain import Cursor
from ..logs.stderrlog import StderrLog

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from ..children.child import Child
    from ..objects.persistent import Persistent


class Options(TypedDict, total=False):
    """See StderrLog."""

    sort: Callable[[str], str | None]
    send: Callable[..., object]


class Repeater:
    """The copying for the child of `owner`; the options are those of a StderrLog."""

    def __init__(self, owner: Persistent, **options: Unpack[Options]) -> None:
        self._owner = owner
        self._options = options
        self._log: StderrLog | None = None

    def begin(self, child: Child) -> None:
        """Begin where an earlier daemon stopped."""
        if child.stderr is not None:
            kept = self._owner.data.get("stderr")
            cursor = Cursor(str(kept["file"]), int(kept["offset"])) if isinstance(kept, dict) else None
            self._log = StderrLog(child.stderr, self._owner.fields(), cursor, **self._options)

    def forward(self, *, final: bool = False) -> None:
        """Copy what was added."""
        if self._log is None or self._owner.record is None:
            return
        before = self._log.cursor
        while self._log.forward(final=final):
            pass
        if (cursor := self._log.cursor) != before:
            place = {"file": cursor.file, "offset": cursor.offset}
            self._owner.keep(data=self._owner.data | {"stderr": place})

    def end(self) -> None:
        """Copy the rest: the child has ended."""
        self.forward(final=True)
        self._log = None
