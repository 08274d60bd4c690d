# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP connection to one guest: qemu.qmp with limits on time and size, and with virtd's errors.

A QEMU whose monitor is connected but not read buffers events in its own memory, at up to 7 MB/s if its guest wants
that; one whose monitor isn't connected drops them. So when there are too many events virtd disconnects for a while,
which costs neither side anything, and asks for the guest's state when it connects again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ... import errors, untrusted
from ...allowance import Allowance
from ...hints import do
from ...text import span

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .qmp import Client, Event

log = logging.getLogger(__name__)

ANSWER_LIMIT = 5.0  # seconds; a healthy QEMU answers in under one millisecond
RETRY = 0.005  # seconds between two looks while QEMU hasn't made its socket yet: it takes 30 to 50 ms
LATER = 0.1  # on a busy host, where that takes longer, this fraction of the time so far
NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # EAGAIN: QEMU hangs, and its backlog is full

BURST = 500
"""Events of one guest that are taken at once; hundreds come when a large guest's CPUs or disks are changed ..."""
RATE = 50.0
"""... and each second from then on."""
WORDS = 300
"""Characters of QEMU's answers that are shown to a person."""


class Link(StrEnum):
    """The state of the connection, as Info shows it."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    SILENT = "not answering"
    GONE = "its socket is gone"
    FLOODED = "hung up on, for its many events"
    CLOSED = "closed"


class Monitor:
    """One connection. When it breaks, `on_lost` is called, and the owner decides what to do.

    `process` returns the PID and start time of the QEMU that has to be at the other end. While `busy()`, the
    connection isn't closed because of too many events.
    """

    def __init__(
        self,
        name: str,
        path: str,
        process: Callable[[], tuple[int, int]],
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name = name
        self._path = path
        self._process = process
        self._on_event = on_event
        self._on_lost = on_lost
        self._busy = busy
        self._client: Client | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[Event] = asyncio.Queue(BURST)
        self._closed = asyncio.Event()
        self._allowance = Allowance(BURST, RATE)
        self.link = Link.CONNECTING

    @property
    def usable(self) -> bool:
        """Whether it can execute commands: it may have broken an instant ago, before `on_lost` was called."""
        from qemu.qmp import Runstate

        running = self._client is not None and self._client.runstate is Runstate.RUNNING
        return running and self.link is Link.CONNECTED

    async def connect(self, limit: float, *, made: bool = False) -> None:
        """Connect within `limit` seconds, waiting for the socket to appear. Raises MonitorError.

        `made`: QEMU has been up before, so a missing socket must have been removed.
        """
        from qemu.qmp import QMPError

        from . import qmp

        # qemu.qmp logs errors that its caller reports as well.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self.link = Link.CONNECTING
        try:
            async with asyncio.timeout(limit):
                client = await self._reach()
        except TimeoutError:
            if made and not os.path.lexists(self._path):
                self.link = Link.GONE
                raise self._gone() from None
            self.link = Link.SILENT
            raise errors.MonitorError(
                f"The QEMU monitor of {self._name} didn't answer within {span(limit)}",
                hint="The guest itself may be fine. "
                + do("stop", "domain", self._name)
                + " ends it without the monitor.",
            ) from None
        except (QMPError, OSError, EOFError) as exc:
            self.link = Link.CLOSED
            raise errors.MonitorError(
                f"Cannot connect to the QEMU monitor of {self._name}: {qmp.words(exc)}"
            ) from None
        self._client = client
        self.link = Link.CONNECTED
        self._tasks = [
            asyncio.create_task(self._watch(client), name=f"qmp-{self._name}"),
            asyncio.create_task(self._listen(), name=f"qmp-events-{self._name}"),
        ]

    def _gone(self) -> errors.MonitorError:
        """The error for a missing socket, which QEMU creates at its start and never again."""
        lost = directory = os.path.dirname(self._path)
        while not os.path.lexists(os.path.dirname(lost)):
            lost = os.path.dirname(lost)
        text = f"its directory {lost}" if not os.path.lexists(directory) else f"its socket {self._path}"
        return errors.MonitorError(
            f"The QEMU monitor of {self._name} can't be reached any more: {text} was removed",
            hint="The guest runs on without it. Shut it down from inside, or end it by "
            + do("stop", "domain", self._name)
            + ", and start it again when convenient.",
        )

    async def _reach(self) -> Client:
        """Raises EOFError if it was closed meanwhile: then the next QEMU answers, which serves one client."""
        from .qmp import Client

        begun = time.monotonic()
        while not self._closed.is_set():
            try:
                connection = untrusted.connect(self._path, *self._process())
            except OSError as exc:
                if exc.errno not in NOT_YET:
                    raise
                await asyncio.sleep(max(RETRY, LATER * (time.monotonic() - begun)))
                continue
            client = await self._greet(Client(self._take, self._busy), connection)
            if not self._closed.is_set():
                return client
            await client.disconnect()
        raise EOFError("the guest has ended")

    async def _greet(self, client: Client, connection: socket.socket) -> Client:
        try:
            await client.reach(connection)
        except BaseException:
            connection.close()
            raise
        return client

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = ANSWER_LIMIT
    ) -> Any:
        """Execute a command; the value that QEMU returns may be anything. Raises MonitorError."""
        from qemu.qmp import ExecuteError, QMPError

        from . import qmp

        client = self._client
        if client is None:
            raise errors.MonitorError(f"The QEMU monitor of {self._name} is {self.link}")
        try:
            async with asyncio.timeout(limit):
                return await client.execute(command, arguments)
        except TimeoutError:
            self.link = Link.SILENT
            raise errors.MonitorError(
                f"The QEMU monitor of {self._name} didn't answer {command} within {span(limit)}"
            ) from None
        except ExecuteError as exc:
            raise errors.MonitorError(f"QEMU refused {command}: {_short(exc.error.error.desc)}") from None
        except (QMPError, OSError, EOFError) as exc:
            self.link = Link.CLOSED
            raise errors.MonitorError(f"The QEMU monitor of {self._name} broke off: {qmp.words(exc)}") from None

    async def status(self) -> str:
        """The run state, as QMP's query-status has it. Raises MonitorError."""
        answer = await self.execute("query-status")
        return str(answer.get("status"))[:WORDS] if isinstance(answer, dict) else ""

    async def hear_out(self, limit: float) -> None:
        """QEMU has ended: deliver all the events that it sent, waiting at most `limit` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await asyncio.gather(*self._tasks[:1], return_exceptions=True)  # QEMU's end closes the connection
        while not self._events.empty():
            self._on_event(self._events.get_nowait())

    async def close(self) -> None:
        """Close it, even while it is being connected. Idempotent."""
        self.link = Link.CLOSED
        self._closed.set()
        client, self._client = self._client, None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:  # even if this is cancelled: nobody else has the connection any more
            if client is not None:
                with contextlib.suppress(Exception):  # why the link broke is known by now
                    await client.disconnect()

    def _take(self, event: Event) -> bool:
        if self._events.full() or not self._allowance.take():
            return False
        self._events.put_nowait(event)
        return True

    async def _listen(self) -> None:
        while True:
            event = await self._events.get()
            log.debug("%s: event %s", self._name, event)
            self._on_event(event)

    async def _watch(self, client: Client) -> None:
        from qemu.qmp import Runstate

        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()
        self.link = Link.FLOODED if client.flooded else Link.CLOSED
        self._on_lost()


def _short(text: object) -> str:
    """One line, safe for a terminal."""
    shown = "".join(character if character.isprintable() else " " for character in str(text)[: WORDS + 1])
    return shown if len(shown) <= WORDS else f"{shown[:WORDS]}..."
