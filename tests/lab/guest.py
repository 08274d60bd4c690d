# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Linux guest that labs hold: kernel, initramfs and a disk that boots, in the root's /usr/share/virtd-lab.

Kernel and busybox are the suite's own packages, which the root's making left unpacked in its scratch directory; the
tools for the disk come from there as well and run in the root, so that the host needs no boot loader.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path

from .cpio import Archive
from .paths import SOURCE
from .say import in_root, run, say
from .state import LabError

# What the guest may meet in QEMU, by the modules' file names; what these depend on is found in modules.dep. A kernel
# may have any of them built in.
_MODULES = (
    "evdev", "button", "pvpanic-mmio", "pvpanic-pci", "virtio_pci", "virtio_blk", "virtio_net", "virtio-rng",
    "af_packet", "isofs", "dmi-sysfs", "qemu_fw_cfg", "tpm_crb", "tpm_tis",
)  # fmt: skip
# For disks on other buses than virtio. Nothing loads them by itself, so that no other guest waits for their probes.
_BUSES = ("virtio_scsi", "ahci", "sd_mod", "nvme")

_DISK_CONFIG = """\
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initramfs.gz
  APPEND console=ttyS0 quiet
"""


def make(root: Path, scratch: Path, log: Path) -> None:
    """Makes the three files from the packages in `scratch`/debs, which lies inside `root`."""
    say("  the guest: kernel, initramfs, disk")
    target = root / "usr/share/virtd-lab"
    target.mkdir(parents=True)
    unpacked = scratch / "unpacked"
    for deb in sorted((scratch / "debs").glob("*.deb")):
        paths = [f"/{path.relative_to(root)}" for path in (deb, unpacked)]
        run(in_root(root, ["dpkg-deb", "-x", *paths]), what=f"unpacking {deb.name}", log=log)
    if not (unpacked / "lib").exists():
        (unpacked / "lib").symlink_to("usr/lib")
    # The kernel's file is in /boot or, as forky has it, beside its modules, from which it is linked when installed.
    modules = _only([*unpacked.glob("lib/modules/*"), *unpacked.glob("usr/lib/modules/*")], "directory of modules")
    release = modules.name
    kernel = _only([*unpacked.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")], "kernel")
    shutil.copyfile(kernel, target / "vmlinuz")
    # Debian's package leaves modules.dep to be made at its installation.
    base = f"/{unpacked.relative_to(root)}"
    run(in_root(root, ["depmod", "-b", base, release]), what="reading the modules' dependencies", log=log)
    busybox = _only([*unpacked.glob("usr/bin/busybox"), *unpacked.glob("bin/busybox")], "busybox")
    initramfs = _initramfs(busybox, modules, _console_program(scratch, log))
    (target / "initramfs.gz").write_bytes(gzip.compress(initramfs, 6, mtime=0))
    _disk(root, scratch, target, log)


def _only(found: list[Path], what: str) -> Path:
    if len({path.resolve() for path in found}) != 1:
        raise LabError(f"the suite's packages should hold one {what}, but hold {len(found)}")
    return found[0]


def _console_program(scratch: Path, log: Path) -> bytes:
    program = scratch / "console"
    flags = (
        "-O2 -s -static -nostdlib -ffreestanding -fno-stack-protector -fno-pic -no-pie -fcf-protection=none -mno-sse"
    )
    argv: list[str | Path] = ["cc", *flags.split(), "-o", program, SOURCE / "guest/console.c"]
    run(argv, what="compiling the guest's program", log=log)
    return program.read_bytes()


def _load_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """Files of the modules of these names that aren't built in, each after those it depends on."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    order: list[str] = []
    for wanted in names:
        for path in needs:
            if Path(path).name.partition(".")[0] == wanted:
                # modules.dep names the direct and indirect needs of a module, the deepest last.
                order += [need for need in (*reversed(needs[path]), path) if need not in order]
    return [modules / path for path in order]


def _initramfs(busybox: Path, modules: Path, console: bytes) -> bytes:
    archive = Archive()
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "lib", "lib/modules"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (SOURCE / "guest/init").read_bytes(), 0o755)
    archive.file("etc/udhcpc", (SOURCE / "guest/udhcpc").read_bytes(), 0o755)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("bin/console", console, 0o755)
    done: set[str] = set()
    for listed, names in (("order", _MODULES), ("buses", _BUSES)):
        order = []
        for path in _load_order(modules, names):
            name = path.name.partition(".")[0] + ".ko"
            if name in done:
                continue
            data = path.read_bytes()
            archive.file(f"lib/modules/{name}", lzma.decompress(data) if path.suffix == ".xz" else data)
            done.add(name)
            order.append(name)
        archive.file(f"lib/modules/{listed}", "".join(f"{name}\n" for name in order).encode())
    return archive.finish()


def _disk(root: Path, scratch: Path, target: Path, log: Path) -> None:
    """A FAT file system with syslinux in its boot sector, on a disk without partitions: SeaBIOS starts that."""
    (scratch / "syslinux.cfg").write_text(_DISK_CONFIG)
    script = f"""set -e
        cd /{scratch.relative_to(root)}
        PATH=$PWD/unpacked/usr/bin:$PWD/unpacked/usr/sbin:$PWD/unpacked/sbin:$PATH
        truncate -s 48M disk.raw
        mkfs.fat -F 16 -n VIRTDLAB disk.raw
        mcopy -i disk.raw /usr/share/virtd-lab/vmlinuz /usr/share/virtd-lab/initramfs.gz syslinux.cfg ::/
        syslinux --install disk.raw
        qemu-img convert -f raw -O qcow2 disk.raw /usr/share/virtd-lab/disk.qcow2"""
    run(in_root(root, ["sh", "-c", script]), what="making the guest's disk", log=log)
    if not (target / "disk.qcow2").exists():
        raise LabError("qemu-img said nothing but made no disk")
