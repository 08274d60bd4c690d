# SPDX-License-Identifier: LGPL-2.1-or-later
"""All devices of a guest, made of its definition. Pure: nothing is looked up here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .. import directory
from ..images import Image, plain
from .builtin import Console, Display, Monitor, Panic, Rng
from .disk import Cdrom, Disk
from .nic import Nic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....model.domain import Domain
    from .device import Device


class Host(msgspec.Struct, frozen=True):
    """What QEMU's arguments depend on besides the definition."""

    binary: str = ""
    kvm: bool = False
    runtime: str = ""  # the guest's own directory, see directory.py
    taps: dict[int, str] = {}  # the interface of each NIC that is in a network, by its place in the definition
    vhost: bool = False


NONE = Host()


def mac_of(uuid: str, number: int) -> str:
    """A MAC address that stays the same for one domain: QEMU's prefix and three bytes of the uuid."""
    tail = (int(uuid.replace("-", "")[-6:], 16) + number) & 0xFFFFFF
    return "52:54:00:" + ":".join(f"{tail >> shift & 255:02x}" for shift in (16, 8, 0))


def assemble(domain: Domain, uuid: str, host: Host = NONE, disks: Sequence[Image] | None = None) -> list[Device]:
    """Every device. `disks` are the disks' files; None: as the definition has them."""
    return [*builtin(domain, host), *disks_of(domain, disks), *cards(domain, uuid, host), *screen(domain, host)]


def builtin(domain: Domain, host: Host) -> list[Device]:
    found: list[Device] = [
        Monitor(name="monitor", path=directory.monitor_socket(host.runtime)),
        Monitor(name="shutdown", path=directory.shutdown_socket(host.runtime)),
        Console(),
    ]
    if domain.is_pc:
        found.append(Panic())
    if domain.rng:
        found.append(Rng())
    return found


def disks_of(domain: Domain, disks: Sequence[Image] | None) -> list[Device]:
    """What the guest keeps its data on, in the order of the definition, which is that of booting."""
    files = plain(domain) if disks is None else disks
    boots = domain.boot.kernel is None
    found: list[Device] = [
        Disk(number=index, key=f"disk[{index}]", image=image, boot=index + 1 if boots else 0)
        for index, image in enumerate(files)
    ]
    for index, cdrom in enumerate(domain.cdrom):
        turn = len(domain.disk) + index + 1 if boots else 0
        found.append(Cdrom(number=index, key=f"cdrom[{index}]", path=cdrom.path, ide=domain.is_pc, boot=turn))
    return found


def cards(domain: Domain, uuid: str, host: Host = NONE) -> list[Nic]:
    """The network cards."""
    return [
        Nic(
            number=index,
            key=f"nic[{index}]",
            mac=(nic.mac or (mac_of(uuid, index) if uuid else "")).lower(),
            network=nic.network,
            tap=host.taps.get(index),
            vhost=host.vhost,
        )
        for index, nic in enumerate(domain.nic)
    ]


def screen(domain: Domain, host: Host) -> list[Device]:
    if domain.vnc is None or not domain.vnc.enabled:
        return []
    return [Display(path=directory.vnc_socket(host.runtime))]
