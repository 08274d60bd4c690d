# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every device is asked, whatever its kind."""

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

    `number` tells it from others of its kind, in QEMU's names for it too, and stays its own for as long as it is
    in the definition; `key` is where the definition has it now, such as "disk[0]", or "" for what comes with every
    guest. `address` is its place on the guest's bus, as -device takes it after a comma; "" leaves it to QEMU.
    """

    number: int = 0
    key: str = ""
    address: str = ""

    def arguments(self) -> list[str]:
        """QEMU's arguments for it."""
        raise NotImplementedError

    def files(self) -> Iterator[File]:
        """The files that it needs: what the sandbox shows, the guest's user is given, and others may not change."""
        yield from ()

    def host_devices(self) -> Iterator[str]:
        """What it opens in /dev."""
        yield from ()

    def after(self) -> Iterator[str]:
        """Units that have to outlive the guest's."""
        yield from ()

    def holdings(self, _bridge_of: Callable[[str], str]) -> Iterator[Holding]:
        """What its definition wants for itself alone."""
        yield from ()

    @property
    def uses_ip(self) -> bool:
        """Whether QEMU itself speaks IP for it, in the host's name."""
        return False


def escape(text: str) -> str:
    """A value inside a QemuOpts list: a comma is doubled (qemu(1), "Device option syntax")."""
    return text.replace(",", ",,")
