# SPDX-License-Identifier: LGPL-2.1-or-later
"""The users of domains: each has an ID of its own, for its user and its group.

A domain keeps its ID as long as a domain of its uuid exists, in a table in /var/lib/virtd, so that files that it
still owns after a power cut can't come to belong to another. IDs are assigned in turn through the whole range before
one is used again, whatever happens to the domains. The table is written before the ID is used; the names of these
users are in `userdb` while they are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors, files
from ...text import span
from .. import ids
from ..ids import Range
from . import ownership, prerequisites, userdb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...children.facts import Facts
    from ...model.settings import Qemu
    from ...paths import Paths

log = logging.getLogger(__name__)

SUBORDINATE = ("/etc/subuid", "/etc/subgid")
TRIES = 64  # consecutive IDs of other users after which the range counts as somebody else's
PATIENCE = 10.0  # seconds for looking up an ID, which may involve a directory service


class Table(msgspec.Struct, frozen=True):
    """The file: IDs by uuid, and where the search for the next one begins."""

    ids: dict[str, int] = {}
    next: int = 0
    schema: int = 1


class Living(NamedTuple):
    """An existing domain: its uuid, and the ID that it runs with, if it runs."""

    uuid: str
    running: int | None


class Users:
    """The table, and the lock under which it changes."""

    def __init__(self, paths: Paths, settings: Qemu, facts: Facts) -> None:
        self._path = paths.qemu_ids
        self.directory = paths.userdb  # where the names are
        self._settings = settings
        self._facts = facts
        self._lock = asyncio.Lock()

    @property
    def within(self) -> Range:
        return Range(ids.GUESTS.owner, self._settings.first_uid, self._settings.uid_count)

    def leftovers(self, running: set[int]) -> ownership.Leftovers:
        """How to recognize files left by a power cut; `running` are the IDs of other running guests."""
        return ownership.Leftovers(self.within, running, prerequisites.group_of(self._settings))

    async def account(self, name: str, uuid: str, domains: Iterable[Living]) -> prerequisites.Account:
        """The user for a domain's guest. `domains`: all of them.

        Raises HostError if there is no such user, or no ID left.
        """
        if self._settings.user:
            return prerequisites.account(self._settings, self._facts)
        async with self._lock:
            uid = await self._assigned(uuid, list(domains))
        return prerequisites.own(userdb.name_of(name), uid)

    def seen(self, name: str, pid: int) -> userdb.Named | None:
        """The user of its own that a domain's process runs or ran as; None if it has none."""
        user = userdb.name_of(name)
        uid = userdb.uid_of(self.directory, user)
        with contextlib.suppress(OSError):
            uid = os.stat(f"/proc/{pid}").st_uid if pid else uid
        return userdb.Named(user, uid) if uid is not None and self.within.holds(uid) else None

    def read(self) -> Table:
        """The table as it is on disk. Raises HostError."""
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=Table)
        except FileNotFoundError:
            return Table(next=self.within.first)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise errors.HostError(f"{self._path} can't be read: {exc}") from exc

    def _load(self) -> Table:
        """The same; one that can't be read is moved aside."""
        try:
            return self.read()
        except errors.HostError as exc:
            log.warning("%s; each domain gets another user ID at its next start", exc.message)
            with contextlib.suppress(OSError):
                os.rename(self._path, f"{self._path}.damaged")
            # Not from the beginning: the guests with the first IDs may have left files.
            return Table(next=self.within.first + int.from_bytes(os.urandom(4)) % self.within.many)

    async def _assigned(self, uuid: str, domains: list[Living]) -> int:
        table = self._load()
        others = [Range("a guest", one.running, 1) for one in domains if one.running and one.uuid != uuid]
        granted = [grant for path in SUBORDINATE for grant in ids.grants(path)]
        known = table.ids.get(uuid)
        if known is not None and self.within.holds(known) and not any(o.meets(known) for o in [*others, *granted]):
            return known
        kept = {one.uuid: table.ids[one.uuid] for one in domains if one.uuid in table.ids and one.uuid != uuid}
        taken = [*others, *granted, *(Range(other, uid, 1) for other, uid in kept.items())]
        try:
            async with asyncio.timeout(PATIENCE):
                found = await asyncio.to_thread(_choose, self.within, taken, table.next)
        except TimeoutError:
            raise errors.TimedOut(
                f"The host didn't say within {span(PATIENCE)} which user IDs are free",
                hint="Is a service that passwd in /etc/nsswitch.conf names out of reach?",
            ) from None
        following = found + 1 if self.within.holds(found + 1) else self.within.first
        files.write(self._path, msgspec.json.encode(Table(kept | {uuid: found}, following)) + b"\n")
        return found


def _choose(within: Range, taken: list[Range], start: int) -> int:
    """A free ID: not on record, not known to the host, and of no process. Raises HostError. Blocks."""
    taken = [*taken, *(Range("a process", uid, 1) for uid in _of_processes() if within.holds(uid))]
    for _ in range(TRIES):
        found = ids.free(within, 1, taken, start=start)
        if found is None:
            raise errors.HostError(
                f"There are no user IDs left for another domain, of {within.first} to {within.last}",
                hint="Set qemu.first_uid and qemu.uid_count in virtd.toml, or see /etc/subuid for who has them.",
            )
        if (name := known_as(found)) is None:
            return found
        taken.append(Range(name, found, 1))
    raise errors.HostError(
        f"User IDs {start} to {taken[-1].first} are other users', {taken[-1].owner} for one",
        hint="Set qemu.first_uid in virtd.toml to the beginning of a range that nobody has.",
    )


def known_as(uid: int) -> str | None:
    """The user or group with this number on the host. Blocks while a directory service is asked."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    with contextlib.suppress(KeyError):
        return grp.getgrgid(uid).gr_name
    return None


def _of_processes() -> set[int]:
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                found.add(entry.stat().st_uid)
    return found


def running_as(data: dict[str, Any]) -> userdb.Named | None:
    """The user of its own that a guest runs as, by its record's data; None if it shares its user with others."""
    kept = data.get("account")
    return userdb.Named(str(kept["name"]), int(kept["uid"])) if isinstance(kept, dict) else None
