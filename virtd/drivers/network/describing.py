# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network as the front ends show it. Bridge, users and leases are read afresh each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ...replies import Trouble
from ...replies import networks as replies
from . import ethernet, firewall, links
from .netrecord import DRIVER

if TYPE_CHECKING:
    from .net import Net


def short(net: Net) -> replies.Network:
    """The short form, for List."""
    network = net.running or net.definition
    record = net.record
    return replies.Network(
        name=net.name,
        driver=DRIVER,
        uuid=net.uuid,
        state=net.state.value,
        reason=net.reason,
        pid=net.server.pid,
        since=record.since if record is not None else None,
        autostart=bool(net.definition and net.definition.autostart),
        waits=net.waits is not None,
        mode=network.mode.value if network is not None else None,
        bridge=net.bridge_name or None,
        ipv4=network.ipv4.address if network is not None and network.ipv4 is not None else None,
        ipv6=network.ipv6.address if network is not None and network.ipv6 is not None else None,
    )


def long(net: Net, slots: list[str], log: str) -> replies.NetworkInfo:
    """The long form, for Info."""
    network = net.running or net.definition
    given = [network.range4, network.range6] if network is not None and network.own else []
    return replies.NetworkInfo(
        **msgspec.structs.asdict(short(net)),
        unit=net.unit if network is not None and network.serves else None,
        slots=slots,
        domain=network.domain if network is not None else None,
        mtu=links.mtu(net.bridge_name) if net.active and net.bridge_name else None,
        ranges=[f"{found[0]} - {found[1]}" for found in given if found is not None],
        users=net.users(),
        ports=_ports(net),
        leases=len(net.leases()),
        forwards=[
            f"{forward.protocol} {forward.port} to {forward.to} port {forward.to_port or forward.port}"
            for forward in (network.forward if network is not None else ())
        ],
        persistent=net.definition is not None,
        pending=net.pending,
        definition_path=net.source if net.definition is not None else None,
        log=log if network is not None and network.serves else None,
        problems=[Trouble(text=problem.text, hint=str(problem.hint)) for problem in net.problems.values()],
    )


def _ports(net: Net) -> list[replies.Port]:
    """Guests' interfaces, the addresses assigned to them, and how many of their frames were refused."""
    network = net.running
    if network is None:
        return []
    refused = firewall.refused(net.name) if net.ports else {}
    return [
        replies.Port(
            interface=port.interface,
            user=port.user,
            mac=port.mac,
            trusted=port.trusted,
            ipv4=ethernet.addresses4(network, port),
            refused=refused.get(port.interface, 0),
        )
        for port in sorted(net.ports, key=lambda port: port.interface)
    ]
