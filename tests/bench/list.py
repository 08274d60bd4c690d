# SPDX-License-Identifier: LGPL-2.1-or-later
"""A listing as a person asks for it: the whole process, from exec to exit. Runs inside a lab."""

from __future__ import annotations

import resource
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds by peer and number of guests: wall time, and the process's own CPU time."""
    runs = 10 if quick else 40
    result: dict[str, Any] = {"runs": runs, "list": {}}
    for count in (1, 10) if quick else (1, 50):
        wall: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        for peer in peers:
            peer.have(count)
        for _ in range(runs):
            for peer in peers:
                before, begun = _children(), time.perf_counter()
                peer.run("list")
                wall.setdefault(peer.name, []).append(time.perf_counter() - begun)
                cpu.setdefault(peer.name, []).append(_children() - before)
        for name, values in wall.items():
            result["list"].setdefault(name, {})[count] = {
                "median": statistics.median(values), "min": min(values), "cpu": statistics.median(cpu[name]),
            }  # fmt: skip
    return result


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
