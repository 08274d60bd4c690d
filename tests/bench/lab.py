# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab that the benchmarks run in, with libvirt beside virtd where Debian's archive can be reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests import children
from tests.debian import install
from tests.harness import Lab

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-daemon-driver-network libvirt-daemon-driver-lxc "
    "libvirt-daemon-driver-storage libvirt-clients python3-libvirt"
)

# Without this libvirt starts no guest in a container: it wants cgroup controllers, devices and labels of its own.
QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
"""


def install_libvirt(lab: Lab) -> str:
    """Install and configure the peer; what went wrong in one line, or nothing."""
    if problem := install(lab, *PACKAGES.split()):
        return problem
    lab.write("/etc/libvirt/qemu.conf", QEMU_CONF)
    lab.sh("systemctl daemon-reload && systemctl start virtlogd.socket libvirtd.socket")
    return ""


def inside(lab: Lab, name: str, peers: list[str], *, quick: bool) -> dict[str, Any]:
    """Run one benchmark in the lab; its figures. What it has to say goes to our stderr."""
    for file in HERE.glob("*.py"):
        lab.write(f"/opt/bench/tests/bench/{file.name}", file.read_text())
    if name == "children":
        children.install(lab)
    command = ["env", "-C", "/opt/bench", "python3", "-m", "tests.bench.inside", name, ",".join(peers)]
    done = lab.run(*command, *(["--quick"] if quick else []), timeout=1800)
    sys.stderr.write(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
