# SPDX-License-Identifier: LGPL-2.1-or-later
"""What drivers ask of each other: guests need interfaces in networks, and volumes of pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..model.drives import Format


class Connection(NamedTuple):
    """An interface in a network; `mtu` is its bridge's, in bytes."""

    network: str
    interface: str
    bridge: str
    mtu: int


class Disk(NamedTuple):
    """A volume for a guest: its backing files, the nearest first, and the mount unit that it is on, or ""."""

    path: str
    format: Format
    backing: tuple[tuple[str, Format], ...]
    after: str


class Networks(Protocol):
    """Networks, as the drivers of guests in them see them."""

    def bridge_of(self, network: str) -> str:
        """The name of its bridge, or "" if it has none. Raises NotFound."""

    async def attach(
        self, network: str, *, user: str, interface: str, mac: str, uid: int, trusted: bool = False
    ) -> Connection:
        """Make a tap in `network` for processes of `uid`; the network is started if it isn't active.

        `user` is the tap's owner, as "qemu/web1": seen in the network's Info, and the reason why the network isn't
        stopped. `interface` is the tap's name, at most 15 characters, which the caller chooses and puts on record
        before the call, so that `detach` can remove it in any case. The guest may send from `mac` only, unless it is
        `trusted`. Raises a VirtdError, with no tap left.
        """

    async def reserve(
        self, network: str, *, user: str, interface: str, mac: str, trusted: bool = False
    ) -> Connection:
        """Prepare for an interface that somebody else makes inside the bridge (lxc.net.0.link): its rules come first.

        Call `add_port` afterwards, because an interface without our alias counts as foreign.
        """

    async def add_port(self, network: str, *, user: str, interface: str) -> Connection:
        """Put a reserved interface that exists by now, such as the host's end of a veth pair, into the network."""

    async def detach(self, interface: str) -> bool:
        """Delete an interface that `attach` made, or forget a reserved one; False if there is none."""

    async def sweep(self, driver: str, alive: set[str]) -> list[str]:
        """Delete interfaces left by a crash: those of objects of a driver that aren't `alive`."""

    def addresses_of(self, network: str, mac: str) -> list[str]:
        """The addresses that DHCP gave to this MAC."""


class WithInterfaces(Protocol):
    """The network driver, as others see it."""

    @property
    def interfaces(self) -> Networks: ...


class Volumes(Protocol):
    """The driver of pools."""

    async def for_guest(self, pool_name: str, name: str, *, writes: bool, by: str) -> Disk:
        """A volume for a guest; its pool is started if need be. Raises NotFound, or why it can't be used."""

    async def require_unused(self, pool_name: str, name: str) -> Callable[[], None]:
        """Raise Busy if anybody reads or writes it. Calling the result checks again, without waiting for anything."""

    def require_for_guest(self, pool: str, name: str, *, writes: bool) -> None:
        """Raise Busy while a job works on it."""


class Peers(Protocol):
    """The drivers. One that isn't in use yet is made on demand."""

    @property
    def networks(self) -> Networks: ...
    @property
    def volumes(self) -> Volumes: ...
    def __iter__(self) -> Iterator[object]:
        """Those in use, some of which are protocol.Using or conflicts.Holder."""
