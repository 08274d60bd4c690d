#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the FD store costs as it fills: putting and verifying, the daemon's restart, PID 1's reload.

    tests/bench/fdstore.py [--json] [--suite trixie] [--slots 0,50,250,1000,3000] [--runs N]

In a lab, with a service that does nothing but hold the slots (five for each guest, as virtd names them). Restart is
`systemctl restart` up to READY=1, in the lab; the one with 0 slots is what the others compare with. Put is for one
slot, PID 1's work included (a barrier follows the last). Restart and reload are medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.live.probe import UNIT, Probe, probe_in_lab  # noqa: E402

FILL = """
import time
begun = time.perf_counter()
for n in range({first}, {last}):
    fd = file()
    store.put(f"qemu/guest{{n // 5:04}}/" + ("stdin", "stdout", "stderr", "console.log", "log")[n % 5], fd)
    os.close(fd)
sent = time.perf_counter()
assert store.barrier(60)
result = sent - begun, time.perf_counter() - begun
"""

# In the lab, so that entering it isn't in the figure.
TIMED = """
import subprocess, sys, time
begun = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - begun)
"""


class Cost(NamedTuple):
    """Seconds: `put` for one slot, `sent` of that until its message was in PID 1's queue; the rest for all slots."""

    slots: int
    put: float
    sent: float
    take_over: float
    verify: float
    restart: float
    reload: float


def timed(probe: Probe, *argv: str) -> float:
    return float(probe.run("python3", "-c", TIMED, *argv))


def measure(probe: Probe, slots: int, runs: int) -> Cost:
    probe.unit(FileDescriptorStoreMax=10_000, LimitNOFILE=20_000)
    sent, whole = probe.does(FILL.format(first=0, last=slots)) if slots else (0.0, 0.0)
    entries = json.dumps(probe.entries())
    verify = probe.does(
        f"import time; entries = {entries}; begun = time.perf_counter(); wrong = store.verify(map(tuple, entries));"
        "result = time.perf_counter() - begun; assert not wrong and len(entries) == len(store.names())"
    )
    restarts = [timed(probe, "systemctl", "restart", UNIT) for _ in range(runs)]
    take_over = probe.does("result = took_over")
    assert probe.does("result = len(store.names())") == slots
    reloads = [timed(probe, "systemctl", "daemon-reload") for _ in range(runs)]
    each = max(slots, 1)
    return Cost(
        slots, whole / each, sent / each, take_over, verify, statistics.median(restarts), statistics.median(reloads)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of the FD store as it fills.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--suite", default="trixie")
    parser.add_argument("--slots", default="0,50,250,1000,3000")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    with probe_in_lab("fdbench", options.suite) as probe:
        costs = [measure(probe, int(count), options.runs) for count in options.slots.split(",")]
    if options.json:
        print(json.dumps([cost._asdict() for cost in costs]))
        return 0
    print(f"{'slots':>6} {'put':>10} {'(sent)':>10} {'take over':>10} {'verify':>10} {'restart':>10} {'reload':>10}")
    for cost in costs:
        print(
            f"{cost.slots:6} {cost.put * 1e6:7.0f} µs {cost.sent * 1e6:7.0f} µs {cost.take_over * 1e3:7.1f} ms "
            f"{cost.verify * 1e3:7.1f} ms {cost.restart * 1e3:7.0f} ms {cost.reload * 1e3:7.0f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
