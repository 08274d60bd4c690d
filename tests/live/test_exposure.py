# SPDX-License-Identifier: LGPL-2.1-or-later
"""How exposed each unit is, by systemd-analyze(1): the one place with what is allowed to whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import definition
from tests.proof.survival import containers

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

PROBE = Path(__file__).with_name("exposure_probe.py")
# As SECURITY.md quotes them. 2.5 is what a child may have at most; what is above that has its reason beside it.
LIMITS = {
    # 0.4 are for being root, 0.5 for the host's network, 0.3 to see what guests see; 0.8 would hide disks and pools,
    # or keep them from being used.
    "virtd.service": 3.0,
    "virtd-keeper.service": 1.4,
    "virtd-network-default.service": 2.0,
    "virtd-qemu-web1.service": 0.9,
    "virtd-qemu-web1@tpm.service": 0.4,
    "virtd-storage-probe-job.service": 1.1,
    "virtd-storage-probe-device.service": 1.3,
    # The kernel's device mapper takes commands from CAP_SYS_ADMIN only, and lvm(8) makes nodes, so sees /dev.
    "virtd-storage-probe-lvm.service": 2.1,
    "virtd-register-probe.service": 1.1,
    "virtd-create-lxc-probe.service": 1.9,
    # A container's filters and namespaces are its unit's, so these refuse only what no container needs; LXC makes
    # namespaces and mounts, as root with SYS_ADMIN, and a command has to come in by the same way.
    "virtd-lxc-box.service": 6.0,
    "virtd-exec-probe.service": 5.7,
}
BOX = f"""name = "box"
rootfs = "{containers.ROOT}"
command = ["/brief"]
[[mount]]
source = "/usr"
target = "/usr"
readonly = true
"""


def test_exposure(lab: Lab) -> None:
    lab.virtdctl("network", "define", "default")
    lab.virtdctl("network", "start", "default")
    lab.virtdctl("define", "-", stdin=definition("web1", more="[tpm]\n"))
    lab.virtdctl("start", "web1")
    lab.run("sh", "-c", containers.MAKE, stdin=containers.PROGRAM)
    lab.virtdctl("container", "define", "-", stdin=BOX)
    lab.virtdctl("container", "start", "box")
    # Loaded, so that it is in the list.
    lab.sh("systemctl cat virtd-keeper.service >/dev/null")
    try:
        found = json.loads(lab.run("python3", "-", stdin=PROBE.read_text()).stdout)
    finally:
        lab.virtdctl("kill", "web1", check=False)
        lab.virtdctl("container", "kill", "box", check=False)
        lab.virtdctl("container", "undefine", "box", check=False)
        lab.virtdctl("network", "stop", "--force", "default", check=False)
        lab.virtdctl("network", "undefine", "default", check=False)
    print(json.dumps(found, indent=1))
    assert {unit: found.get(unit) for unit in LIMITS if not found.get(unit, 10.0) <= LIMITS[unit]} == {}
    assert found.keys() - LIMITS.keys() == set(), "a unit that nothing is said of here"


def test_the_hosts_mounts_come_and_go(lab: Lab) -> None:
    """In virtd's mount namespace as on the host: what is mounted late is seen there, and unmounting isn't held up."""
    pid = lab.sh("systemctl show -P MainPID virtd.service").strip()
    assert lab.sh(f"readlink /proc/{pid}/ns/mnt") != lab.sh("readlink /proc/1/ns/mnt")
    lab.sh("mkdir -p /srv/late && mount -t tmpfs late /srv/late && echo there > /srv/late/said")
    assert lab.sh(f"cat /proc/{pid}/root/srv/late/said").strip() == "there"
    lab.sh("umount /srv/late")
    assert "/srv/late" not in lab.sh(f"cat /proc/{pid}/mountinfo")


def test_disks_are_looked_at_where_the_host_has_them(lab: Lab) -> None:
    """Also where its mounts don't reach virtd's namespace: below a private one, and when one becomes read-only."""
    lab.sh("mkdir -p /srv/private && mount -t tmpfs private /srv/private && mount --make-private /srv/private")
    try:
        lab.sh("cd /srv/private && mkdir late && mount -t tmpfs late late && truncate -s 1M late/a")
        pid = lab.sh("systemctl show -P MainPID virtd.service").strip()
        assert lab.sh(f"ls /proc/{pid}/root/srv/private/late") == ""
        disk = '[[disk]]\npath = "/srv/private/late/a"\nformat = "raw"\n'
        lab.virtdctl("define", "-", stdin=definition("web1", more=disk))
        lab.virtdctl("start", "web1")
        assert lab.json("fsck")["differences"] == []  # not even a disk that was deleted, or nobody has
        lab.virtdctl("kill", "web1")
        lab.wait("its disk given back", lambda: lab.sh("stat -c %u /srv/private/late/a").strip() == "0")
        lab.sh("mount -o remount,ro,bind /srv/private/late")
        refused = lab.virtdctl("start", "web1", check=False)
        assert refused.returncode == 1
        assert "mounted read-only: /srv/private/late/a" in refused.stderr
    finally:
        lab.virtdctl("undefine", "web1", check=False)
        lab.sh("umount /srv/private/late /srv/private; rmdir /srv/private")


def test_containers_are_looked_at_where_the_host_has_them(lab: Lab) -> None:
    """Below a private mount: an image to be copied, and a root file system."""
    lab.sh(
        "mkdir -p /srv/private && mount -t tmpfs -o mode=0700 private /srv/private; mount --make-private /srv/private"
    )
    try:
        lab.sh("cd /srv/private && mkdir late && mount -t tmpfs late late && mkdir -p late/image/usr late/root")
        lab.virtdctl("container", "create", "copied", "--image", "/srv/private/late/image")
        lab.sh("tar -xJf /usr/share/virtd-lab/debian.tar.xz -C /srv/private/late/root")
        text = 'name = "late"\nrootfs = "/srv/private/late/root"\ncommand = ["sleep", "1000"]\n'
        lab.virtdctl("container", "define", "-", stdin=text)
        lab.virtdctl("container", "start", "late")
        assert lab.json("fsck")["differences"] == []
    finally:
        lab.virtdctl("container", "stop", "late", check=False)
        for name in ("late", "copied"):
            lab.virtdctl("container", "undefine", name, check=False)
        lab.sh("umount /srv/private/late /srv/private; rmdir /srv/private; rm -rf /var/lib/virtd/containers/copied")
