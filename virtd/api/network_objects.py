# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Network and org.virtd1.NetworkManager on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .variants import common

if TYPE_CHECKING:
    from .variants import Object


def properties(item: Object) -> dict[str, Var]:
    """From the short form."""
    return common(item) | {
        "Pid": Var("u", item.get("pid") or 0),
        "Mode": Var("s", item.get("mode") or ""),
        "Bridge": Var("s", item.get("bridge") or ""),
        "Addresses": Var("as", [item[key] for key in ("ipv4", "ipv6") if item.get(key)]),
    }
