# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.proof.sweep`: boots a lab, sweeps in it, prints how many points were tried and how many held."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.harness import Lab, build_rpm
from tests.proof.sweep import setup


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.sweep", description=__doc__)
    parser.add_argument("--operations", default="", help="names with commas between; all unless given")
    parser.add_argument("--sample", type=int, help="this many points of each operation; all unless given")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--errors", action="store_true", help="have system calls fail instead of killing the daemon")
    args = parser.parse_args()
    options = ["--seed", str(args.seed)]
    if args.operations:
        options += ["--operations", args.operations]
    if args.sample is not None:
        options += ["--sample", str(args.sample)]
    if args.errors:
        options.append("--errors")
    name = f"sweep-{os.getpid()}"
    try:
        lab = Lab.up(name, "--rpm", str(build_rpm()))
        setup.install(lab)
        return subprocess.run(setup.command(lab, options), check=False, stdin=subprocess.DEVNULL).returncode
    finally:
        Lab(name).down()


if __name__ == "__main__":
    sys.exit(main())
