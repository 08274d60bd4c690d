# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's packages into a lab that is up. A lab has no network, so they are installed from the host."""

from __future__ import annotations

import os
import subprocess

from tests.harness import LAB, Lab

# In a mount namespace, which takes what it mounts there along when it ends. apt must start none of the services,
# which would run on the host.
INSTALL = """set -e
root=$1; shift
test -d "$root/var/lib/dpkg"
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
in_lab() {
    chroot "$root" "$@"
}
apt_get() {
    in_lab apt-get -q -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false \\
        -o Acquire::Check-Date=false -o Dpkg::Options::=--force-unsafe-io "$@"
}
apt_get update
apt_get install --yes --no-install-recommends "$@"
"""


def install(lab: Lab, *packages: str, more: str = "") -> str:
    """Install them; what went wrong in one line, or nothing. `more` is a script that goes on from there."""
    if os.geteuid() != 0:
        return "installing packages needs root"
    root = subprocess.run([LAB, "path", lab.name], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", INSTALL + more, "sh", root, *packages],
        check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        return (done.stdout.strip().splitlines() or ["apt-get failed"])[-1]
    return ""
