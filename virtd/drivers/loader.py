# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drivers, each imported only if there is something for it.

A host without containers needn't wait at every start for the modules that know about them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from ..paths import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..children.child import Services
    from ..model.settings import Settings
    from ..objects.peers import Networks, Volumes, WithInterfaces
    from ..objects.protocol import Driver, Factory, Publish

# Name -> module, in the order of restoring and autostarting: dependencies come first.
MODULES: dict[str, str] = {
    "network": "virtd.drivers.network.driver",
    "storage": "virtd.drivers.storage.driver",
    "qemu": "virtd.drivers.qemu.driver",
    "lxc": "virtd.drivers.lxc.driver",
}
CREATING = ".creating"  # the suffix of marks in /run/virtd/NAME for what is being made and isn't defined yet


class Drivers:
    """The drivers in use, by name.

    `publisher(name)` makes the function by which a driver publishes its events; `wake(driver)` restores and
    reconciles one that had nothing to do when the daemon started.
    """

    def __init__(
        self,
        services: Services,
        settings: Settings,
        publisher: Callable[[str], Publish],
        wake: Callable[[Driver], None],
    ) -> None:
        self._services = services
        self._settings = settings
        self._publisher = publisher
        self._wake = wake
        self._made: dict[str, Driver] = {}

    def __iter__(self) -> Iterator[Driver]:
        """Those in use, in the order of MODULES."""
        return iter([self._made[name] for name in MODULES if name in self._made])

    def __contains__(self, name: str) -> bool:
        return name in self._made

    # For the drivers themselves: see Peers

    @property
    def networks(self) -> Networks:
        return cast("WithInterfaces", self.use("network")).interfaces

    @property
    def volumes(self) -> Volumes:
        return cast("Volumes", self.use("storage"))

    def use(self, name: str) -> Driver:
        """The driver `name`, for an operation. One that had nothing to do so far is made and woken."""
        if name not in self._made:
            self._wake(self.get(name))
        return self.get(name)

    def get(self, name: str) -> Driver:
        """The driver `name`, made if need be; only `Host` makes one that it restores and reconciles itself."""
        if name not in self._made:
            make: Factory = importlib.import_module(MODULES[name]).make
            self._made[name] = make(self._services, self._settings, self._publisher(name), self)
        return self._made[name]

    def wanted(self) -> list[str]:
        """The drivers that have definitions, records or slots but aren't in use yet."""
        paths = self._services.paths
        held = {slot.partition("/")[0] for slot in self._services.store.names()}
        return [
            name
            for name in MODULES
            if name not in self._made
            and (name in held or _something(f"{paths.etc}/{name}", ".toml") or _unfinished(f"{paths.run}/{name}"))
        ]


def _unfinished(run: str) -> bool:
    """Whether there are records, or marks of objects that were being made."""
    return _something(run, ".json") or _something(run, CREATING)


def _something(directory: str, suffix: str) -> bool:
    """Whether the directory has such files, or something is wrong with it, which the driver will report."""
    return any(listing(directory, suffix))
