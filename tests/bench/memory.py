# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's memory (PSS) as guests become many. Runs inside a lab."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """MiB by peer and number of guests: of the daemon that started them, and of one that took them over."""
    result: dict[str, Any] = {"started": {}, "adopted": {}}
    for count in (1, 10) if quick else (1, 50):
        for peer in peers:
            peer.have(count)
            time.sleep(2)
            result["started"].setdefault(peer.name, {})[count] = peer.pss()
            peer.restart(count)
            time.sleep(4)
            result["adopted"].setdefault(peer.name, {})[count] = peer.pss()
    return result
