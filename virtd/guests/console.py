# SPDX-License-Identifier: LGPL-2.1-or-later
"""Following logs and writing to consoles: where a follower continues in a log file, and which client may type.

No byte passes through here. A follower gets the log file itself and is woken when it grows; a writer gets the guest's
pipe. After a restart of the daemon both resume with what they had, a cursor or a token, and so miss and repeat
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .. import errors, process
from ..hints import do
from ..objects.turns import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..logs.chain import Cursor
    from ..logs.logfile import LogFile
    from ..logs.pump import Pump

GRACE = 10.0  # seconds after the daemon's start in which clients can claim the consoles that they had before
POLL = 25.0  # seconds after which a waiting follower gets an empty answer and asks again: dead ones don't pile up


class Place(NamedTuple):
    """Where a follower continues.

    `fd`, which the receiver closes, is set only if that is a different file from the one it asked for. `missed` is
    the number of bytes that were rotated away before it read them, or chain.UNKNOWN; `refused` is why the log can't
    be written.
    """

    cursor: Cursor
    more: bool
    ended: bool
    fd: int | None
    missed: int = 0
    refused: str = ""


class Followers:
    """Wakes the followers that wait for a log to grow."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._refused: dict[str, str] = {}

    def refused(self, key: str, reason: str) -> None:
        """The pump's callback: a log can't be written, or, without a reason, it can again."""
        if reason:
            self._refused[key] = reason
        else:
            self._refused.pop(key, None)
        self.grown(key)

    def grown(self, key: str) -> None:
        """The pump's callback: bytes were written."""
        for event in self._waiting.get(key, ()):
            event.set()

    async def place(
        self, log: LogFile, key: str, asked: Cursor | None, lines: int, over: asyncio.Event, *, wait: bool
    ) -> Place:
        """See Follow in org.virtd1.varlink. `key` is the pump's; `over` is set once the log no longer grows."""
        while True:
            try:
                return await self._place(log, key, asked, lines, over, wait=wait)
            except FileNotFoundError:
                continue  # the file was rotated away between two looks

    async def _place(
        self, log: LogFile, key: str, asked: Cursor | None, lines: int, over: asyncio.Event, *, wait: bool
    ) -> Place:
        # What the guest said a moment ago may still be in the pipe.
        await asyncio.wrap_future(self._pump.drain(key))
        start = asked if asked is not None else log.chain.tail(lines)
        refused = self._refused.get(key, "")
        with self._watched(key) if wait else contextlib.nullcontext(asyncio.Event()) as grown:
            deadline = time.monotonic() + POLL
            while True:
                grown.clear()
                ended = over.is_set()  # read first, so that what was written before the end is found below
                cursor, size = log.chain.locate(start)
                more = size > 0
                before, refused = refused, self._refused.get(key, "")
                if (
                    more
                    or ended
                    or not wait
                    or cursor.file != start.file
                    or refused != before
                    or time.monotonic() >= deadline
                ):
                    break
                await first_of(grown, over, limit=deadline - time.monotonic())
        missed = log.chain.missed(asked, cursor) if asked is not None else 0
        changed = asked is None or cursor.file != asked.file
        fd = log.chain.open(cursor.file) if changed else None
        return Place(cursor, more, ended and not more, fd, missed, refused)

    @contextlib.contextmanager
    def _watched(self, key: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        self._pump.watch(key)
        try:
            yield event
        finally:
            self._pump.unwatch(key)
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]


class Claim(msgspec.Struct):
    """The right of one client to type on a console."""

    token: str
    by: str
    pid: int
    taken: asyncio.Event
    taken_by: str = ""


class Writers:
    """The writers of consoles, at most one for each. `noun` is what the objects are called."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._claims: dict[str, Claim] = {}
        self._born = time.monotonic()

    def claim(
        self, name: str, kept: dict[str, Any] | None, *, force: bool, token: str | None, by: str, pid: int
    ) -> Claim:
        """Take the console. `kept` is what the record says about the writer before a restart. Raises Busy."""
        present = self._claims.get(name)
        holder = f"{present.by} (PID {present.pid})" if present is not None else ""
        mine = False
        if present is not None:
            mine = token is not None and present.token == token
        elif kept and time.monotonic() - self._born < GRACE:
            mine = token is not None and kept.get("token") == token
            if not mine and _lives(kept.get("pid", 0)):
                holder = f"{kept.get('by')} (PID {kept.get('pid')})"
        if holder and not mine and not force:
            raise errors.Busy(
                f"The console of {name} is in use by {holder}",
                hint="To watch: "
                + do("console", self._noun, name, read_only=True)
                + "; to take over: "
                + do("console", self._noun, name, force=True)
                + ".",
            )
        if present is not None:
            present.taken_by = by
            present.taken.set()
        claim = Claim(token if mine and token else os.urandom(16).hex(), by, pid, asyncio.Event())
        self._claims[name] = claim
        return claim

    def release(self, name: str, claim: Claim) -> bool:
        """Give it up; False if somebody else has taken it since."""
        if self._claims.get(name) is not claim:
            return False
        del self._claims[name]
        return True


async def write(claim: Claim, over: asyncio.Event) -> str:
    """Wait until the claim is taken over or the guest has ended: "taken-over" or "ended"."""
    await first_of(claim.taken, over)
    return "taken-over" if claim.taken.is_set() else "ended"


def _lives(pid: int) -> bool:
    # A zombie doesn't count, even if nobody ever reaps it.
    return pid > 0 and process.start_time(pid) > 0
