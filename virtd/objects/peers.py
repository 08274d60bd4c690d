# SPDX-License-Identifier: LGPL-2.1-or-later
"""What drivers ask of each other: of networks for who is in them, of pools for whose disks are in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..model.domain import Format


class Connection(NamedTuple):
    """An interface in a network; `mtu` is its bridge's, in bytes."""

    network: str
    interface: str
    bridge: str
    mtu: int


class Disk(NamedTuple):
    """A volume for a guest: what it stands on, the nearest first, and the mount unit that it is on, or ""."""

    path: str
    format: Format
    backing: tuple[tuple[str, Format], ...]
    after: str


class Networks(Protocol):
    """Networks, as those see them whose guests are in them."""

    def bridge_of(self, network: str) -> str:
        """The name of its bridge, "" where it has none. Raises NotFound."""

    async def attach(
        self, network: str, *, user: str, interface: str, mac: str, uid: int, trusted: bool = False
    ) -> Connection:
        """Make a tap in `network` for processes of `uid`; the network is started if it isn't active.

        `user` is the tap's owner, as "qemu/web1": seen in the network's Info, and the reason why the network isn't
        stopped. `interface` is the tap's name, at most 15 characters and the caller's to choose and to put on record
        before this is called; `detach` removes it, whatever became of it. The guest may send as `mac` only, unless it
        is `trusted`. Raises a VirtdError, with no tap left.
        """

    async def reserve(
        self, network: str, *, user: str, interface: str, mac: str, trusted: bool = False
    ) -> Connection:
        """For whoever makes the interface in one go with its place in the bridge (lxc.net.0.link): rules are there
        before it is.

        Call `add_port` afterwards: an interface without our alias counts as a stranger's.
        """

    async def add_port(self, network: str, *, user: str, interface: str) -> Connection:
        """Put an interface that is there, and was reserved, into the network: the host's end of a veth, say."""

    async def detach(self, interface: str) -> bool:
        """Delete an interface that `attach` made, and forget one that was reserved; False when it isn't there."""

    async def sweep(self, driver: str, alive: set[str]) -> list[str]:
        """Delete the interfaces of a driver's objects that aren't `alive`, which a crash may have left."""

    def addresses_of(self, network: str, mac: str) -> list[str]:
        """The addresses that DHCP gave to this MAC."""


class WithInterfaces(Protocol):
    """What others know of the network driver."""

    @property
    def interfaces(self) -> Networks: ...


class Volumes(Protocol):
    """The driver of pools."""

    async def for_guest(self, pool_name: str, name: str, *, writes: bool, by: str) -> Disk:
        """A volume that a guest is to have, its pool started if need be. Raises NotFound, or why it can't be had."""

    async def require_unused(self, pool_name: str, name: str) -> Callable[[], None]:
        """Raise Busy when anybody uses it, reading or writing; what asks again, without waiting for anything."""

    def require_for_guest(self, pool: str, name: str, *, writes: bool) -> None:
        """Raise Busy while a job works on it."""


class Peers(Protocol):
    """The drivers. One that others ask for is made then."""

    @property
    def networks(self) -> Networks: ...
    @property
    def volumes(self) -> Volumes: ...
    def __iter__(self) -> Iterator[object]:
        """Those that are in use. What may be asked of each: see protocol.Using and conflicts.Holder."""
