# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Pool and org.virtd1.PoolManager on D-Bus: pools, their volumes, and the jobs that these start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .variants import common

if TYPE_CHECKING:
    from .variants import Object


def properties(item: Object) -> dict[str, Var]:
    """From the short form. Sizes are in bytes, 0 while they aren't known."""
    return common(item) | {
        "Type": Var("s", item.get("type") or ""),
        "Path": Var("s", item.get("path") or ""),
        "Capacity": Var("t", item.get("capacity") or 0),
        "Allocation": Var("t", item.get("allocation") or 0),
        "Available": Var("t", item.get("available") or 0),
    }
