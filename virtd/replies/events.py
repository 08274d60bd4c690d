# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes of state, as Subscribe reports them."""

from __future__ import annotations

from typing import Annotated, Any

from . import Reply


class Change(Reply, frozen=True):
    """One event."""

    sequence: Annotated[int, "one more than that of the event before; larger in every later boot of the host"]
    at: Annotated[str, "when virtd noticed; `since` in the object says when it happened"]
    change: Annotated[
        str, "added, changed or removed; begun: where the stream begins; lagged: events before this are missing"
    ]
    kind: Annotated[str, "domain, container, network, pool or job; empty for begun and lagged"]
    name: Annotated[str, "the object's"]
    state: str | None
    reason: Annotated[str | None, "for a job: why it failed"]
    object: Annotated[Any | None, "the object as in the reply to List, or to Jobs; null when it was removed"]
