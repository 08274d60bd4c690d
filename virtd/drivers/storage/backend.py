# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kind of pool has to do, and the words for what is in it. The next kinds (iSCSI, RBD, ZFS) implement Backend.

A volume comes about in three steps, whatever it is made of and by whom:

    begin     something of the right size under a name that no listing shows
    (filled)  by qemu-img, by the copying program, by a client, or by nobody
    commit    it gets its name, all at once     or     discard   it goes away

`sweep` removes what a crash left between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from ... import errors
from ...model.domain import Format

if TYPE_CHECKING:
    from collections.abc import Collection

    from ...model.pool import Pool
    from ..qcow2 import Header


class Capacity(msgspec.Struct, frozen=True):
    """Bytes; of a file system, `available` is what one who isn't root may use."""

    capacity: int = 0
    allocation: int = 0
    available: int = 0


class Backing(msgspec.Struct, frozen=True):
    """The volume that another one stands on."""

    pool: str
    volume: str
    format: Format


class Meta(msgspec.Struct, frozen=True):
    """What virtd has on record of a volume, which the volume itself can't be trusted to say.

    `format` None: nobody has told. `job`: what made it, so that a repeated commit is known. `damaged`: why it must
    not be used.
    """

    format: Format | None = None
    backing: Backing | None = None
    job: str = ""
    token: str = ""
    damaged: str = ""


class Volume(msgspec.Struct, frozen=True):
    """A volume as a listing has it. `capacity`: what a guest sees, None when that can't be known."""

    name: str
    path: str
    meta: Meta
    capacity: int | None
    allocation: int
    identity: tuple[int, int]  # device and inode: what the file is, whatever it is called
    trouble: str = ""


class Backend(Protocol):
    """One pool. Every method may take its time and raises a VirtdError."""

    pool: Pool
    files: bool  # whether its volumes are files: of any format, and growing as they are written

    @property
    def mount(self) -> str:
        """The mount unit that a pool has which is a file system, or ""."""

    async def build(self) -> bool:
        """Make what the pool is in; False if it is there. Raises InvalidState when only a person can."""

    async def start(self) -> None:
        """Make the pool usable. Idempotent; whatever fails leaves it was."""

    async def stop(self) -> None:
        """Idempotent."""

    async def lost(self) -> str:
        """Why a pool that was started isn't usable any more; "" when it is."""

    async def capacity(self) -> Capacity:
        """How much there is."""

    async def volumes(self) -> dict[str, Volume]:
        """All volumes, whole ones only, by name."""

    async def volume(self, name: str) -> Volume:
        """Raises NotFound."""

    async def begin(self, job: str, name: str, size: int | None, *, allocate: bool = False) -> str:
        """Make what `commit` will turn into the volume: its path. `size` None: it will grow as it is written."""

    def begun(self, job: str, name: str) -> str:
        """The path of what was begun."""

    async def free(self, name: str) -> None:
        """Raises Exists when the name is taken."""

    async def reflink(self, source: Volume, job: str) -> bool:
        """Have the begun volume share the blocks of a file; False where that can't be."""

    async def header(self, volume: Volume) -> Header:
        """What a qcow2 volume says of itself. Raises InvalidState."""

    async def commit(self, job: str, name: str, meta: Meta) -> None:
        """Make a finished one the volume `name`. Raises Exists. Safe to repeat after a crash."""

    async def discard(self, job: str, name: str) -> None:
        """Remove an unfinished one. Idempotent."""

    async def stale(self, jobs: Collection[str]) -> list[str]:
        """What isn't of one of these `jobs` and isn't a volume."""

    async def sweep(self, jobs: Collection[str]) -> list[str]:
        """Remove what `stale` tells of; what was removed."""

    async def grow(self, volume: Volume, size: int) -> None:
        """Change the size of a raw volume, to a smaller one too."""

    async def lend(self, volume: Volume) -> None:
        """Let the guests' user write it, for a job."""

    async def take(self, name: str) -> None:
        """Make it root's again, or for the first time. Idempotent."""

    async def describe(self, name: str, meta: Meta) -> None:
        """Put on record what the volume `name` is."""

    async def delete(self, volume: Volume) -> None:
        """Idempotent."""


def not_built(pool: Pool) -> errors.InvalidState:
    """What `build` raises where there is nothing for it."""
    return errors.InvalidState(
        f"Pool {pool.name} is a {pool.type} pool: there is no directory to make",
        hint="A file system is made with mkfs, a volume group with vgcreate.",
    )
