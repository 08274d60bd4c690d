# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain: one virtual machine as a person defines it, typed and checked, without looking at the host.

What can only be known by looking (does the disk exist, is there enough memory) is the driver's question at start.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import msgspec

from .. import errors
from . import document, drives, naming, provisioning, size
from .document import shown
from .drives import Cdrom, CdromBus, Disk, Turn
from .naming import MAC, NAME
from .provisioning import Provisioning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MACHINE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
CPU = r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:,[+-]?[A-Za-z0-9._-]+(?:=(?:on|off))?)*"

MEMORY_MIN = 1 << 20
MEMORY_MAX = 4 << 40  # x86 guests of QEMU 10 end there on q35 without special CPUs; a typo of unit is the usual cause
VCPUS_MAX = 255  # without an IOMMU with interrupt remapping, q35 can address no more (QEMU docs, "APIC IDs")


class OnPoweroff(StrEnum):
    """What becomes of the QEMU process when the guest powers itself off."""

    STOP = "stop"
    KEEP = "keep"


class OnReboot(StrEnum):
    """What a guest's own reboot does."""

    RESET = "reset"
    STOP = "stop"


class OnCrash(StrEnum):
    """What a guest's panic does: end it, keep it paused for a person to look at, or start it afresh."""

    STOP = "stop"
    KEEP = "keep"
    RESTART = "restart"


class Firmware(StrEnum):
    """What runs in the guest before its boot loader."""

    BIOS = "bios"
    UEFI = "uefi"


class TpmModel(StrEnum):
    """How a guest talks to its TPM: by a command response buffer, or by the older FIFO interface."""

    CRB = "crb"
    TIS = "tis"


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the guest boots from: a kernel given here, or, without one, its first disk; and by which firmware."""

    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""

    @property
    def files(self) -> list[str]:
        return [path for path in (self.kernel, self.initrd) if path is not None]


class Nic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One virtio network card: in a network of virtd's, or without one, `mode = "user"`, behind QEMU's own NAT."""

    mode: str | None = None
    network: str | None = None
    mac: str | None = None
    trusted: bool = False
    boot: Turn | None = None


class Vnc(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A VNC display on a unix socket in the domain's runtime directory."""

    enabled: bool = True


class Tpm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A TPM 2.0, emulated by swtpm. Without a `model` it is the one that suits the machine."""

    model: TpmModel | None = None


class Domain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A domain's definition; `memory` in the unit that the person wrote (`memory_bytes` has it in bytes)."""

    name: str
    memory: str | int
    uuid: str | None = None
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=VCPUS_MAX)] = 1
    machine: str = "q35"
    cpu: str | None = None
    autostart: bool = False
    on_poweroff: OnPoweroff = OnPoweroff.STOP
    on_reboot: OnReboot = OnReboot.RESET
    on_crash: OnCrash = OnCrash.STOP
    host_shutdown_timeout: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    rng: bool = True
    boot: Boot = Boot()
    disk: tuple[Disk, ...] = ()
    cdrom: tuple[Cdrom, ...] = ()
    nic: tuple[Nic, ...] = ()
    vnc: Vnc | None = None
    guest: Provisioning = Provisioning()
    tpm: Tpm | None = None

    @property
    def memory_bytes(self) -> int:
        return size.parse(self.memory)

    @property
    def is_pc(self) -> bool:
        """Whether its machine is a PC: it has SATA or IDE, where others get a disk for a CD-ROM, and pvpanic."""
        return self.machine.startswith(("q35", "pc"))

    def can_be_empty(self, cdrom: Cdrom) -> bool:
        """Whether it is a CD-ROM drive to the guest, and not a disk."""
        return self.is_pc or cdrom.bus is CdromBus.SCSI

    @property
    def tpm_model(self) -> TpmModel | None:
        """That of its TPM; None if it has none."""
        if self.tpm is None:
            return None
        return self.tpm.model or (TpmModel.CRB if self.is_pc else TpmModel.TIS)


def parse(text: str, source: str) -> Domain:
    """The definition that `text` (TOML) holds. `source` is the file's name in errors.

    Raises InvalidDefinition with the key and what was expected.
    """
    domain = document.decode(text, source, Domain)
    check(domain, source)
    return naming.canonical(domain, domain.uuid)


def check(domain: Domain, source: str) -> None:
    """Everything that a type can't say. Raises InvalidDefinition at the first thing that is wrong."""

    def refuse(key: str, expected: str, hint: str = "") -> errors.InvalidDefinition:
        return errors.InvalidDefinition(source, key, expected, hint=hint)

    naming.check(domain, refuse)
    try:
        memory = domain.memory_bytes
    except ValueError:
        raise refuse("memory", f'expected a size such as "256M" or "2G", got {shown(domain.memory)}') from None
    if not MEMORY_MIN <= memory <= MEMORY_MAX:
        raise refuse("memory", f"expected 1M to {size.show(MEMORY_MAX)}, got {shown(domain.memory)}")
    if not re.fullmatch(MACHINE, domain.machine):
        raise refuse("machine", f'expected a QEMU machine type such as "q35", got {shown(domain.machine)}')
    if domain.cpu is not None and not re.fullmatch(CPU, domain.cpu):
        raise refuse("cpu", f'expected a CPU model such as "host" or "max,-avx2", got {shown(domain.cpu)}')
    if domain.boot.kernel is None and (domain.boot.initrd is not None or domain.boot.cmdline):
        raise refuse("boot.kernel", "expected a kernel, since boot.initrd or boot.cmdline is set")
    _check_order(domain, refuse)
    if domain.boot.secure_boot and domain.boot.firmware is not Firmware.UEFI:
        raise refuse("boot.secure_boot", 'expected boot.firmware = "uefi" with it')
    if "\n" in domain.boot.cmdline or len(domain.boot.cmdline) > 2047:
        raise refuse("boot.cmdline", "expected one line of at most 2047 characters (the limit of Linux on x86)")
    provisioning.check(domain.guest, refuse)
    for key, path in paths(domain):
        if not path.startswith("/") or "\0" in path or "\n" in path or len(path) > 4095:
            raise refuse(key, f"expected an absolute path, got {shown(path)}")
        if "/../" in path + "/":
            raise refuse(key, f"expected a path without '..', got {shown(path)}")
    seen: dict[str, str] = {}
    for key, path in paths(domain):
        if key.startswith("disk") and path in seen:
            raise refuse(key, f"{path} is {seen[path]} already")
        seen.setdefault(path, key)
    for index, cdrom in enumerate(domain.cdrom):
        if cdrom.path is None and not domain.can_be_empty(cdrom):
            raise refuse(f"cdrom[{index}].path", f"expected a path: with {domain.machine} no drive can be empty")
    drives.check(domain.machine, domain.disk, domain.cdrom, refuse)
    if domain.tpm is not None and not domain.is_pc:
        if not re.fullmatch("virt(-.*)?", domain.machine):
            raise refuse("tpm", f"expected none: virtd has no TPM for {domain.machine}, only for q35, pc and virt")
        if domain.tpm_model is not TpmModel.TIS:
            raise refuse("tpm.model", f'expected "tis", which is all that {domain.machine} has')
    macs: dict[str, str] = {}
    for index, nic in enumerate(domain.nic):
        if nic.mode not in (None, "user"):
            raise refuse(f"nic[{index}].mode", f'expected "user", got {shown(nic.mode)}', 'Or: network = "default".')
        if nic.network is not None and nic.mode is not None:
            raise refuse(f"nic[{index}].mode", "expected no mode, since network is given")
        if nic.network is not None and not re.fullmatch(NAME, nic.network):
            raise refuse(f"nic[{index}].network", f"expected the name of a network, got {shown(nic.network)}")
        if nic.trusted and nic.network is None:
            raise refuse(f"nic[{index}].trusted", "expected nothing here, since there is no network")
        if nic.mac is None:
            continue
        mac = nic.mac.lower()
        if not re.fullmatch(MAC, mac) or int(mac[:2], 16) & 1:
            raise refuse(
                f"nic[{index}].mac", f"expected a unicast address such as 52:54:00:12:34:56, got {shown(nic.mac)}"
            )
        if mac in macs:
            raise refuse(f"nic[{index}].mac", f"{nic.mac} is the address of {macs[mac]} already")
        macs[mac] = f"nic[{index}]"


def _check_order(domain: Domain, refuse: Callable[[str, str], errors.InvalidDefinition]) -> None:
    """There is something to boot from, and no two devices have the same turn."""
    cards = any(nic.boot for nic in domain.nic)
    if domain.boot.kernel is None and not (domain.disk or any(cdrom.path for cdrom in domain.cdrom) or cards):
        expected = "expected a kernel, a [[disk]], a [[cdrom]] or a [[nic]] with boot to boot from, found none"
        raise refuse("boot.kernel", expected)
    turns: dict[int, str] = {}
    for key, turn in _bootable(domain):
        if turn is None:
            continue
        if domain.boot.kernel is not None:
            raise refuse(f"{key}.boot", "expected nothing here, since boot.kernel is what it boots")
        if (other := turns.setdefault(turn, key)) != key:
            raise refuse(f"{key}.boot", f"expected another number, since {turn} is the turn of {other} already")


def _bootable(domain: Domain) -> list[tuple[str, int | None]]:
    """The key of each device that can be booted from, and its turn."""
    kinds: tuple[tuple[str, Sequence[Disk | Cdrom | Nic]], ...] = (
        ("disk", domain.disk),
        ("cdrom", domain.cdrom),
        ("nic", domain.nic),
    )
    return [(f"{kind}[{index}]", device.boot) for kind, devices in kinds for index, device in enumerate(devices)]


def boot_order(domain: Domain) -> list[str]:
    """The keys of the devices that the guest tries to boot from, in that order: those with a turn, and then disks and
    CD-ROM drives as they are in the definition.
    """
    if domain.boot.kernel is not None:
        return []
    devices = _bootable(domain)
    turns = sorted((turn, key) for key, turn in devices if turn is not None)
    rest = [key for key, turn in devices if turn is None and not key.startswith("nic")]
    return [key for _turn, key in turns] + rest


def paths(domain: Domain) -> list[tuple[str, str]]:
    """Every file that the definition names, as (key, path)."""
    found = [
        (f"boot.{key}", path)
        for key, path in (("kernel", domain.boot.kernel), ("initrd", domain.boot.initrd))
        if path is not None
    ]
    found += [(f"disk[{index}].path", disk.path) for index, disk in enumerate(domain.disk) if disk.path is not None]
    found += [
        (f"cdrom[{index}].path", cdrom.path) for index, cdrom in enumerate(domain.cdrom) if cdrom.path is not None
    ]
    return [*found, *domain.guest.paths()]
