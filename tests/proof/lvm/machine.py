# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole machine made of a lab: its file system on a disk, the distribution's kernel, booted by QEMU in the lab."""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests import debian
from tests.harness import LAB, Failed, Lab
from tests.lab.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
DIRECTORY = "/var/machine"  # in the lab; hidden from the machine
INSIDE = "/opt/storage"
PACKAGES = ("lvm2", "udev", "nfs-kernel-server", "busybox-static")
DISK_MIB = 2048
GROUP_MIB = 512  # the disk for the volume group

# Only unpacked: a kernel's package would make an initramfs of its own.
KERNEL = """
in_lab sh -ec '
    mkdir -p DIRECTORY; cd DIRECTORY
    if test -e order; then exit; fi  # in a lab that was kept
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -nE "s/.*Depends: *(linux-image-[^ ]*).*/\\1/p")
    apt-get download -q -o APT::Sandbox::User=root "$kernel"
    dpkg-deb -x "$kernel"_*.deb unpacked
    rm "$kernel"_*.deb
    mv unpacked/boot/vmlinuz-* vmlinuz
    mv unpacked/usr/lib/modules /usr/lib/modules
    rm -r unpacked
    depmod $(ls /usr/lib/modules)
    modprobe -S $(ls /usr/lib/modules) --show-depends virtio_blk >order'
""".replace("DIRECTORY", DIRECTORY)

INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /usr/lib/systemd/systemd
"""

UNIT = f"""[Unit]
Description=What is to be seen of virtd's pools
After=virtd.service nfs-server.service
Requires=virtd.socket
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 {INSIDE}/inside.py
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
"""

# The bind mount shows the lab's own files, without what is mounted in them.
IMAGE = f"""set -e
mkdir -p /etc/systemd/system/multi-user.target.wants {DIRECTORY}/top
rm -f {DIRECTORY}/*.img
ln -sf ../storage-test.service /etc/systemd/system/multi-user.target.wants/
ln -sf /dev/null /etc/systemd/system/serial-getty@.service
mount --bind --make-private / {DIRECTORY}/top
mount -t tmpfs tmpfs {DIRECTORY}/top{DIRECTORY}
trap "umount {DIRECTORY}/top{DIRECTORY} {DIRECTORY}/top" EXIT
image() {{ mke2fs -q -F -t ext4 -E lazy_itable_init=1 -d {DIRECTORY}/top {DIRECTORY}/root.img {DISK_MIB}m; }}
image || image  # a file may go while it is being read: the lab runs
truncate -s {GROUP_MIB}M {DIRECTORY}/group.img
"""

QEMU = [
    "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2",
    "-m", "1024", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-device", "virtio-rng-pci",
    "-kernel", f"{DIRECTORY}/vmlinuz", "-initrd", f"{DIRECTORY}/initramfs.gz",
    "-drive", f"file={DIRECTORY}/root.img,format=raw,if=virtio,cache=unsafe",
    "-drive", f"file={DIRECTORY}/group.img,format=raw,if=virtio,cache=unsafe",
]  # fmt: skip

# Nobody attacks it, and without KVM a switch of page tables is dear.
CMDLINE = "console=ttyS0 quiet systemd.show_status=0 systemd.log_level=warning mitigations=off"


def make(lab: Lab) -> None:
    """Make the machine's kernel, initramfs and disks in the lab. Raises Failed."""
    if problem := debian.install(lab, *PACKAGES, more=KERNEL):
        raise Failed(f"the machine's packages can't be had: {problem}")
    top = Path(subprocess.run([LAB, "path", lab.name], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    archive = Archive()
    for name in ("bin", "dev", "root", "modules"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", INIT, 0o755)
    archive.file("bin/busybox", (top / "usr/bin/busybox").read_bytes(), 0o755)
    order = []
    for line in (top / DIRECTORY[1:] / "order").read_text().splitlines():
        if line.startswith("insmod "):  # and not "builtin"
            path = top / line.split()[1].lstrip("/")
            order.append(path.name.partition(".")[0])
            data = path.read_bytes()
            archive.file(f"modules/{order[-1]}", lzma.decompress(data) if path.suffix == ".xz" else data)
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode())
    (top / DIRECTORY[1:] / "initramfs.gz").write_bytes(gzip.compress(archive.finish(), 6, mtime=0))
    for program in (HERE / "inside.py", HERE.parents[1] / "live/stopper.py"):
        lab.write(f"{INSIDE}/{program.name}", program.read_text())
    lab.write("/etc/systemd/system/storage-test.service", UNIT)
    lab.sh(IMAGE)


def boot(lab: Lab, words: str = "") -> Iterator[str]:
    """Boot it with these words for its kernel besides; what its console says, line by line, until it is off."""
    process = subprocess.Popen(
        [LAB, "exec", lab.name, "--", *QEMU, "-append", f"{CMDLINE} {words}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield line.rstrip()
        if process.wait():
            raise Failed(f"QEMU ended with exit status {process.returncode}")
    finally:
        process.kill()
        process.communicate()
