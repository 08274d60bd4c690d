# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's definition and record: all that its pieces need to know about it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import errors
from ...model import network as model
from ...model import networkchecks
from ...model.state import Activity
from ...objects import definitions
from ...objects.persistent import Persistent
from ...objects.turns import Turns
from ...systemd.names import unit_name
from . import bridge, leases, links
from . import ports as ports_

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from ...children.child import Services
    from ...model.settings import Dnsmasq
    from ...objects.peers import Peers
    from ...objects.persistent import Named
    from ...records import Records
    from .holdings import Owner
    from .isolation import Isolation
    from .ports import Port

DRIVER = "network"
ON = (Activity.STARTING, Activity.ACTIVE, Activity.STOPPING)


class Shared(NamedTuple):
    """What all the driver's networks share. `publish(event, net)`: the event is "changed"."""

    services: Services
    records: Records
    settings: Dnsmasq
    publish: Callable[[str, Named], None]
    boot_id: str
    isolation: Isolation
    peers: Peers
    nets: Mapping[str, Owner]


class NetRecord(Persistent):
    """A network without its pieces; see net.Net."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__(name)
        self.shared: Shared = shared
        self.definition: model.Network | None = None
        self.definition_text = ""
        self.settled = asyncio.Event()  # cleared until it is known whether the network is complete
        self.settled.set()
        self._turns = Turns(name)

    @property
    def state(self) -> Activity:
        return Activity.of(self.record.state) if self.record is not None else Activity.INACTIVE

    @property
    def active(self) -> bool:
        return self.state in ON

    @property
    def mac(self) -> str:
        """The bridge's MAC; for an active network the one that it was made with."""
        kept = self.data.get("mac") if self.active else None
        return str(kept) if kept else bridge.mac_of(self.uuid)

    @property
    def unit(self) -> str:
        return unit_name(DRIVER, self.name)

    @property
    def runtime(self) -> str:
        return self.shared.services.paths.runtime(DRIVER, self.name)

    @property
    def state_directory(self) -> str:
        return f"{self.shared.services.paths.lib}/{DRIVER}/{self.name}"

    @property
    def source(self) -> str:
        """The definition's file."""
        return self.shared.services.paths.definition(DRIVER, self.name)

    @property
    def running(self) -> model.Network | None:
        """The definition in force; None while the network is inactive."""
        if not self.active or not (text := definitions.text_in_force(self.data)):
            return None
        if text == self.definition_text and self.definition is not None:
            return self.definition
        with contextlib.suppress(errors.InvalidDefinition):
            return self.parsed(text) or networkchecks.parse(text, self.source)
        return None

    @property
    def current(self) -> model.Network:
        """The definition in force, for callers who know that there is one. Raises Bug otherwise."""
        if (network := self.running) is None:
            raise errors.Bug(f"network {self.name} has no definition in force")
        return network

    def parsed(self, text: str) -> model.Network | None:
        """Parse `text`, a definition that was put in force; None unless this version of virtd did so."""
        return definitions.parsed(self.data, text, model.Network)

    @property
    def pending(self) -> bool:
        """Whether the definition differs from the one in force."""
        return self.active and self.data.get("definition") != self.definition_text

    @property
    def bridge_name(self) -> str:
        network = self.running or self.definition
        return network.bridge_name if network is not None else ""

    @property
    def ports(self) -> tuple[Port, ...]:
        """The connected guests, or those connected when the network was stopped."""
        return ports_.recorded(self.data)

    def in_force(self, network: model.Network, text: str) -> dict[str, Any]:
        # A daemon that can't read the definition any more must still be able to remove the bridge.
        return definitions.in_force(network, text) | {"bridge": network.bridge_name if network.own else ""}

    def still_connected(self) -> dict[str, Any]:
        """What the record of an inactive network keeps: its next start reconnects these guests."""
        return {"ports": kept} if (kept := self.data.get("ports")) else {}

    # What there is of it

    def leases(self) -> list[leases.Lease]:
        return leases.read(f"{self.state_directory}/leases")

    def users(self) -> list[str]:
        """The connected users: "qemu/web1" for guests that virtd connected, the interface's name for others."""
        network = self.running
        if network is None:
            return []
        ours = {port.interface: port.user for port in links.ports() if port.network == self.name}
        ours |= {port.interface: port.user for port in self.ports if links.exists(port.interface)}
        if not network.own:
            return sorted(set(ours.values()))
        members = [member for member in links.members(network.bridge_name) if not member.startswith(links.PROBE)]
        return sorted({ours.get(member, member) for member in members} | set(ours.values()))

    @property
    def has_bridge(self) -> bool:
        """Whether the bridge that virtd makes for this network exists."""
        network = self.definition
        return network is not None and network.own and bridge.is_ours(network.bridge_name, self.mac)

    def lost_bridge(self) -> str:
        """What is wrong with an active network's bridge; "" if nothing."""
        network = self.running
        if network is None or self.state is not Activity.ACTIVE:
            return ""
        name = network.bridge_name
        if not links.exists(name):
            return f"its bridge {name} is gone"
        if network.own and not bridge.is_ours(name, self.mac):
            return f"its bridge {name} was replaced by something that isn't virtd's"
        if network.own and not links.is_up(name):
            return f"its bridge {name} is down"
        return ""

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""
        return {"VIRTD_DRIVER": DRIVER, "VIRTD_NAME": self.name, "VIRTD_UUID": self.uuid, "VIRTD_UNIT": self.unit}

    def changed(self) -> None:
        self.shared.publish("changed", self)

    # One operation at a time

    def exclusive(self, what: str) -> AbstractAsyncContextManager[None]:
        """Run one operation at a time. Raises Busy when another takes too long."""
        return self._turns.take(what)

    @property
    def busy(self) -> bool:
        return self._turns.taken

    # The record

    def remember(self, **data: Any) -> None:
        """Change the driver's own part of the record."""
        self.save(data=self.data | data)

    def keep_data(self, **data: Any) -> None:
        """Like `remember`, for changes that happened by themselves: kept in memory even if they can't be written."""
        if self.record is not None:
            self.keep(data=self.data | data)
