# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's disks and CD-ROM drives."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import msgspec

from .document import shown
from .naming import NAME, VOLUME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .. import errors

Turn = Annotated[int, msgspec.Meta(ge=1)]  # in which a guest tries to boot from a device
SERIAL = r"[A-Za-z0-9._+-]{1,20}"  # no device of QEMU's has room for more, except SCSI, in one of two places


class Format(StrEnum):
    """A disk image's format. Never guessed: a guest could write a qcow2 header into its raw disk (CVE-2008-2004)."""

    RAW = "raw"
    QCOW2 = "qcow2"


class Bus(StrEnum):
    """How a disk is attached: as a virtio-blk device, to a virtio-scsi controller, to an AHCI port, or by NVMe."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    NVME = "nvme"


class Cache(StrEnum):
    """Whether the host's page cache is used, and whether the guest sees a write cache that it has to flush."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self in (Cache.NONE, Cache.DIRECTSYNC)

    @property
    def write_cache(self) -> bool:
        """Whether the guest sees a write cache; without one, each write is on the disk before it has ended."""
        return self not in (Cache.WRITETHROUGH, Cache.DIRECTSYNC)


class Discard(StrEnum):
    """What becomes of blocks that the guest says it no longer uses."""

    UNMAP = "unmap"
    IGNORE = "ignore"


class DetectZeroes(StrEnum):
    """Whether zeroes that the guest writes are written, take as little room as possible, or are discarded."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class Aio(StrEnum):
    """How QEMU reads and writes a file without waiting."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


# By machine type. Of other machines virtd only knows that QEMU finds a place for virtio devices.
BUSES: tuple[tuple[str, tuple[Bus, ...]], ...] = (
    (r"(pc-)?q35.*", tuple(Bus)),
    (r"pc(-i440fx.*|-[0-9].*)?|virt(-.*)?", (Bus.VIRTIO, Bus.SCSI, Bus.NVME)),
    (r".*", (Bus.VIRTIO,)),
)


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One disk: a file, or a volume of a storage pool, which knows its format."""

    path: str | None = None
    pool: str | None = None
    volume: str | None = None
    format: Format | None = None
    readonly: bool = False
    bus: Bus = Bus.VIRTIO
    serial: str | None = None
    boot: Turn | None = None
    cache: Cache | None = None
    discard: Discard = Discard.UNMAP
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    aio: Aio = Aio.THREADS
    iothread: bool = False
    shared: bool = False


class CdromBus(StrEnum):
    """How a CD-ROM drive is attached."""

    SATA = "sata"
    SCSI = "scsi"


class Cdrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One CD-ROM drive, with an ISO image in it or without a medium. Without a `bus`, the machine decides on it."""

    path: str | None = None
    boot: Turn | None = None
    bus: CdromBus | None = None


def check(
    machine: str,
    disks: Sequence[Disk],
    cdroms: Sequence[Cdrom],
    refuse: Callable[[str, str], errors.InvalidDefinition],
) -> None:
    """Raise what `refuse` makes of a key and what was expected there."""
    _check_volumes(disks, refuse)
    buses = next(buses for pattern, buses in BUSES if re.fullmatch(pattern, machine))
    for index, cdrom in enumerate(cdroms):
        if cdrom.bus is not None and cdrom.bus not in [bus.value for bus in buses]:
            raise refuse(f"cdrom[{index}].bus", f"expected another one or none: {machine} has no {cdrom.bus}")
    serials: dict[str, int] = {}
    for index, disk in enumerate(disks):
        key = f"disk[{index}]"
        if disk.bus not in buses:
            raise refuse(f"{key}.bus", f"expected {_one_of(buses)}, which is what virtd has for {machine}")
        if disk.bus is Bus.SATA and disk.readonly:
            raise refuse(f"{key}.readonly", "expected false, since a SATA disk can't be read-only")
        _check_options(key, disk, refuse)
        if disk.serial is None:
            continue
        if not re.fullmatch(SERIAL, disk.serial):
            raise refuse(f"{key}.serial", f"expected 1 to 20 letters, digits or ._+-, got {shown(disk.serial)}")
        if (other := serials.setdefault(disk.serial, index)) != index:
            raise refuse(f"{key}.serial", f"{disk.serial} is disk[{other}] already")


def _check_options(key: str, disk: Disk, refuse: Callable[[str, str], errors.InvalidDefinition]) -> None:
    """What can't be together, by QEMU or by the bus."""
    if disk.aio is Aio.IO_URING:
        expected = 'expected "threads" or "native": what is done by io_uring escapes the filter for system calls'
        raise refuse(f"{key}.aio", expected)
    if disk.aio is Aio.NATIVE and not (disk.cache is not None and disk.cache.direct):
        raise refuse(f"{key}.aio", 'expected cache = "none" or "directsync" with "native"')
    if disk.detect_zeroes is DetectZeroes.UNMAP and disk.discard is not Discard.UNMAP:
        raise refuse(f"{key}.detect_zeroes", 'expected discard = "unmap" with "unmap"')
    if disk.shared and disk.readonly:
        raise refuse(f"{key}.shared", "expected false: several guests may read a disk anyway")
    if disk.shared and disk.format is Format.QCOW2:
        raise refuse(f"{key}.shared", 'expected format = "raw" with it: two writers of a qcow2 image destroy it')
    if disk.iothread and disk.bus not in (Bus.VIRTIO, Bus.SCSI):
        raise refuse(f"{key}.iothread", "expected false: only virtio and scsi disks can have a thread")


def _one_of(buses: Sequence[Bus]) -> str:
    *most, last = (f'"{bus}"' for bus in buses)
    return f"{', '.join(most)} or {last}" if most else last


def _check_volumes(disks: Sequence[Disk], refuse: Callable[[str, str], errors.InvalidDefinition]) -> None:
    """Each disk is a file or a volume, and no volume is two disks."""
    seen: dict[tuple[str, str], int] = {}
    for index, disk in enumerate(disks):
        if disk.path is not None:
            if disk.pool is not None or disk.volume is not None:
                raise refuse(f"disk[{index}]", "expected path, or pool and volume, got both")
            continue
        if disk.pool is None or disk.volume is None:
            raise refuse(f"disk[{index}]", "expected path, or pool and volume")
        if not re.fullmatch(NAME, disk.pool):
            raise refuse(f"disk[{index}].pool", f"expected a pool's name, got {shown(disk.pool)}")
        if not re.fullmatch(VOLUME, disk.volume):
            raise refuse(f"disk[{index}].volume", f"expected a volume's name, got {shown(disk.volume)}")
        if (other := seen.setdefault((disk.pool, disk.volume), index)) != index:
            raise refuse(f"disk[{index}].volume", f"{disk.volume} of {disk.pool} is disk[{other}] already")
