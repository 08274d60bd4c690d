# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a child says on stderr, repeated in the journal. How far it has come is on record, so that it's said once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..logs.chain import Cursor
from ..logs.stderrlog import StderrLog

if TYPE_CHECKING:
    from ..children.child import Child
    from ..objects.persistent import Persistent


class Repeater:
    """Of the child of `owner`; `how`: the options of a StderrLog."""

    def __init__(self, owner: Persistent, **how: Any) -> None:
        self._owner = owner
        self._how = how
        self._log: StderrLog | None = None

    def begin(self, child: Child) -> None:
        """From where an earlier daemon stopped."""
        if child.stderr is not None:
            kept = self._owner.data.get("stderr")
            cursor = Cursor(str(kept["file"]), int(kept["offset"])) if isinstance(kept, dict) else None
            self._log = StderrLog(child.stderr, self._owner.fields(), cursor, **self._how)

    def forward(self, *, final: bool = False) -> None:
        """There is more of it."""
        if self._log is None or self._owner.record is None:
            return
        before = self._log.cursor
        while self._log.forward(final=final):
            pass
        if (cursor := self._log.cursor) != before:
            place = {"file": cursor.file, "offset": cursor.offset}
            self._owner.keep(data=self._owner.data | {"stderr": place})

    def end(self) -> None:
        """Nothing more comes."""
        self.forward(final=True)
        self._log = None
