# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Domain on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .variants import supervised

if TYPE_CHECKING:
    from .variants import Object

LATE: dict[str, Var] = {"Exit": Var("a{sv}", {})}


def properties(item: Object) -> dict[str, Var]:
    """From what Host.info says; all but Exit from the short form."""
    number = item.get("id")
    # What has no number isn't running: -1, as users of libvirt know it.
    return supervised(item) | {"Id": Var("i", -1 if number is None else number)}
