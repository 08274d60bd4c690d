# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make lvm`: pools on LVM and on NFS, in a machine of their own.

This machine's kernel may have neither a device mapper nor an NFS server, and a lab sees that kernel. So a lab becomes
a whole machine: its file system on a disk, Debian's own kernel, run by QEMU without KVM. It boots twice, for it
crashes in the midst of a clone. Needs root, Debian's archive and some minutes.

    python -m tests.proof.lvm --only clone --only crash   only steps of inside.py with such names, and the crash
    VIRTD_KEEP_LAB=1 python -m tests.proof.lvm            keeps the lab, which it names
    python -m tests.proof.lvm --lab NAME                  uses that, with the virtd that is in it
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(TOP))

from tests.harness import Lab, build_rpm  # noqa: E402
from tests.proof.lvm import machine  # noqa: E402


def main() -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"lvm: [{time.monotonic() - began:4.0f} s] {text}", flush=True)

    parser = argparse.ArgumentParser(prog="python -m tests.proof.lvm")
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--lab", metavar="NAME")
    args = parser.parse_args()
    lab = Lab(args.lab or f"lvm{os.getpid()}")
    said: list[str] = []
    try:
        say(f"booting the lab {lab.name}, and making a machine of it")
        if not args.lab:
            Lab.up(lab.name, "--rpm", str(build_rpm()), quiet=True)
        machine.make(lab)
        for boot in ("first", "second") if not args.only or "crash" in args.only else ("first",):
            say(f"the machine's {boot} boot")
            for line in machine.boot(lab, f"virtd.only={','.join(args.only)}" if args.only else ""):
                if line.startswith(("ok ", "FAILED ", "crashing", "verdict:")):
                    said.append(line)
                    say(line)
    finally:
        if not args.lab and os.environ.get("VIRTD_KEEP_LAB") != "1":
            lab.down()
    return 0 if said[-1:] == ["verdict: good"] else 1


if __name__ == "__main__":
    sys.exit(main())
