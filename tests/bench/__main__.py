# SPDX-License-Identifier: LGPL-2.1-or-later
"""The benchmarks: `make bench`, or python -m tests.bench [--only NAME] [--quick] [--json] [--no-peer].

    restart   how long nobody answers after a restart and after a SIGKILL; the slowest of many
    list      `virtdctl list` as a whole process
    start     one guest after another, many at once, QEMU by itself
    memory    the daemon's PSS
    network   networks started and stopped, and their firewall rules applied again
    storage   volumes made, cloned and uploaded, and the tools that copy by themselves
    flood     what others notice of a guest that floods its console
    children  starts, restarts and PID 1's reload with 10, 100 and 1,000 children (small processes; virtd alone)
    container start to the first output and stop, beside LXC by itself; memory for each
    logpath   bytes and CPU of the console's way to its log
    fdstore   what the FD store costs as it fills

The first nine run in a lab, where libvirt is installed beside virtd and takes turns with it (but for the flood
and children): on a machine that does other things too, only figures of one run can be compared. They need root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))

from tests.bench import lab as bench_lab  # noqa: E402
from tests.bench.tables import TABLES  # noqa: E402
from tests.harness import Lab, build_rpm  # noqa: E402

IN_LAB = ("restart", "list", "start", "memory", "network", "storage", "flood", "children", "container")
ALONE = {
    "logpath": (["--runs", "9"], ["--runs", "3", "--mib", "128", "--seconds", "3"]),
    "fdstore": (["--runs", "9"], ["--runs", "3", "--slots", "0,250"]),
}


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*IN_LAB, *ALONE], help="just this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few runs, few guests: to see that it works")
    parser.add_argument("--json", action="store_true", help="the figures, instead of tables")
    parser.add_argument("--no-peer", action="store_true", help="virtd alone, without libvirt")
    parser.add_argument("--lab", metavar="NAME", help="a lab that is up, instead of a new one; it stays up")
    options = parser.parse_args()
    names = options.only or [*IN_LAB, *ALONE]
    figures: dict[str, Any] = {}
    if wanted := [name for name in IN_LAB if name in names]:
        figures |= in_lab(wanted, options)
    for name in (name for name in ALONE if name in names):
        say(name)
        arguments = [f"{TOP}/tests/bench/{name}.py", *ALONE[name][options.quick]]
        if not options.json:
            print(f"\n## {name}\n", flush=True)
            subprocess.run([sys.executable, *arguments], check=True)
        else:
            done = subprocess.run([sys.executable, *arguments, "--json"], check=True, stdout=subprocess.PIPE)
            figures[name] = json.loads(done.stdout)
    if options.json:
        print(json.dumps(figures, indent=2))
    return 0


def in_lab(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Those of `names`, in a lab that is taken down again."""
    if options.lab:
        lab = Lab(options.lab)
    else:
        say("building the RPM and booting a lab")
        lab = Lab.up(f"bench{os.getpid()}", "--rpm", str(build_rpm()))
    figures: dict[str, Any] = {}
    try:
        peers = ["virtd"]
        if not options.no_peer and names != ["children"]:
            say("installing libvirt beside virtd")
            if problem := bench_lab.install_libvirt(lab):
                say(f"no libvirt to compare with: {problem}")
            else:
                peers.append("libvirt")
        for name in names:
            begun = time.monotonic()
            say(f"{name} ({', '.join(peers)})")
            figures[name] = bench_lab.inside(lab, name, peers, quick=options.quick)
            if not options.json:
                print(f"\n## {name}\n")
                print("\n".join(TABLES[name](figures[name])), flush=True)
            say(f"{name} took {time.monotonic() - begun:.0f} s")
    finally:
        if not options.lab:
            lab.down()
    return figures


if __name__ == "__main__":
    sys.exit(main())
