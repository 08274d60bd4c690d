# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all kinds of devices have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ....objects.conflicts import Holding


class File(NamedTuple):
    """A file that QEMU opens for a device, and whether the guest writes to it."""

    path: str
    writes: bool


class Device(msgspec.Struct, frozen=True):
    """One device of one guest.

    `number` distinguishes it from others of its kind, also in QEMU's names, and stays the same as long as it is in
    the definition; `key` is its present place there, such as "disk[0]", or "" for what every guest has. `address` is
    its place on the guest's bus, as -device takes it after a comma; "" leaves it to QEMU.
    """

    number: int = 0
    key: str = ""
    address: str = ""

    def arguments(self) -> list[str]:
        """QEMU's arguments for it."""
        raise NotImplementedError

    def files(self) -> Iterator[File]:
        """Its files: the sandbox shows them, the guest's user is given access, and others may not change them."""
        yield from ()

    def host_devices(self) -> Iterator[str]:
        """What it opens in /dev."""
        yield from ()

    def after(self) -> Iterator[str]:
        """Units that have to outlive the guest's."""
        yield from ()

    def holdings(self, _bridge_of: Callable[[str], str]) -> Iterator[Holding]:
        """What it needs for itself alone."""
        yield from ()

    @property
    def uses_ip(self) -> bool:
        """Whether QEMU itself uses the host's IP network for it."""
        return False


def escape(text: str) -> str:
    """A value inside a QemuOpts list: a comma is doubled (qemu(1), "Device option syntax")."""
    return text.replace(",", ",,")


def order(turn: int) -> str:
    """A place in the boot order, as -device takes it after a comma; 0: none."""
    return f",bootindex={turn}" if turn else ""
