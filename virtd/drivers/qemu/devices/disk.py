# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks and CD-ROM drives."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ....model import drives as model
from ....model.drives import Bus
from ....objects.conflicts import Holding, Kind
from ... import nodes
from .device import Device, File, order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..images import Image


MODELS = {Bus.VIRTIO: "virtio-blk-pci", Bus.SCSI: "scsi-hd", Bus.SATA: "ide-hd", Bus.NVME: "nvme"}


class ScsiController(Device, frozen=True):
    """The controller of all SCSI disks, with a thread of its own or without."""

    iothread: bool = False

    def arguments(self) -> list[str]:
        name = f"scsi{self.number}"
        thread, given = _iothread(name) if self.iothread else ([], "")
        return [*thread, "-device", f"virtio-scsi-pci,id={name}{given}{self.address}"]


class Disk(Device, frozen=True, kw_only=True):
    """A disk on one of the buses, with its `options` as in the definition.

    `serial` is the number that the guest sees; "": none, or QEMU's own. `boot` is its place in the boot order; 0: it
    isn't booted from.
    """

    image: Image
    options: model.Disk = model.Disk()
    serial: str = ""
    boot: int = 0

    def arguments(self) -> list[str]:
        name, options = f"disk{self.number}", self.options
        serial = f",serial={self.serial}" if self.serial else ""
        cache = f",write-cache={'on' if options.cache.write_cache else 'off'}" if options.cache is not None else ""
        own = options.iothread and options.bus is Bus.VIRTIO  # that of SCSI disks is their controller's
        thread, given = _iothread(name) if own else ([], "")
        share = ",share-rw=on" if options.shared else ""
        device = (
            f"{MODELS[options.bus]},drive={name},id={options.bus}-{name}"
            f"{serial}{cache}{share}{given}{order(self.boot)}{self.address}"
        )
        return [*self._nodes(), *thread, "-device", device]

    def _nodes(self) -> list[str]:
        """Its backing files, the lowest first, and then itself."""
        image, number = self.image, self.number
        found: list[nodes.Node] = []
        below: str | None = None
        for depth in range(len(image.backing), 0, -1):
            path, kind = image.backing[depth - 1]
            name = f"{number}b{depth}"
            found += [
                nodes.file(path, **{"node-name": f"file{name}", "read-only": True, "auto-read-only": False}),
                nodes.over(kind.value, f"file{name}", below, **{"node-name": f"disk{name}", "read-only": True}),
            ]
            below = f"disk{name}"
        options = self.options
        # Each node ignores what it isn't asked to discard, so both are asked.
        common: nodes.Node = {"discard": options.discard.value, "read-only": image.readonly}
        if (cache := options.cache) is not None:
            common["cache"] = {"direct": cache.direct, "no-flush": cache is model.Cache.UNSAFE}
        file: nodes.Node = {"node-name": f"file{number}", "auto-read-only": False, "locking": "auto"}
        if options.aio is not model.Aio.THREADS:
            file["aio"] = options.aio.value
        disk: nodes.Node = {"node-name": f"disk{number}"}
        if options.detect_zeroes is not model.DetectZeroes.OFF:
            disk["detect-zeroes"] = options.detect_zeroes.value
        found += [
            nodes.file(image.path, **file, **common),
            nodes.over(image.format.value, f"file{number}", below, **disk, **common),
        ]
        return _blockdevs(found)

    def files(self) -> Iterator[File]:
        if self.image.path:  # it isn't known before the start where a volume of a pool is
            yield File(self.image.path, not self.image.readonly)
        for path, _format in self.image.backing:
            yield File(path, writes=False)

    def host_devices(self) -> Iterator[str]:
        if self.image.is_device:
            yield os.path.realpath(self.image.path)

    def after(self) -> Iterator[str]:
        if self.image.after:
            yield self.image.after

    def holdings(self, _bridge_of: Callable[[str], str]) -> Iterator[Holding]:
        image = self.image
        shared, writes = image.readonly or image.shared, not image.readonly
        if image.pool:
            name = f"volume {image.volume} of pool {image.pool}"
            yield Holding(Kind.VOLUME, (image.pool, image.volume), self.key, name, shared, writes)
        else:
            yield Holding(Kind.FILE, (image.path,), self.key, image.path, shared, writes)


class Cdrom(Device, frozen=True, kw_only=True):
    """A CD-ROM drive of a `model` of QEMU's, which may also be a disk, with an ISO image in it or `path` None."""

    path: str | None
    model: str = "ide-cd"
    boot: int = 0

    def arguments(self) -> list[str]:
        name = f"cd{self.number}"
        drive = f",drive={name}" if self.path is not None else ""
        device = f"{self.model}{drive},id=cdrom{self.number}{order(self.boot)}{self.address}"
        if self.path is None:
            return ["-device", device]
        file, common = f"cdfile{self.number}", {"read-only": True}
        medium = [
            nodes.file(self.path, **{"node-name": file}, **common),
            nodes.over("raw", file, None, **{"node-name": name}, **common),
        ]
        return [*_blockdevs(medium), "-device", device]

    def files(self) -> Iterator[File]:
        if self.path is not None:
            yield File(self.path, writes=False)

    def holdings(self, _bridge_of: Callable[[str], str]) -> Iterator[Holding]:
        if self.path is not None:
            yield Holding(Kind.FILE, (self.path,), self.key, self.path, shared=True)


def _iothread(name: str) -> tuple[list[str], str]:
    """A thread for the I/O of one device: what makes it, and what gives it to the device."""
    return ["-object", f"iothread,id=iothread-{name}"], f",iothread=iothread-{name}"


def _blockdevs(found: list[nodes.Node]) -> list[str]:
    return [word for node in found for word in ("-blockdev", nodes.text(node))]
