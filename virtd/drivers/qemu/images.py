# SPDX-License-Identifier: LGPL-2.1-or-later
"""The images that a guest opens: its disks, by path or by pool and volume, and their backing files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...model.drives import Format
from .. import nodes

if TYPE_CHECKING:
    from ...model import domain as model
    from ...objects.peers import Peers


class Image(msgspec.Struct, frozen=True):
    """One disk's file. `backing`: the backing files of a qcow2 volume, the nearest first, each with its format."""

    path: str
    format: Format = Format.RAW
    readonly: bool = False
    backing: tuple[tuple[str, Format], ...] = ()
    pool: str = ""
    volume: str = ""
    after: str = ""  # the unit of the mount that it is on
    shared: bool = False  # among guests that write to it

    @property
    def is_device(self) -> bool:
        return nodes.is_device(self.path)


def plain(domain: model.Domain) -> list[Image]:
    """The disks as in the definition: for a volume of a pool it isn't known yet where it is."""
    return [
        Image(
            disk.path or "",
            disk.format or Format.RAW,
            disk.readonly,
            pool=disk.pool or "",
            volume=disk.volume or "",
            shared=disk.shared,
        )
        for disk in domain.disk
    ]


async def resolve(domain: model.Domain, source: str, peers: Peers, by: str) -> list[Image]:
    """All disks in their order, after starting the pools that they are in. Raises a VirtdError that names the key."""
    found = []
    for index, disk in enumerate(domain.disk):
        if disk.path is not None:
            found.append(Image(disk.path, disk.format or Format.RAW, disk.readonly, shared=disk.shared))
            continue
        assert disk.pool is not None
        assert disk.volume is not None
        volumes = peers.volumes
        try:
            path, known, backing, after = await volumes.for_guest(
                disk.pool, disk.volume, writes=not disk.readonly, by=by
            )
        except errors.NotFound as exc:
            raise errors.InvalidDefinition(source, f"disk[{index}]", exc.message, hint=exc.hint) from exc
        if disk.format is not None and disk.format is not known:
            raise errors.InvalidDefinition(
                source, f"disk[{index}].format", f'expected "{known}", which volume {disk.volume} is, or nothing'
            )
        if disk.shared and known is not Format.RAW:
            raise errors.InvalidDefinition(
                source,
                f"disk[{index}].shared",
                f'expected a volume that is "raw" with it, and {disk.volume} is "{known}"',
            )
        found.append(Image(path, known, disk.readonly, backing, disk.pool, disk.volume, after, disk.shared))
    return found


def require_free(images: list[Image], peers: Peers) -> None:
    """Raise Busy if a job uses one since `resolve`. It doesn't wait, so that nothing comes before the record."""
    for image in images:
        if image.pool:
            peers.volumes.require_for_guest(image.pool, image.volume, writes=not image.readonly)
