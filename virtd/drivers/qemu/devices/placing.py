# SPDX-License-Identifier: LGPL-2.1-or-later
"""The number and address of each device: assigned once, and the same at every later start.

The first addresses are those that QEMU itself would assign, so that guests of an older virtd keep theirs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ....model.domain import Domain

DISK, CDROM, NIC, RNG, VIDEO, SEED, TPM = "disk", "cdrom", "nic", "rng", "video", "seed", "tpm"

Place = tuple[str, int]  # a bus, and a slot or unit there

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
        return (
            f",bus={self.bus},unit={self.slot}"
            if self.bus.startswith("ide.")
            else f",bus={self.bus},addr={self.slot:#x}"
        )


def wanted(domain: Domain) -> Iterator[tuple[str, str]]:
    """The kind and identity of each device that has an address, in the order in which QEMU would place them."""
    if domain.rng:
        yield RNG, ""
    for disk in domain.disk:
        yield DISK, disk.path or f"{disk.pool}/{disk.volume}"
    for cdrom in domain.cdrom:
        yield CDROM, cdrom.path or ""
    for nic in domain.nic:
        yield NIC, nic.mac.lower() if nic.mac else nic.network or "user"
    if domain.vnc is not None and domain.vnc.enabled:
        yield VIDEO, ""
    if domain.guest.by_cloud_init:
        yield SEED, ""
    if domain.tpm_model is not None:
        yield TPM, domain.tpm_model.value


def place(domain: Domain, before: Sequence[Placed] = ()) -> list[Placed]:
    """All devices in the order of the definition; `before`: as they were at the last start.

    A device is recognized by its identity, wherever in the definition it is now. Failing that, it is taken for the
    one that was in its place: another file in the same drive.
    """
    now = list(wanted(domain))
    same = _recognized(now, before)
    taken: set[Place] = set()
    numbers: dict[str, set[int]] = {}
    for old in same.values():
        numbers.setdefault(old.kind, set()).add(old.number)
        if (old.bus, old.slot) in _places(domain, old.kind):
            taken.add((old.bus, old.slot))
    found = []
    for index, (kind, what) in enumerate(now):
        places = _places(domain, kind)
        known = same.get(index)
        used = numbers.setdefault(kind, set())
        number = known.number if known is not None else next(n for n in range(len(now)) if n not in used)
        used.add(number)
        if known is not None and (known.bus, known.slot) in places:
            at = (known.bus, known.slot)
        else:
            at = next((one for one in places if one not in taken), ("", 0))
        taken.add(at)
        found.append(Placed(kind, number, what, *at))
    return found


def lacks_place(domain: Domain, placed: Iterable[Placed]) -> Placed | None:
    """The first device for which no place is left."""
    return next((one for one in placed if not one.bus and _places(domain, one.kind)), None)


def of_kind(placed: Iterable[Placed], kind: str) -> list[Placed]:
    return [one for one in placed if one.kind == kind]


def _recognized(now: list[tuple[str, str]], before: Sequence[Placed]) -> dict[int, Placed]:
    """For the index in `now` of each known device: what it was `before`."""
    left = list(before)
    found: dict[int, Placed] = {}

    def take(index: int, old: Placed | None) -> None:
        if old is not None and old in left:
            found[index] = old
            left.remove(old)

    for index, (kind, what) in enumerate(now):
        take(index, next((old for old in left if (old.kind, old.what) == (kind, what)), None))
    seen: dict[str, int] = {}
    for index, (kind, _what) in enumerate(now):
        position = seen[kind] = seen.get(kind, -1) + 1
        olds = of_kind(before, kind)
        if index not in found and position < len(olds):
            take(index, olds[position])
    return found


def _places(domain: Domain, kind: str) -> list[Place]:
    """The places for a device of this kind; none on machines that virtd knows little about, nor for a TPM, for which
    every machine has a place of its own.
    """
    if kind == TPM:
        return []
    table = IDE if kind == CDROM and domain.is_pc else PCI
    places = next((places for machine, places in table if re.fullmatch(machine, domain.machine)), [])
    # Linux names disks in the order of their slots: those of the definition come first, also ones that are added.
    return places[::-1] if kind == SEED else places
