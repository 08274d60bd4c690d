# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares the kernel's state of networks with what virtd made, and restores it; used by start, info, fsck and
upkeep.

Firewall rules are compared by their marks (rules.py), policy routing rules as a whole (isolation.py). All of this
blocks: call it in a thread.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from . import bridgedrift, portdrift, routedrift, routes
from .drift import Drift, Seen
from .kernel import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .ports import Ground

MOST_ROUTES = 500  # maximum looked through each time; some hosts have a million
PASSES = 4  # one repair may depend on another: an IPv6 address on a setting, a route on an address


class Compared(NamedTuple):
    """The differences of each network, and the interfaces looked at, by index."""

    drifts: list[list[Drift]]
    numbers: dict[int, str]


class Mended(NamedTuple):
    """What was restored, and what couldn't be, with the reason in its text."""

    done: list[Drift]
    left: list[Drift]


def names(grounds: Iterable[Ground]) -> set[str]:
    """The names of the interfaces that networks consist of."""
    found = set()
    for ground in grounds:
        found.add(ground.network.bridge_name)
        found.update(port.interface for port in ground.ports)
    return found


def look(kernel: Kernel, interfaces: set[str]) -> Seen:
    """Read what the kernel has of these interfaces. Raises OSError."""
    found = kernel.links(interfaces)
    indexes = {link.number: name for name, link in found.items()}
    there = routes.routes(MOST_ROUTES)
    return Seen(found, kernel.all_addresses(indexes), kernel.neighbours_of_ports(indexes), there)


def compare(grounds: list[Ground]) -> Compared:
    """The differences of all these networks, from a single reading of the kernel's state. Raises HostError."""
    try:
        with Kernel() as kernel:
            seen = look(kernel, names(grounds))
            drifts = [differences(kernel, ground, seen) for ground in grounds]
            return Compared(drifts, {link.number: name for name, link in seen.links.items()})
    except OSError as exc:
        raise errors.HostError(f"Cannot ask the kernel about interfaces: {exc.strerror}") from exc


def put_back(ground: Ground, spared: frozenset[str] = frozenset()) -> Mended:
    """Repair differences, except the keys in `spared`. Raises HostError."""
    done: dict[str, Drift] = {}
    failed: dict[str, str] = {}
    over = set(spared)  # keys not to be tried (again)
    try:
        with Kernel() as kernel:
            for again in range(PASSES + 1):
                found = differences(kernel, ground, look(kernel, names([ground])))
                todo = [(one, one.mend) for one in found if one.mend is not None and one.key not in over]
                if not todo or again == PASSES:
                    break
                for one, mend in todo:
                    try:
                        mend(kernel)
                        done.setdefault(one.key, one)
                        failed.pop(one.key, None)
                    except (errors.HostError, OSError) as exc:
                        cause = exc.__cause__ if isinstance(exc, errors.HostError) else exc
                        failed[one.key] = (isinstance(cause, OSError) and cause.strerror) or str(exc)
                        # The thing compared may have vanished since, and something else may have taken its name.
                        if not (isinstance(cause, OSError) and cause.errno in (errno.ENODEV, errno.ENOENT)):
                            over.add(one.key)
    except OSError as exc:
        raise errors.HostError(f"Cannot look after {ground.network.bridge_name}: {exc.strerror}") from exc
    left = [one._replace(text=f"{one.text} ({failed[one.key]})" if one.key in failed else one.text) for one in found]
    still = {one.key for one in left}
    return Mended([one for key, one in done.items() if key not in still], left)


def differences(kernel: Kernel, ground: Ground, seen: Seen) -> list[Drift]:
    """The differences of a network; without those of its ports while the bridge is missing."""
    network = ground.network
    name = network.bridge_name
    link = seen.links.get(name)
    if link is None or link.kind != "bridge":
        return [bridgedrift.no_bridge(ground, link)]
    if network.own:
        if ground.mac != link.mac and link.alias != bridgedrift.alias_of(network):
            return [bridgedrift.no_bridge(ground, link)]
        found = [
            *bridgedrift.settings(ground, link),
            *bridgedrift.addresses(ground, seen),
            *bridgedrift.forwarding(network),
        ]
        if not found and not link.master:
            found += routedrift.differences(kernel, ground, seen.routes)
    else:
        found = []
        if not link.up:
            hint = f"It is the host's: ip link set {name} up."
            found.append(Drift(f"{name} up", f"{name}: the host's bridge is down", None, hint, vital=False))
    for port in ground.ports:
        found += portdrift.differences(ground, port, link, seen)
    return found
