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
CHILD = 2.5
# What is above that has its reason beside it.
LIMITS = {
    # 0.4 are for being root, 0.5 for the host's network, 0.3 to see what guests see. Another 0.9 would need a mount
    # namespace, and so a slower restart (see the unit); 0.8 would hide disks and pools, or keep them from being used.
    "virtd.service": 4.1,
    "virtd-keeper.service": CHILD,
    "virtd-network-default.service": CHILD,
    "virtd-qemu-web1.service": CHILD,
    "virtd-storage-probe-job.service": CHILD,
    "virtd-storage-probe-device.service": CHILD,
    # The kernel's device mapper takes commands from CAP_SYS_ADMIN only, and lvm(8) makes nodes, so sees /dev.
    "virtd-storage-probe-lvm.service": CHILD,
    "virtd-register-probe.service": CHILD,
    "virtd-create-lxc-probe.service": CHILD,
    # A container's filters and namespaces are its unit's, so these refuse only what no system may do; LXC makes
    # namespaces and mounts, as root with SYS_ADMIN, and a command has to come in by the same way.
    "virtd-lxc-box.service": 6.7,
    "virtd-exec-probe.service": 6.1,
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
    lab.virtdctl("define", "-", stdin=definition("web1"))
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
