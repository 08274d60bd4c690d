# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for what only domains have: each a user of its own, and hardware on record."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from ... import errors
from ...objects.comparing import marked
from ...objects.protocol import Difference
from ...systemd.names import helped, helper_unit
from . import swtpm, userdb
from .users import known_as

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...children.child import Services
    from .guest import QemuGuest
    from .users import Users


def hardware(machines: Mapping[str, QemuGuest], *, repair: bool) -> list[Difference]:
    """The hardware on record, which each guest that has run needs. (That of a definition that was removed is kept,
    for the definition may come back.)
    """
    found = []
    for name, machine in machines.items():
        what, running = "", machine.hardware.running
        try:
            # While nothing is known of it yet, QEMU is being asked.
            if machine.hardware.read_again() is None and running is not None and running.known:
                what = f"{machine.hardware.path} doesn't say what hardware {name} has, which runs"
        except errors.HostError as exc:
            what = exc.message
        if not what:
            continue
        mend = "write it anew, as it runs" if running is not None else ""
        one = Difference("hardware", name, what, mend)
        found.append(marked(one, repaired=machine.hardware.restore()) if repair and mend else one)
    return found


async def tpms(machines: Mapping[str, QemuGuest], services: Services, *, repair: bool) -> list[Difference]:
    """The processes of TPMs: each has a machine that runs, and each machine's runs."""
    units = await services.units()
    found = [
        Difference("process", name, f"{name}: {machine.problems[swtpm.ROLE].text}")
        for name, machine in machines.items()
        if machine.alive and swtpm.ROLE in machine.problems
    ]
    listed = await units.list(f"virtd-qemu-*@{swtpm.ROLE}.service")
    for name in sorted({name for unit in listed if (name := helped("qemu", swtpm.ROLE, unit.name))}):
        found += await _tpm(name, machines.get(name), services, repair=repair)
    return found


async def _tpm(name: str, machine: QemuGuest | None, services: Services, *, repair: bool) -> list[Difference]:
    """One that seems to belong to no machine: looked at again while nothing is done with that."""
    try:
        async with machine.exclusive("check") if machine is not None else contextlib.nullcontext():
            unit = helper_unit("qemu", name, swtpm.ROLE)
            state = await (await services.units()).state(unit)
            if state is None or (machine is not None and machine.data.get("tpm")):
                return []
            text = f"{unit} {'runs' if state.running else 'has ended'}, and "
            if machine is not None and machine.alive:
                return [Difference("unit", name, text + f"{name} runs with no TPM on record")]
            one = Difference("unit", name, text + f"{name} doesn't run", "stop it" if state.running else "forget it")
            if repair:
                await swtpm.clear_away(services, name)
            return [marked(one, repaired=repair)]
    except errors.Busy as exc:
        return [Difference("busy", name, exc.message)]


async def users(
    machines: Mapping[str, QemuGuest], known: Users, see_to_names: Callable[[], None], *, repair: bool
) -> list[Difference]:
    """The users of guests: each has its name, belongs to one guest, and none is left over."""
    found = _names(machines, known.directory)
    if repair and found:
        for machine in machines.values():
            if machine.alive:
                machine.name_user()
        see_to_names()
        left = {difference.text for difference in _names(machines, known.directory)}
        found = [marked(difference, repaired=difference.text not in left) for difference in found]
    return found + await _ids(machines, known)


def _names(machines: Mapping[str, QemuGuest], directory: str) -> list[Difference]:
    needed = {user: machine for machine in machines.values() if (user := machine.user) is not None}
    wrong = f"in {directory} aren't as they should be"
    found = [
        Difference("user", machine.name, f"the records of user {user.name} {wrong}", "write them anew")
        for user, machine in needed.items()
        # A guest's are removed before everything else of it is put away.
        if machine.alive and not userdb.is_whole(directory, user, machine.name)
    ]
    return found + [
        Difference("user", "", f"{directory} has user {user.name} ({user.uid}), whom no guest runs as", "remove it")
        for user in userdb.left_over(directory, userdb.listing(directory), set(needed))
    ]


async def _ids(machines: Mapping[str, QemuGuest], users: Users) -> list[Difference]:
    found = []
    try:
        users.read()
    except errors.HostError as exc:
        text = f"{exc.message}; each domain gets another user ID at its next start"
        found.append(Difference("user", "", text))
    others: dict[int, str] = {}
    for machine in list(machines.values()):
        if (user := machine.user) is None:
            continue
        name = machine.name
        if (other := others.setdefault(user.uid, name)) != name:
            found.append(Difference("user", name, f"{name} and {other} run as one user, {user.uid}"))
        known = await asyncio.to_thread(known_as, user.uid)
        if known == user.name or not machine.alive:  # it may have ended meanwhile
            continue
        if known is None:
            text = f"the host doesn't know user {user.name} ({user.uid}) and can't shut {name} down as it ends"
        else:
            text = f"{name} runs as user {user.uid}, who is {known} as well"
        found.append(Difference("user", name, text))
    return found
