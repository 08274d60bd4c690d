# SPDX-License-Identifier: LGPL-2.1-or-later
"""Network cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....objects import conflicts
from .device import Device, escape, order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ....objects.conflicts import Holding


class Nic(Device, frozen=True, kw_only=True):
    """A virtio-net card: in a `network` of virtd's, at interface `tap`, or behind QEMU's own NAT.

    `mac` is "" as long as the guest has no uuid. `boot` is its place in the boot order; 0: it isn't booted from.
    """

    mac: str
    network: str | None = None
    tap: str | None = None
    vhost: bool = False
    boot: int = 0

    def arguments(self) -> list[str]:
        backend = "user"
        if self.tap is not None:
            # It exists already, and the guest's user may open it: QEMU needs neither privileges nor scripts.
            vhost = ",vhost=on" if self.vhost else ""
            backend = f"tap,ifname={escape(self.tap)},script=no,downscript=no{vhost}"
        net = f"net{self.number}"
        # An option ROM costs the firmware a tenth of a second, and only a BIOS that boots from the network needs it.
        boot = order(self.boot) or ",romfile="
        card = f"virtio-net-pci,netdev={net},id=nic{self.number},mac={self.mac}{boot}{self.address}"
        return ["-netdev", f"{backend},id={net}", "-device", card]

    def holdings(self, bridge_of: Callable[[str], str]) -> Iterator[Holding]:
        if self.network is not None and self.mac:
            yield conflicts.mac(bridge_of(self.network), self.mac, self.key, self.network)

    @property
    def uses_ip(self) -> bool:
        return self.network is None
