# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab that the benchmarks run in, with libvirt beside virtd where Debian's archive can be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness import LAB, Lab

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-daemon-driver-network libvirt-clients python3-libvirt"
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

# The lab has no network, so its packages are installed from the host: in a mount namespace, which takes what it
# mounts there along when it ends. apt must start none of the services, which would run on the host.
INSTALL = """set -e
root=$1
mount --make-rprivate /
touch "$root/etc/resolv.conf"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
mount --bind /etc/hosts "$root/etc/hosts"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"
trap 'rm -f "$root/usr/sbin/policy-rc.d"' EXIT
chmod +x "$root/usr/sbin/policy-rc.d"
export DEBIAN_FRONTEND=noninteractive
apt() {
    chroot "$root" apt-get -q -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false \\
        -o Acquire::Check-Date=false -o Dpkg::Options::=--force-unsafe-io "$@"
}
apt update
apt install --yes --no-install-recommends PACKAGES
"""


def install_libvirt(lab: Lab) -> str:
    """Install and configure the peer; what went wrong in one line, or nothing."""
    if os.geteuid() != 0:
        return "installing it needs root"
    root = subprocess.run([LAB, "path", lab.name], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    script = INSTALL.replace("PACKAGES", PACKAGES)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", root],
        check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        return (done.stdout.strip().splitlines() or ["apt-get failed"])[-1]
    lab.write("/etc/libvirt/qemu.conf", QEMU_CONF)
    lab.sh("systemctl daemon-reload && systemctl start virtlogd.socket libvirtd.socket")
    return ""


def inside(lab: Lab, name: str, peers: list[str], *, quick: bool) -> dict[str, Any]:
    """Run one benchmark in the lab; its figures. What it has to say goes to our stderr."""
    for file in HERE.glob("*.py"):
        lab.write(f"/opt/bench/tests/bench/{file.name}", file.read_text())
    command = ["env", "-C", "/opt/bench", "python3", "-m", "tests.bench.inside", name, ",".join(peers)]
    done = lab.run(*command, *(["--quick"] if quick else []), timeout=1800)
    sys.stderr.write(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
