# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs inside the lab: python3 -m tests.bench.inside NAME PEERS [--quick]. Prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.bench import children, container, flood, memory, network, restart, start, storage
from tests.bench import list as listing
from tests.bench.peers import peers

MEASURES: dict[str, Any] = {
    "restart": restart.measure,
    "list": listing.measure,
    "start": start.measure,
    "memory": memory.measure,
    "network": network.measure,
    "storage": storage.measure,
    "flood": flood.measure,
    "children": children.measure,
    "container": container.measure,
}


def main(arguments: list[str]) -> int:
    name, who, *options = arguments
    found = peers(who.split(","))
    try:
        print(json.dumps(MEASURES[name](found, quick="--quick" in options)))
    finally:
        for peer in found:
            peer.have(0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
