# SPDX-License-Identifier: LGPL-2.1-or-later
"""The images that a guest opens: its disks, by path or by pool and volume, and what these stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors
from ...model.domain import Format
from .. import nodes
from . import host as hostinfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...model import domain as model
    from ..peers import Peers


class Image(msgspec.Struct, frozen=True):
    """One disk's file. `backing`: what a qcow2 volume stands on, the nearest first, each with its format."""

    path: str
    format: Format = Format.RAW
    readonly: bool = False
    backing: tuple[tuple[str, Format], ...] = ()
    pool: str = ""
    volume: str = ""
    after: str = ""  # the unit of the mount that it is on

    @property
    def is_device(self) -> bool:
        return nodes.is_device(self.path)


def plain(domain: model.Domain) -> list[Image]:
    """The disks that are named by their paths."""
    return [
        Image(disk.path, disk.format or Format.RAW, disk.readonly) for disk in domain.disk if disk.path is not None
    ]


async def resolve(domain: model.Domain, source: str, peers: Peers, by: str) -> list[Image]:
    """All disks in their order; pools that they are in are started. Raises a VirtdError that names the key."""
    found = []
    for index, disk in enumerate(domain.disk):
        if disk.path is not None:
            found.append(Image(disk.path, disk.format or Format.RAW, disk.readonly))
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
        found.append(Image(path, known, disk.readonly, backing, disk.pool, disk.volume, after))
    return found


def require_free(images: list[Image], peers: Peers) -> None:
    """Raise Busy when a job has come between since `resolve`. Doesn't wait: the record follows in the same step."""
    for image in images:
        if image.pool:
            peers.volumes.require_for_guest(image.pool, image.volume, writes=not image.readonly)


def opened(domain: model.Domain, images: list[Image]) -> Iterator[tuple[str, bool]]:
    """Every image's path, and whether it is written."""
    for image in images:
        yield image.path, not image.readonly
        for path, _format in image.backing:
            yield path, False
    for cdrom in domain.cdrom:
        if cdrom.path is not None:
            yield cdrom.path, False


def identified(domain: model.Domain, images: list[Image]) -> dict[tuple[int, int], tuple[str, bool]]:
    """The same by identity, so that two names of one file are one; what is opened twice is written if one does."""
    found: dict[tuple[int, int], tuple[str, bool]] = {}
    for path, writes in opened(domain, images):
        if (identity := hostinfo.identity(path)) is not None:
            found[identity] = (path, writes or found.get(identity, ("", False))[1])
    return found


def recorded(uses: dict[tuple[int, int], tuple[str, bool]]) -> list[list[Any]]:
    """As a guest's record has them."""
    return [[path, *identity, writes] for identity, (path, writes) in uses.items()]


def taken(data: dict[str, Any], domain: model.Domain | None) -> dict[tuple[int, int], tuple[str, bool]]:
    """What a guest has open, by its record's data; an older virtd's has no list, and its definition tells."""
    rows = data.get("images")
    if isinstance(rows, list):
        return {(int(dev), int(ino)): (str(path), bool(writes)) for path, dev, ino, writes in rows}
    return identified(domain, plain(domain)) if domain is not None else {}
