# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest sees of its machine is the same at every start, also under a newer QEMU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import LAB, Lab, definition
from tests.live.networks import run

pytestmark = pytest.mark.live

HERE = "/srv/hardware"
RECORD = "/var/lib/virtd/qemu/web1.json"
# Addresses and kinds of what is on the bus, who is at which address, the machine, the CPU.
LOOKS = (
    "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/vendor $d/device $d/subsystem_device $d/class); done",
    "for b in /sys/block/vd*; do echo ${b##*/} $(cat $b/size) $(readlink -f $b/device/..); done",
    "cat /sys/class/net/eth*/address /sys/class/dmi/id/product_*",
    "grep -E 'vendor_id|family|model|stepping|flags|bugs|sizes' /proc/cpuinfo",
)


def prepare(lab: Lab) -> None:
    lab.sh(f"mkdir -p {HERE}; truncate -s 16M {HERE}/a.raw; truncate -s 32M {HERE}/b.raw")


def text(*disks: str) -> str:
    """A guest that boots from the kernel of the older lab, wherever it is."""
    tables = "".join(f'[[disk]]\npath = "{HERE}/{disk}.raw"\n' for disk in disks)
    tables += '[[cdrom]]\n[[cdrom]]\n[[nic]]\nmode = "user"\n[vnc]\n'
    uuid = 'uuid = "0123abcd-4567-89ab-cdef-0123456789ab"\n'
    return uuid + definition("web1", more=tables).replace("/usr/share/virtd-lab/", f"{HERE}/")


def seen(lab: Lab, *disks: str) -> list[str]:
    """What the guest sees, started anew."""
    lab.virtdctl("define", "-", stdin=text(*disks))
    lab.forget_log("web1")
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1", timeout=120)
    found = [line for look in LOOKS for line in run(lab, "web1", look)[1].splitlines()]
    lab.virtdctl("stop", "web1")
    return found


def root(lab: Lab) -> Path:
    """Its file system, as the host sees it."""
    return Path(subprocess.run([LAB, "path", lab.name], check=True, capture_output=True, text=True).stdout.strip())


@pytest.mark.skipif("VIRTD_SUITE" in os.environ, reason="VIRTD_SUITE has everything run in one suite")
def test_under_a_newer_qemu(lab: Lab, packages: dict[str, Path]) -> None:
    newer = Lab(f"forky-hw-{os.getpid()}")
    try:
        prepare(lab)
        lab.sh(f"cp /usr/share/virtd-lab/vmlinuz /usr/share/virtd-lab/initramfs.gz {HERE}")
        first = seen(lab, "a", "b")
        assert len(first) > 15, first
        assert seen(lab, "a", "b") == first, "what is on record by now is what it was before"
        info = lab.info("web1")["hardware"]
        assert info["machine"].startswith("pc-q35-10."), info
        assert info["cpu"].startswith("base,"), info
        record = lab.sh(f"cat {RECORD}")
        # The second disk stays where it is, whatever becomes of the first.
        there = [line.split(maxsplit=1)[1] for line in first if line.startswith("vdb")]
        assert [line.split(maxsplit=1)[1] for line in seen(lab, "b") if line.startswith("vda")] == there != []
        assert lab.json("fsck")["differences"] == []

        Lab.up(newer.name, "--suite", "forky", "--rpm", str(packages["0.1.0"]))
        prepare(newer)
        for name in ("vmlinuz", "initramfs.gz"):
            (root(newer) / HERE[1:] / name).write_bytes((root(lab) / HERE[1:] / name).read_bytes())
        newer.sh("mkdir -p /var/lib/virtd/qemu")
        newer.run("tee", RECORD, stdin=record)
        assert seen(newer, "a", "b") == first
        assert newer.json("fsck")["differences"] == []
        newer.virtdctl("upgrade-machine", "web1")
        assert seen(newer, "a", "b") != first
        assert newer.info("web1")["hardware"]["machine"].startswith("pc-q35-11.")
        lab.virtdctl("undefine", "web1")
        assert "web1.json" not in lab.sh("ls /var/lib/virtd/qemu").split()
    finally:
        newer.down()
        lab.sh(f"rm -rf {HERE}")
