# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logs and consoles of anything with a child: viewers get a file or a pipe, and ask again to wait for more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from .. import errors
from ..children.slots import CONSOLE_LOG, STDERR, STDERR_LOG, STDOUT
from ..guests import console
from ..logs.chain import Cursor
from ..logs.logfile import LogFile
from ..replies import Reply
from ..replies import guests as replies
from .base import Caller, WithDescriptors

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator

    from ..children.child import Child, Services
    from ..model.state import State
    from ..records import Record


class Viewed(Protocol):
    """An object with a console and a log; `child` is None while it isn't running."""

    name: str
    child: Child | None
    over: asyncio.Event

    @property
    def state(self) -> State: ...
    @property
    def record(self) -> Record | None: ...

    def keep_console(self, writer: dict[str, Any] | None) -> None: ...


class Viewers:
    """Readers of the logs and writers on the consoles of one driver's objects."""

    def __init__(self, services: Services, driver: str, noun: str, followers: console.Followers) -> None:
        self._services = services
        self._driver = driver
        self._followers = followers
        self._writers = console.Writers(noun)

    async def follow(
        self, viewed: Viewed, which: str, file: str | None, offset: int | None, lines: int | None, *, wait: bool
    ) -> WithDescriptors:
        """See Follow in org.virtd1.varlink."""
        if which not in ("console", "log"):
            raise errors.InvalidState(f"There is no log {which}", hint='The logs are "console" and "log".')
        slot, pipe = (CONSOLE_LOG, STDOUT) if which == "console" else (STDERR_LOG, STDERR)
        child = viewed.child
        open_log = (child.console if slot == CONSOLE_LOG else child.stderr) if child is not None else None
        asked = Cursor(file, offset or 0) if file is not None else None
        passing = open_log is None
        logfile = open_log or self._past_log(viewed.name, which)
        try:
            place = await self._followers.place(
                logfile,
                f"{self._driver}/{viewed.name}/{pipe}",
                asked,
                lines or 0,
                viewed.over,
                wait=wait and not passing,
            )
        finally:
            if passing:
                logfile.close()
        value = replies.Place(
            file=place.cursor.file,
            offset=place.cursor.offset,
            more=place.more,
            ended=place.ended,
            state=viewed.state.value,
            missed=place.missed,
            refused=place.refused,
        )
        return WithDescriptors(value, [place.fd] if place.fd is not None else [])

    def _past_log(self, name: str, which: str) -> LogFile:
        """The log of an object that isn't running."""
        paths = self._services.paths
        path = (paths.console_log if which == "console" else paths.stderr_log)(self._driver, name)
        if not os.path.exists(path):
            raise errors.NotFound(f"{name} has no log yet", hint="There is one once it has been started.")
        limits = self._services.log_limits
        return LogFile(path, limit=limits.max_bytes, backups=limits.backups)

    async def write(
        self, viewed: Viewed, *, force: bool, token: str | None, by: Caller
    ) -> AsyncGenerator[Reply | WithDescriptors]:
        """See OpenConsole in org.virtd1.varlink. Closing the iterator releases the console."""
        if viewed.child is None or viewed.record is None:
            raise errors.InvalidState(f"Cannot attach to the console of {viewed.name}: it is {viewed.state}")
        kept = viewed.record.data.get("console")
        try:
            pipe = viewed.child.stdin()
        except LookupError:
            raise errors.HostError(f"The console of {viewed.name} takes no input: its slot was lost") from None
        claim = self._writers.claim(viewed.name, kept, force=force, token=token, by=by.name, pid=by.pid)
        viewed.keep_console({"token": claim.token, "by": by.name, "pid": by.pid})
        try:
            yield WithDescriptors(replies.Opened(token=claim.token, name=viewed.name), [os.dup(pipe)])
            event = await console.write(claim, viewed.over)
            yield replies.Over(name=viewed.name, event=event, by=claim.taken_by or None)
        finally:
            if self._writers.release(viewed.name, claim):
                viewed.keep_console(None)
