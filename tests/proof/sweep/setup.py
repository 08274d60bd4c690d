# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the sweep needs in a lab, built on the host: the tracer, the tiny guests, and the sweep itself."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness import LAB, TOP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness import Lab

HERE = Path(__file__).parent
INSIDE = "/root/sweep"
# What each kind of guest is compiled with: the lines that it says at a tick of its clock, 18.2 times a second.
GUESTS = {"tiny": ["-DLINES=1"], "fast": ["-DLINES=60"], "writing": ["-DLINES=1", "-DWRITES"]}


def install(lab: Lab) -> None:
    """Put everything into the lab; what an earlier sweep left there is replaced."""
    with tempfile.TemporaryDirectory() as scratch:
        built = [tracer(Path(scratch)), program(Path(scratch))]
        built += [guest(Path(scratch), kind, flags) for kind, flags in GUESTS.items()]
        for path in built:
            lab.copy(path, f"{INSIDE}/{path.name}")
        for path in sorted(HERE.glob("*.py")):
            lab.copy(path, f"{INSIDE}/tests/proof/sweep/{path.name}")
        lab.copy(TOP / "tests/harness.py", f"{INSIDE}/tests/harness.py")
        lab.sh(f"chmod 755 {INSIDE}/cut {INSIDE}/box")


def tracer(directory: Path) -> Path:
    target = directory / "cut"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, HERE / "cut.c"], check=True)
    return target


def program(directory: Path) -> Path:
    target = directory / "box"
    subprocess.run(["cc", "-Os", "-Wall", "-nostdlib", "-static", "-o", target, HERE / "box.c"], check=True)
    return target


def guest(directory: Path, name: str, flags: list[str]) -> Path:
    """A boot sector, see tiny.S."""
    compiled, target = directory / f"{name}.o", directory / f"{name}.img"
    subprocess.run(["cc", "-c", *flags, "-o", compiled, HERE / "tiny.S"], check=True)
    subprocess.run(["ld", "-Ttext", "0x7c00", "--oformat", "binary", "-o", target, compiled], check=True)
    return target


def command(lab: Lab, options: Sequence[str]) -> list[str]:
    """The command that runs the sweep in the lab."""
    script = f'cd {INSIDE} && exec python3 -m tests.proof.sweep.inside "$@"'
    return [LAB, "exec", lab.name, "--", "sh", "-c", script, "sh", *options]
