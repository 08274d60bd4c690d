# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that boots by UEFI, and its variables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import definition
from tests.live.networks import run
from tests.live.tools import write

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

BOOT = "[boot]\n"
TEMPLATE = "/usr/share/OVMF/OVMF_VARS_4M.fd"


def text(more: str = 'firmware = "uefi"\n', guest: str = "") -> str:
    return definition("web1", memory="256M", more=guest).replace(BOOT, BOOT + more, 1)


def test_uefi(lab: Lab) -> None:
    """The guest sees it; its variables are its own, survive stops and undefine, and go to nobody else."""
    write(lab, "/root/word", "horse")
    lab.virtdctl("define", "-", stdin=text(guest='[guest.credentials]\nword = "/root/word"\n'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1", timeout=240)
    # It has tables of its own, in which QEMU's are.
    assert run(lab, "web1", "grep -ao 'io.systemd.*:word=aG9yc2U=' /sys/firmware/dmi/entries/11-0/raw")[0] == 0
    assert run(lab, "web1", "cat /sys/firmware/efi/fw_platform_size")[1].strip() == "64"
    uuid, pid = lab.info("web1")["uuid"], lab.info("web1")["pid"]
    store = f"/var/lib/virtd/qemu/web1/{uuid}.fd"
    assert lab.sh(f"stat -c %u {store}").strip() == lab.sh(f"stat -c %u /proc/{pid}").strip()
    lab.sh("systemctl kill -s KILL virtd; systemctl restart virtd")
    assert lab.info("web1")["pid"] == pid
    assert lab.json("fsck")["differences"] == []
    lab.virtdctl("stop", "web1")
    assert lab.sh(f"stat -c '%u %a' {store}").strip() == "0 600"
    assert lab.sh(f"cmp {store} {TEMPLATE} >/dev/null || echo differs").strip() == "differs"
    before = lab.sh(f"sha256sum {store}")
    lab.virtdctl("undefine", "web1")
    assert lab.sh(f"sha256sum {store}") == before
    lab.virtdctl("define", "-", stdin=text())
    assert lab.info("web1")["uuid"] != uuid
    lab.virtdctl("start", "web1")
    lab.virtdctl("stop", "web1")
    assert lab.sh(f"sha256sum {store}") == before, "another guest of that name has its own"
    assert (
        lab.sh(f"test -e /var/lib/virtd/qemu/web1/{lab.info('web1')['uuid']}.fd && echo its own").strip() == "its own"
    )
    lab.virtdctl("undefine", "web1")
    lab.sh("rm -r /var/lib/virtd/qemu/web1 /root/word")


def test_secure_boot_refuses_what_nobody_has_signed(lab: Lab) -> None:
    """The lab's kernel is Debian's, which is signed by Debian's key: without shim the vendors' keys don't know it."""
    lab.virtdctl("define", "-", stdin=text('firmware = "uefi"\nsecure_boot = true\n'))
    lab.virtdctl("start", "web1")
    arguments = lab.sh(f"tr '\\0' ' ' </proc/{lab.info('web1')['pid']}/cmdline")
    assert "smm=on" in arguments
    assert "property=secure,value=on" in arguments
    lab.virtdctl("stop", "web1")
    lab.virtdctl("undefine", "web1")
    lab.sh("rm -r /var/lib/virtd/qemu/web1")


def test_without_a_build(lab: Lab) -> None:
    lab.sh("mv /usr/share/qemu/firmware /usr/share/qemu/firmware.off")
    try:
        lab.virtdctl("define", "-", stdin=text())
        said = lab.virtdctl("start", "web1", check=False)
        assert said.returncode != 0
        assert "boot.firmware: UEFI for q35 isn't installed" in said.stderr
        assert "ovmf" in said.stderr
    finally:
        lab.sh("mv /usr/share/qemu/firmware.off /usr/share/qemu/firmware")
    assert lab.json("fsck")["differences"] == []
    lab.virtdctl("undefine", "web1")
