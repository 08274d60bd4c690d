# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long nobody answers: from a restart, or a SIGKILL, to a fresh connection's complete listing.

Runs inside a lab, in one process; the peers take turns.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds by peer and number of guests; for virtd also what a hundred restarts in a row look like."""
    runs = 3 if quick else 9
    result: dict[str, Any] = {"runs": runs, "restart": {}, "kill": {}}
    for count in (1, 10) if quick else (1, 10, 50):
        taken: dict[str, dict[str, list[float]]] = {"restart": {}, "kill": {}}
        for peer in peers:
            peer.have(count)
        for _ in range(runs):
            for way, way_taken in taken.items():
                for peer in peers:
                    way_taken.setdefault(peer.name, []).append(getattr(peer, way)(count))
                    time.sleep(0.5)  # what goes on in the background is the price of the next operation, not of this
        for way, way_taken in taken.items():
            for name, values in way_taken.items():
                result[way].setdefault(name, {})[count] = {
                    "median": statistics.median(values), "min": min(values), "max": max(values),
                }  # fmt: skip
        if count == 1:
            values = []
            for _ in range(10 if quick else 100):
                values.append(peers[0].restart(count))
                time.sleep(0.2)
            result["tail"] = {
                "runs": len(values), "median": statistics.median(values), "max": max(values),
                "ratio": max(values) / statistics.median(values),
            }  # fmt: skip
    return result
