# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is made of beside its kernel: disks, CD-ROMs, network cards, a display; and what its own ends do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import Attached, Lab, definition
from tests.live.test_storage_domains import LOOP
from tests.live.tools import KILL, acl

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

IMAGES = "/var/lib/virtd/images"


@pytest.fixture
def images(lab: Lab) -> Iterator[str]:
    """A directory with the lab's bootable disk, as root's own, and two raw ones beside it."""
    lab.sh(
        f"mkdir -p {IMAGES} && cd {IMAGES} && cp /usr/share/virtd-lab/disk.qcow2 boot.qcow2 && "
        "qemu-img convert -O raw boot.qcow2 boot.raw && truncate -s 16M data.raw && chmod 600 * && chown root:root *"
    )
    yield IMAGES
    lab.undefine_all()
    assert lab.sh(f"stat -c '%U:%G %a' {IMAGES}/*") == "root:root 600\n" * 3, "every disk was given back"
    lab.sh(f"rm -rf {IMAGES}")


def disk_domain(lab: Lab, name: str, *disks: str, more: str = "") -> None:
    """Define a guest that boots from the first of these; each is "PATH", its format told by its name."""
    tables = "".join(f'[[disk]]\npath = "{path}"\nformat = "{path.rpartition(".")[2]}"\n' for path in disks)
    lab.virtdctl("define", "-", stdin=f'name = "{name}"\nmemory = "128M"\n{more}\n{tables}')


def kernel_domain(lab: Lab, name: str, tables: str) -> None:
    """Define a guest with the lab's kernel and more tables."""
    lab.virtdctl("define", "-", stdin=definition(name, more=tables))


def owner(lab: Lab, path: str) -> str:
    return lab.sh(f"stat -c %U {path}").strip()


def test_boot_from_a_qcow2_and_a_raw_disk(lab: Lab, images: str) -> None:
    disk_domain(lab, "first", f"{images}/boot.qcow2")
    disk_domain(lab, "second", f"{images}/boot.raw", f"{images}/data.raw")
    for name, disks in (("first", ["boot.qcow2"]), ("second", ["boot.raw", "data.raw"])):
        lab.virtdctl("start", name)
        # The firmware reads kernel and initramfs sector by sector, in an emulated CPU.
        lab.wait_ready(name, timeout=150)
        assert lab.info(name)["disks"] == [f"{images}/{disk}" for disk in disks]
        for disk in disks:
            assert owner(lab, f"{images}/{disk}") == f"vm-{name}"
    lab.virtdctl("stop", "first")
    assert owner(lab, f"{images}/boot.qcow2") == "root"
    # A disk goes back to its owner also when its guest ends while nobody looks.
    pid = lab.info("second")["pid"]
    lab.sh(f"systemctl stop virtd.service 2>/dev/null; kill -9 {pid}; sleep 0.2; systemctl start virtd.service")
    lab.wait("the disks' return", lambda: owner(lab, f"{images}/data.raw") == "root", 20)


def test_a_disk_for_two(lab: Lab, images: str) -> None:
    shared = f'[[disk]]\npath = "{images}/data.raw"\n'
    lab.sh(f"ln -s {images}/data.raw /srv/alias.raw; ln {images}/data.raw {images}/other-name.raw")
    try:
        kernel_domain(lab, "first", shared)
        lab.virtdctl("start", "first")
        for path in (f"{images}/data.raw", "/srv/alias.raw", f"{images}/other-name.raw"):
            for readonly in ("", "readonly = true\n"):
                kernel_domain(lab, "second", f'[[disk]]\npath = "{path}"\n{readonly}')
                refused = lab.virtdctl("start", "second", check=False)
                assert refused.returncode == 1
                assert f"{path} is in use by domain first" in refused.stderr
                assert "Stop domain first, or" in refused.stderr
                assert lab.info("second")["state"] == "stopped"
        # The second could run; that the first does and keeps its disk is what matters.
        assert lab.info("first")["state"] == "running"
        assert owner(lab, f"{images}/data.raw") == "vm-first"
        # Another program's lock on the file is QEMU's to see, and its words are ours.
        lab.virtdctl("stop", "first")
        lab.virtdctl("start", "first")
    finally:
        lab.undefine_all()
        lab.sh(f"rm -f /srv/alias.raw {images}/other-name.raw")


def test_a_disk_that_two_only_read(lab: Lab, images: str) -> None:
    shared = f'[[disk]]\npath = "{images}/data.raw"\nreadonly = true\n'
    for name in ("first", "second"):
        kernel_domain(lab, name, shared)
    lab.virtdctl("start", "first", "second")
    assert [item["state"] for item in lab.json("list")] == ["running", "running"]
    # The one that ends first must not take it from the other: root's own disk stays readable for both.
    lab.virtdctl("stop", "first")
    lab.virtdctl("start", "first")
    lab.virtdctl("stop", "second")
    assert lab.info("first")["state"] == "running"
    assert owner(lab, f"{images}/data.raw") == "root"
    assert acl(lab, f"{images}/data.raw") == ["user:vm-first:r--"]
    lab.virtdctl("stop", "first")
    assert acl(lab, f"{images}/data.raw") == []
    assert owner(lab, f"{images}/data.raw") == "root"


def test_a_disk_that_is_broken(lab: Lab, images: str) -> None:
    lab.sh(f"head -c 100000 /dev/urandom >{images}/boot.qcow2")
    disk_domain(lab, "web1", f"{images}/boot.qcow2")
    refused = lab.virtdctl("start", "web1", check=False)
    assert refused.returncode == 1
    assert "start web1: " in refused.stderr
    assert "not in qcow2 format" in refused.stderr, "QEMU's own words"
    info = lab.info("web1")
    assert (info["state"], info["slots"]) == ("stopped", [])
    assert "not in qcow2 format" in info["reason"]
    assert owner(lab, f"{images}/boot.qcow2") == "root"
    assert "not in qcow2 format" in lab.virtdctl("log", "--qemu", "web1").stdout


def test_a_block_device_is_a_disk(lab: Lab) -> None:
    device = lab.sh(LOOP.format(kind="ext4", size=16, quiet="-q")).strip()
    before = lab.sh(f"stat -c '%U:%G %a' {device}")
    table = f'[[disk]]\npath = "{device}"\n'
    try:
        kernel_domain(lab, "web1", table)
        lab.sh(f"mkdir -p /srv/mnt && mount -o ro {device} /srv/mnt")
        refused = lab.virtdctl("start", "web1", check=False)
        assert refused.returncode == 1
        assert f"web1.toml: disk[0].path: {device} is in use by the host" in refused.stderr
        lab.sh("umount /srv/mnt")
        lab.virtdctl("start", "web1")
        lab.wait_ready("web1")
        assert lab.info("web1")["disks"] == [device]
        assert owner(lab, device) == "vm-web1"
        # Under another name it is the same one.
        lab.sh(f"ln -s {device} /dev/other")
        kernel_domain(lab, "second", '[[disk]]\npath = "/dev/other"\n')
        assert "in use by domain web1" in lab.virtdctl("start", "second", check=False).stderr
        console = Attached(lab, "web1")
        lab.sh(KILL)
        console.type("sh echo written by the guest | dd of=/dev/vda seek=9 conv=notrunc,fsync 2>/dev/null\n")
        assert console.heard("sh exit 0", 60)
        console.close()
        lab.virtdctl("stop", "web1")
        assert "written by the guest" in lab.sh(f"dd if={device} skip=9 count=1 status=none | tr -d '\\0'")
        assert lab.sh(f"stat -c '%U:%G %a' {device}") == before, "it was given back"
    finally:
        lab.undefine_all()
        lab.sh(f"umount /srv/mnt; losetup -d {device}; rm -rf /dev/other /srv/loops /srv/mnt", check=False)


def test_what_is_plugged_in(lab: Lab) -> None:
    """Disk, CD-ROM, two network cards, random numbers and a display, as QEMU's own monitor lists them."""
    lab.sh("truncate -s 2M /srv/cd.iso /srv/disk.raw")
    tables = (
        '[[disk]]\npath = "/srv/disk.raw"\n[[cdrom]]\npath = "/srv/cd.iso"\n'
        '[[nic]]\nmode = "user"\n[[nic]]\nmode = "user"\nmac = "52:54:00:12:34:56"\n[vnc]\n'
    )
    kernel_domain(lab, "web1", tables)
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    info = lab.info("web1")
    assert info["disks"] == ["/srv/disk.raw", "/srv/cd.iso"]
    # The unit's ExecStop has a monitor of its own, which nobody uses meanwhile.
    pci = lab.sh(
        "python3 - <<'END'\n"
        "import json, socket\n"
        "monitor = socket.socket(socket.AF_UNIX)\n"
        "monitor.connect('/run/virtd/qemu/web1/shutdown.sock')\n"
        "file = monitor.makefile('rw')\n"
        "file.readline()\n"
        "for command in ('qmp_capabilities', 'query-pci', 'query-block', 'query-rx-filter', 'query-vnc'):\n"
        "    file.write(json.dumps({'execute': command})); file.flush()\n"
        "    while 'return' not in (line := file.readline()) and 'error' not in line:\n"
        "        pass\n"
        "    print(line, end='')\n"
        "END"
    )
    for what in ("virtio-disk0", "cdrom0", "52:54:00:12:34:56", '"main-mac"', "web1/vnc.sock"):
        assert what in pci, what
    assert pci.count('"main-mac"') == 2
    assert pci.count('"device": 4101') == 1, "virtio-rng"
    # The display answers, as VNC does; virtd's root may connect, and who else is the directory's matter.
    script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{info['vnc']}'); print(s.recv(12))"
    assert "RFB 003.008" in lab.run("python3", "-c", script).stdout
    lab.virtdctl("stop", "web1")
    assert lab.info("web1")["vnc"] is None
    lab.sh("rm /srv/cd.iso /srv/disk.raw")


def test_a_guest_that_powers_off_and_is_kept(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more='on_poweroff = "keep"'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    lab.virtdctl("console", "--timeout", "0", "web1", stdin="poweroff\n")
    info = lab.wait("the power-off", lambda: (i := lab.info("web1"))["state"] == "paused" and i, 30)
    assert (info["pid"], info["exit"]) == (pid, None)
    assert "powered off" in info["reason"]
    lab.sh("systemctl restart virtd.service")
    info = lab.wait("the monitor", lambda: (i := lab.info("web1"))["monitor"] == "connected" and i, 20)
    assert (info["pid"], info["state"]) == (pid, "paused")
    assert "powered off" in info["reason"]
    lab.virtdctl("stop", "web1")
    assert lab.info("web1")["exit"]["cause"] == "stop"


def test_a_guest_whose_reboot_is_its_end(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more='on_reboot = "stop"'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    lab.virtdctl("console", "--timeout", "0", "web1", stdin="reboot\n")
    info = lab.wait("the end", lambda: (i := lab.info("web1"))["exit"] and i, 30)
    assert (info["state"], info["exit"]["cause"], info["reason"]) == ("stopped", "guest-shutdown", "rebooted itself")


def test_a_guest_that_reboots_itself(lab: Lab) -> None:
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    console = Attached(lab, "web1")
    try:
        assert console.ask("before")
        console.type("reboot\n")
        lab.wait_ready("web1", 2)
        assert console.ask("after"), "the same console goes on"
    finally:
        console.close()
    assert lab.info("web1")["pid"] == pid


@pytest.mark.parametrize("daemon", ["up", "down"])
def test_a_guest_that_panics_and_is_started_afresh(lab: Lab, daemon: str) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more='on_crash = "restart"'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    if daemon == "down":
        lab.sh("(sleep 1; echo panic) | timeout 3 virtdctl console --timeout 0 web1 & sleep 0.7; "
               "systemctl stop virtd.service 2>/dev/null; wait; sleep 2")  # fmt: skip
        lab.wait("the end", lambda: lab.sh(f"test -e /proc/{pid} || echo gone", check=False) == "gone\n", 30)
        lab.sh("systemctl start virtd.service")
    else:
        lab.virtdctl("console", "--timeout", "0", "web1", stdin="panic\n")
    lab.wait_ready("web1", 2)
    info = lab.info("web1")
    assert info["state"] == "running"
    assert info["pid"] not in (None, pid)
    assert b"Kernel panic" in lab.console("web1")


def test_a_guest_that_panics_and_is_kept(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more='on_crash = "keep"'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    lab.virtdctl("console", "--timeout", "0", "web1", stdin="panic\n")
    info = lab.wait("the panic", lambda: (i := lab.info("web1"))["state"] == "paused" and i, 30)
    assert (info["pid"], info["reason"]) == (pid, "the guest's kernel panicked")
    lab.virtdctl("reboot", "--force", "web1", check=False)
    lab.virtdctl("stop", "web1")
