# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sample of `make sweep`: the daemon is killed right before some of the calls that some operations make.

The seed is printed. VIRTD_SEED=N repeats a run.
"""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.proof.sweep import setup
from tests.proof.sweep.operations import all_operations

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

OPERATIONS = int(os.environ.get("VIRTD_OPERATIONS", "8"))  # of all that there are
POINTS = int(os.environ.get("VIRTD_POINTS", "3"))  # of each operation


def test_killed_at_some_points_of_some_operations(lab: Lab) -> None:
    seed = os.environ.get("VIRTD_SEED") or str(random.randrange(1 << 30))
    # Those of networks, pools and containers are left to `make sweep`, until a whole run of it has held.
    every = [operation.name for operation in all_operations()]
    chosen = random.Random(seed).sample(every, min(OPERATIONS, len(every)))
    setup.install(lab)
    done = subprocess.run(
        setup.command(lab, ["--seed", seed, "--sample", str(POINTS), "--operations", ",".join(chosen)]),
        check=False, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"VIRTD_SEED={seed}\n{done.stdout}")
    assert done.returncode == 0, f"VIRTD_SEED={seed}\n{done.stdout}{done.stderr[-3000:]}"
    assert done.stdout.count('"held"') == len(chosen), done.stdout
