# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each type of pool implements, and the words for what is in it.

Every volume is made in three steps:

    begin     space of the right size, under a name that no listing shows
    (filled)  by qemu-img, the copying program, a client, or not at all
    commit    it gets its name in one step     or     discard   it is removed

`sweep` removes what a crash left in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from ... import errors
from ...model.drives import Format

if TYPE_CHECKING:
    from collections.abc import Collection

    from ...model.pool import Pool
    from ..qcow2 import Header


class Capacity(msgspec.Struct, frozen=True):
    """Bytes; of a file system, `available` excludes what is reserved for root."""

    capacity: int = 0
    allocation: int = 0
    available: int = 0


class Backing(msgspec.Struct, frozen=True):
    """The volume that another one is based on."""

    pool: str
    volume: str
    format: Format


class Meta(msgspec.Struct, frozen=True):
    """What virtd has on record about a volume, which the volume itself can't be trusted to say.

    `format` is None until somebody says. `job`: which one made it, so that a repeated commit is recognised.
    `damaged`: why it must not be used.
    """

    format: Format | None = None
    backing: Backing | None = None
    job: str = ""
    token: str = ""
    damaged: str = ""


class Volume(msgspec.Struct, frozen=True):
    """A volume as a listing shows it. `capacity`: what a guest sees, None if that isn't known."""

    name: str
    path: str
    meta: Meta
    capacity: int | None
    allocation: int
    identity: tuple[int, int]  # device and inode, which stay the same whatever the file is called
    trouble: str = ""


class Backend(Protocol):
    """One pool. Every method may take its time and raises a VirtdError."""

    pool: Pool
    files: bool  # whether its volumes are files, which may have any format and grow as they are written

    @property
    def mount(self) -> str:
        """The pool's mount unit, or ""."""

    async def build(self) -> bool:
        """Make the directory that the pool is in; False if it exists. Raises InvalidState if only a person can."""

    async def start(self) -> None:
        """Make the pool usable. Idempotent; a failure leaves everything as it was."""

    async def stop(self) -> None:
        """Undo `start`. Idempotent."""

    async def lost(self) -> str:
        """Why a pool that was started isn't usable any more, or ""."""

    async def capacity(self) -> Capacity:
        """Its size, and how much of it is used."""

    async def volumes(self) -> dict[str, Volume]:
        """All complete volumes, by name."""

    async def volume(self, name: str) -> Volume:
        """Raises NotFound."""

    async def begin(self, job: str, name: str, size: int | None, *, allocate: bool = False) -> str:
        """Make the unfinished volume: its path. `size` None: it grows as it is written."""

    def begun(self, job: str, name: str) -> str:
        """The path of the unfinished volume."""

    async def free(self, name: str) -> None:
        """Raises Exists if the name is taken."""

    async def reflink(self, source: Volume, job: str) -> bool:
        """Have the unfinished volume share the blocks of a file; False if that isn't possible."""

    async def header(self, volume: Volume) -> Header:
        """A qcow2 volume's own header. Raises InvalidState."""

    async def commit(self, job: str, name: str, meta: Meta) -> None:
        """Make the filled one volume `name`. Raises Exists. Safe to repeat after a crash."""

    async def discard(self, job: str, name: str) -> None:
        """Remove an unfinished one. Idempotent."""

    async def stale(self, jobs: Collection[str]) -> list[str]:
        """The unfinished volumes that belong to none of `jobs`, and records without a volume."""

    async def sweep(self, jobs: Collection[str]) -> list[str]:
        """Remove what `stale` lists: what was removed."""

    async def grow(self, volume: Volume, size: int) -> None:
        """Change the size of a raw volume, up or down."""

    async def lend(self, volume: Volume) -> None:
        """Let the guests' user write to the volume, for a job."""

    async def take(self, name: str) -> None:
        """Make root the volume's owner. Idempotent."""

    async def describe(self, name: str, meta: Meta) -> None:
        """Write the record of volume `name`."""

    async def delete(self, volume: Volume) -> None:
        """Idempotent."""


def not_built(pool: Pool) -> errors.InvalidState:
    """What `build` raises where there is no directory to make."""
    return errors.InvalidState(
        f"Pool {pool.name} is a {pool.type} pool: there is no directory to make",
        hint="A file system is made with mkfs, a volume group with vgcreate.",
    )
