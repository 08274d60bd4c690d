# SPDX-License-Identifier: LGPL-2.1-or-later
"""All devices of a guest, made of its definition. Pure: nothing on the host is examined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ....model import domain as model
from ....model.drives import Bus, CdromBus
from .. import directory
from ..images import Image, plain
from . import placing
from .builtin import Console, Display, Monitor, Panic, Rng
from .disk import Cdrom, Disk, ScsiController
from .flash import Flash
from .nic import Nic
from .provisioning import Credentials, Ignition, Seed
from .tpm import Tpm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....model.domain import Domain
    from .device import Device
    from .placing import Placed


class HostFacts(msgspec.Struct, frozen=True):
    """What QEMU's arguments depend on besides the definition."""

    binary: str = ""
    kvm: bool = False
    runtime: str = ""  # the guest's own directory, see directory.py
    taps: dict[int, str] = {}  # the interface of each NIC that is in a network, by its place in the definition
    vhost: bool = False
    flash: Flash | None = None  # None: QEMU's own BIOS


NONE = HostFacts()


def mac_of(uuid: str, number: int) -> str:
    """A MAC address that stays the same for one domain: QEMU's prefix and three bytes of the uuid."""
    tail = (int(uuid.replace("-", "")[-6:], 16) + number) & 0xFFFFFF
    return "52:54:00:" + ":".join(f"{tail >> shift & 255:02x}" for shift in (16, 8, 0))


def serial_of(uuid: str, number: int) -> str:
    """A serial number that stays the same for one disk: the end of the uuid, and the disk's number. Only NVMe
    requires one.
    """
    return f"{uuid.replace('-', '')[-12:]}-{number}"


def assemble(
    domain: Domain,
    uuid: str,
    host: HostFacts = NONE,
    disks: Sequence[Image] | None = None,
    placed: Sequence[Placed] | None = None,
) -> list[Device]:
    """Every device.

    `disks` are the disks' files, by default as in the definition; `placed` has numbers and addresses, see
    `placing.place`, by default as for a first start.
    """
    placed = placing.place(domain) if placed is None else placed
    return [
        *builtin(domain, host, placed),
        *drives(domain, uuid, disks, placed),
        *cards(domain, uuid, placed, host),
        *screen(host, placed),
        *provided(domain, host, placed),
    ]


def builtin(domain: Domain, host: HostFacts, placed: Sequence[Placed]) -> list[Device]:
    """What every guest has, and what is only switched on."""
    found: list[Device] = [
        Monitor(name="monitor", path=directory.monitor_socket(host.runtime)),
        Monitor(name="shutdown", path=directory.shutdown_socket(host.runtime)),
        Console(),
    ]
    if host.flash is not None:
        found.append(host.flash)
    if domain.is_pc:
        found.append(Panic())
    found += [Rng(number=at.number, address=at.address) for at in placing.of_kind(placed, placing.RNG)]
    if domain.tpm_model is not None:
        path = directory.tpm_socket(host.runtime)
        found += [
            Tpm(number=at.number, key="tpm", model=domain.tpm_model, pc=domain.is_pc, path=path)
            for at in placing.of_kind(placed, placing.TPM)
        ]
    return found


def drives(domain: Domain, uuid: str, disks: Sequence[Image] | None, placed: Sequence[Placed]) -> list[Device]:
    """Disks and CD-ROM drives in the order of the definition; first, what they are attached to."""
    files = plain(domain) if disks is None else disks
    turns = _turns(domain)
    thread = any(disk.iothread for disk in domain.disk if disk.bus is Bus.SCSI)
    found: list[Device] = [
        ScsiController(number=at.number, address=at.address, iothread=thread)
        for at in placing.of_kind(placed, placing.SCSI)
    ]
    for index, (disk, image, at) in enumerate(
        zip(domain.disk, files, placing.of_kind(placed, placing.DISK), strict=True)
    ):
        key = f"disk[{index}]"
        found.append(
            Disk(
                number=at.number,
                key=key,
                address=at.address,
                image=image,
                options=disk,
                serial=disk.serial or (serial_of(uuid, at.number) if disk.bus is Bus.NVME else ""),
                boot=turns.get(key, 0),
            )
        )
    for index, (cdrom, at) in enumerate(zip(domain.cdrom, placing.of_kind(placed, placing.CDROM), strict=True)):
        key = f"cdrom[{index}]"
        kind = "scsi-cd" if cdrom.bus is CdromBus.SCSI else "ide-cd" if domain.is_pc else "virtio-blk-pci"
        turn = turns.get(key, 0)
        found.append(Cdrom(number=at.number, key=key, address=at.address, path=cdrom.path, model=kind, boot=turn))
    return found


def _turns(domain: Domain) -> dict[str, int]:
    """QEMU's bootindex of each device that is booted from, by its key."""
    return {key: turn for turn, key in enumerate(model.boot_order(domain), 1)}


def cards(domain: Domain, uuid: str, placed: Sequence[Placed], host: HostFacts = NONE) -> list[Nic]:
    """The network cards."""
    turns = _turns(domain)
    return [
        Nic(
            number=at.number,
            key=f"nic[{index}]",
            address=at.address,
            mac=(nic.mac or (mac_of(uuid, at.number) if uuid else "")).lower(),
            network=nic.network,
            tap=host.taps.get(index),
            vhost=host.vhost,
            boot=turns.get(f"nic[{index}]", 0),
        )
        for index, (nic, at) in enumerate(zip(domain.nic, placing.of_kind(placed, placing.NIC), strict=True))
    ]


def screen(host: HostFacts, placed: Sequence[Placed]) -> list[Device]:
    """The display."""
    path = directory.vnc_socket(host.runtime)
    return [Display(number=at.number, address=at.address, path=path) for at in placing.of_kind(placed, placing.VIDEO)]


def provided(domain: Domain, host: HostFacts, placed: Sequence[Placed]) -> list[Device]:
    """What its system is set up with."""
    seed, smbios, ignition = (
        directory.provided(host.runtime, name) for name in (directory.SEED, directory.SMBIOS, directory.IGNITION)
    )
    found: list[Device] = [
        Seed(number=at.number, address=at.address, path=seed) for at in placing.of_kind(placed, placing.SEED)
    ]
    if domain.guest.credentials:
        found.append(Credentials(path=smbios))
    if domain.guest.ignition is not None:
        found.append(Ignition(path=ignition))
    return found
