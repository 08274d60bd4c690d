# SPDX-License-Identifier: LGPL-2.1-or-later
"""Children by the hundred: guests whose "QEMU" is a small process (sleeper.c), so that the rest can be real."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness import Lab

PROGRAM = "/usr/local/bin/sleeper"
SETTINGS = f'[qemu]\nbinary = "{PROGRAM}"\n'


def install(lab: Lab) -> None:
    """Put the sleeper into the lab. virtd takes it for QEMU once SETTINGS are in virtd.toml."""
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "sleeper"
        source = Path(__file__).parent / "sleeper.c"
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", built, source], check=True)
        lab.copy(built, PROGRAM)
    lab.sh(f"chmod 755 {PROGRAM}")
