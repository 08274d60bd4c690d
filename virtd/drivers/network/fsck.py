# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for networks: bridge, rules, dnsmasq with its files, unit and slots, and guests' interfaces.

As with guests, each apparent difference is checked again with the network's lock held. A repair remakes missing
pieces of an active network as a start would, and removes what an inactive one left behind.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, NamedTuple

from ... import errors, files, records
from ...objects import comparing
from ...objects.protocol import Difference
from ...paths import names as names_in
from . import bridge, dnsmasq, firewall, links
from .netrecord import DRIVER
from .serverfiles import content

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...model.network import Network
    from ...objects.inventory import Inventory
    from .net import Net

    Nets = Inventory[Net, Network]
    Detach = Callable[[str], Awaitable[object]]  # takes the name of a guest's interface


class There(NamedTuple):
    """What systemd and the kernel have. `bridges`: by network; `tables`: the names of networks that have one."""

    seen: comparing.Seen
    bridges: dict[str, str]
    tables: set[str]


async def compare(nets: Nets, detach: Detach, *, repair: bool) -> list[Difference]:
    """See protocol.Comparing."""
    await nets.certain()
    found = await comparing.loose_files(nets, repair=repair)
    there = await _look(nets)
    run = f"{nets.services.paths.run}/{DRIVER}"
    names = {*nets.objects, *there.bridges, *there.tables, *names_in(run, ".json")}
    names |= comparing.traces(nets.services, there.seen, DRIVER)
    names |= {name for name in names_in(run, "") if os.path.isdir(f"{run}/{name}")}
    for name in sorted(names):
        if await _findings(nets, name, there):
            found += await _examine(nets, name, repair=repair)
    return found + await _interfaces(nets, detach, repair=repair)


async def _look(nets: Nets) -> There:
    seen = await comparing.look(nets.services, DRIVER)
    bridges = {}
    for interface in links.all_names():
        words = links.read(interface, "ifalias").split(" ")
        if links.is_bridge(interface) and len(words) == 3 and words[:2] == ["virtd", "network"]:
            bridges[words[2]] = interface
    try:
        tables = set(await asyncio.to_thread(firewall.tables))
    except firewall.NftError:  # nothing can be said about tables, and the error was reported where they are needed
        tables = set()
    return There(seen, bridges, tables)


async def _examine(nets: Nets, name: str, *, repair: bool) -> list[Difference]:
    net = nets.objects.get(name)
    try:
        if net is None:
            return await _check(nets, name, repair=repair)
        async with net.exclusive("check"):
            return await _check(nets, name, repair=repair)
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]


async def _check(nets: Nets, name: str, *, repair: bool) -> list[Difference]:
    return await comparing.check(
        nets.services, name,
        look=lambda: _look(nets),
        findings=lambda there: _findings(nets, name, there),
        mend=lambda there: _mend(nets, name, there),
        repair=repair,
    )  # fmt: skip


async def _findings(nets: Nets, name: str, there: There) -> list[Difference]:
    """The present differences of one network."""
    net = nets.objects.get(name)
    path = nets.services.paths.record(DRIVER, name)
    found = comparing.record_differences(path, name, net.record if net is not None else None)
    if net is not None and net.active:
        return found + await _pieces(net, there.seen)
    return found + _leftovers(nets, name, there)


async def _pieces(net: Net, seen: comparing.Seen) -> list[Difference]:
    """What an active network lacks, or what differs from what virtd made."""
    network, name = net.running, net.name
    if network is None:
        return [Difference("definition", name, f"{name} is active with a definition that can't be read")]
    found = []
    for one in await net.standing.differences():
        how = "put it back" if one.mend is not None else ""
        found.append(Difference("bridge", name, f"{name} isn't as virtd made it: {one.text}", how))
    if await net.rules.lost(network):
        text = f"the rules in tables {firewall.table(name)} (inet, bridge) aren't those that virtd made"
        found.append(Difference("rules", name, text, "apply them again"))
    if not network.serves:
        return found
    child = net.server.child
    if child is None or not child.alive():
        found.append(Difference("process", name, f"dnsmasq of {name} doesn't run", "start it"))
    else:
        if name not in seen.units:
            found.append(Difference("unit", name, f"{net.unit} is gone, but its process runs (PID {child.pid})"))
        found += comparing.slot_differences(net.shared.services, child, seen)
    mine = net.server.files
    for file, text in (
        (mine.config, dnsmasq.config(network, mine)),
        (mine.hosts, dnsmasq.hosts(network, net.ports)),
        (mine.names, dnsmasq.names(network)),
    ):
        if content(file) != text:
            found.append(Difference("file", name, f"{file} isn't as virtd wrote it", "write it again"))
    return found


def _leftovers(nets: Nets, name: str, there: There) -> list[Difference]:
    """What exists of a network that is inactive or unknown."""
    found = []
    if unit := there.seen.units.get(name):
        found.append(Difference("unit", name, f"{unit.name} is there, and {name} isn't active", "stop it"))
    for slot in comparing.strays(nets.services, there.seen, f"{DRIVER}/{name}"):
        found.append(Difference("slot", name, f"slot {slot} is kept, and {name} isn't active", "drop it"))
    runtime = nets.services.paths.runtime(DRIVER, name)
    if os.path.lexists(runtime):
        found.append(Difference("directory", name, f"{runtime} is there, and {name} isn't active", "remove it"))
    if name in there.tables:
        text = f"a table {firewall.table(name)} is there, and {name} isn't active"
        found.append(Difference("rules", name, text, "remove it"))
    if interface := there.bridges.get(name):
        users = links.members(interface)
        text = f"bridge {interface} is there, and {name} isn't active"
        text += f"; in it are {', '.join(users)}" if users else ""
        found.append(Difference("bridge", name, text, "" if users else "remove it"))
    return found


async def _mend(nets: Nets, name: str, there: There) -> None:
    net = nets.objects.get(name)
    if net is not None and net.active:
        if (child := net.server.child) is not None and child.alive():
            await comparing.mend_slots(nets.services, child, there.seen)
        if (network := net.running) is not None:
            await net.make(network)
    else:
        await comparing.clear_away(nets.services, there.seen, DRIVER, name)
        if name in there.tables:
            await asyncio.to_thread(firewall.remove, name)
        if (interface := there.bridges.get(name)) and not links.members(interface):
            await asyncio.to_thread(bridge.remove, interface)
        await asyncio.to_thread(files.remove_tree, nets.services.paths.runtime(DRIVER, name))
    comparing.save_or_remove(nets.records, name, net.record if net is not None else None)


async def _interfaces(nets: Nets, detach: Detach, *, repair: bool) -> list[Difference]:
    """Guests' interfaces, found by their alias; the guest's record says whether it is running."""
    found = []
    for port in links.ports():
        if _has_something(nets, port.user):
            continue
        text = f"interface {port.interface} was made for {port.user}, which doesn't run"
        if repair:
            await detach(port.interface)
        difference = Difference("interface", port.network, text, "remove it")
        found.append(comparing.marked(difference, repaired=repair and not links.exists(port.interface)))
    for net in nets.objects.values():
        for known in net.ports:
            if links.exists(known.interface) or _has_something(nets, known.user):
                continue
            text = f"interface {known.interface} is expected for {known.user}, which doesn't run"
            if repair:
                await detach(known.interface)
            difference = Difference("interface", net.name, text, "forget it")
            found.append(comparing.marked(difference, repaired=repair and known not in net.ports))
    return found


def _has_something(nets: Nets, user: str) -> bool:
    kind, _, name = user.partition("/")
    try:
        record = records.read(nets.services.paths.record(kind, name))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # unknown: assume that it does
    return bool(record.unit or record.slots or record.data)
