# SPDX-License-Identifier: LGPL-2.1-or-later
"""The number and address of each device: assigned once, and the same at every later start.

The first addresses are those that QEMU itself would assign, so that guests of an older virtd keep theirs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ....model.drives import Bus, CdromBus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ....model.domain import Domain

DISK, CDROM, NIC, RNG, VIDEO, SEED, TPM, SCSI = "disk", "cdrom", "nic", "rng", "video", "seed", "tpm", "scsi"

Place = tuple[str, int]  # a bus, and a slot, target or unit there

# By machine type. On PCIe slot 0 is the host bridge and, on q35, 31 the chipset; i440fx has its chipset in 1 as well.
PCI: tuple[tuple[str, list[Place]], ...] = (
    (r"(pc-)?q35.*", [("pcie.0", slot) for slot in range(1, 31)]),
    (r"pc(-i440fx.*|-[0-9].*)?", [("pci.0", slot) for slot in range(2, 32)]),
    (r"virt(-.*)?", [("pcie.0", slot) for slot in range(1, 32)]),
)
IDE: tuple[tuple[str, list[Place]], ...] = (
    (r"(pc-)?q35.*", [(f"ide.{port}", 0) for port in (5, 4, 3, 2, 1, 0)]),
    (r"pc(-i440fx.*|-[0-9].*)?", [("ide.1", 0), ("ide.1", 1), ("ide.0", 0), ("ide.0", 1)]),
)
# Of the SCSI controller, which there is one of.
TARGETS: list[Place] = [("scsi0.0", target) for target in range(256)]


class Placed(msgspec.Struct, frozen=True):
    """One device, as the machine's record has it.

    `kind` and `number` make its id; `what` distinguishes it from others of its kind: a path, a volume, an address, a
    network, a model. `bus` is "" if QEMU is to find a place, or there is only one.
    """

    kind: str
    number: int
    what: str = ""
    bus: str = ""
    slot: int = 0

    @property
    def id(self) -> str:
        return f"{self.kind}{self.number}"

    @property
    def address(self) -> str:
        """As -device takes it, after a comma; "" when there is none."""
        if not self.bus:
            return ""
        if self.bus.startswith("ide."):
            return f",bus={self.bus},unit={self.slot}"
        if self.bus.startswith("scsi"):
            return f",bus={self.bus},channel=0,scsi-id={self.slot},lun=0"
        return f",bus={self.bus},addr={self.slot:#x}"


class Wanted(NamedTuple):
    """One device of a definition: its kind, its identity, and the bus that it asks for, or "" if it has no choice."""

    kind: str
    what: str
    bus: str = ""


def wanted(domain: Domain) -> Iterator[Wanted]:
    """Each device that has an address, in the order in which QEMU would place them."""
    if domain.rng:
        yield Wanted(RNG, "")
    scsi = [cdrom.bus is CdromBus.SCSI for cdrom in domain.cdrom]
    if any(scsi) or any(disk.bus is Bus.SCSI for disk in domain.disk):
        yield Wanted(SCSI, "")
    for disk in domain.disk:
        yield Wanted(DISK, disk.path or f"{disk.pool}/{disk.volume}", disk.bus)
    for cdrom, on_scsi in zip(domain.cdrom, scsi, strict=True):
        yield Wanted(CDROM, cdrom.path or "", Bus.SCSI if on_scsi else "")
    for nic in domain.nic:
        yield Wanted(NIC, nic.mac.lower() if nic.mac else nic.network or "user")
    if domain.vnc is not None and domain.vnc.enabled:
        yield Wanted(VIDEO, "")
    if domain.guest.by_cloud_init:
        yield Wanted(SEED, "")
    if domain.tpm_model is not None:
        yield Wanted(TPM, domain.tpm_model.value)


def place(domain: Domain, before: Sequence[Placed] = ()) -> list[Placed]:
    """All devices in the order of the definition; `before`: as they were at the last start.

    A device is recognized by its identity, wherever in the definition it is now. Failing that, it is taken for the
    one that was in its place: another file in the same drive. On another bus it keeps its number, not its place.
    """
    now = list(wanted(domain))
    same = _recognized(now, before)
    taken: set[Place] = set()
    numbers: dict[str, set[int]] = {}
    for index, old in same.items():
        numbers.setdefault(old.kind, set()).add(old.number)
        if (old.bus, old.slot) in _places(domain, now[index]):
            taken.add((old.bus, old.slot))
    found = []
    for index, one in enumerate(now):
        places = _places(domain, one)
        known = same.get(index)
        used = numbers.setdefault(one.kind, set())
        number = known.number if known is not None else next(n for n in range(len(now)) if n not in used)
        used.add(number)
        if known is not None and (known.bus, known.slot) in places:
            at = (known.bus, known.slot)
        else:
            at = next((place for place in places if place not in taken), ("", 0))
        taken.add(at)
        found.append(Placed(one.kind, number, one.what, *at))
    return found


def lacks_place(domain: Domain, placed: Sequence[Placed]) -> Placed | None:
    """The first device for which no place is left."""
    return next(
        (one for one, asked in zip(placed, wanted(domain), strict=True) if not one.bus and _places(domain, asked)),
        None,
    )


def of_kind(placed: Iterable[Placed], kind: str) -> list[Placed]:
    return [one for one in placed if one.kind == kind]


def _recognized(now: Sequence[Wanted], before: Sequence[Placed]) -> dict[int, Placed]:
    """For the index in `now` of each known device: what it was `before`."""
    left = list(before)
    found: dict[int, Placed] = {}

    def take(index: int, old: Placed | None) -> None:
        if old is not None and old in left:
            found[index] = old
            left.remove(old)

    for index, (kind, what, _bus) in enumerate(now):
        take(index, next((old for old in left if (old.kind, old.what) == (kind, what)), None))
    seen: dict[str, int] = {}
    for index, (kind, _what, _bus) in enumerate(now):
        position = seen[kind] = seen.get(kind, -1) + 1
        olds = of_kind(before, kind)
        if index not in found and position < len(olds):
            take(index, olds[position])
    return found


def _places(domain: Domain, one: Wanted) -> list[Place]:
    """The places for a device, the best first; none on machines that virtd knows little about, nor for a TPM, for
    which every machine has a place of its own.
    """
    if one.kind == TPM:
        return []
    if one.bus == Bus.SCSI:
        return TARGETS
    ide = one.bus == Bus.SATA or (one.kind == CDROM and domain.is_pc)
    places = next((places for machine, places in (IDE if ide else PCI) if re.fullmatch(machine, domain.machine)), [])
    # Linux names disks in the order of their slots: those of the definition come first, also ones that are added.
    # On SATA the CD-ROM drives, which were there first, begin at the other end.
    return places[::-1] if one.kind == SEED or one.bus == Bus.SATA else places
