# SPDX-License-Identifier: LGPL-2.1-or-later
"""fsck for what only domains have: each a user of its own, and hardware on record."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ... import errors
from ...objects.comparing import marked
from ...objects.protocol import Difference
from . import userdb
from .users import known_as

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
