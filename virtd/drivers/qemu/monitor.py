# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP connection to one guest: qemu.qmp with limits of time and amount, and errors of our own tree.

A QEMU whose monitor nobody reads keeps what it has to say in its own memory, 7 MB/s of it when its guest wants that;
one to whose monitor nobody is connected says nothing. So when there are more events than are taken, the line is hung
up for a while, which costs neither side anything, and the guest's state is asked for when it is up again.
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
LATER = 0.1  # and on a busy machine, where it takes longer, this part of the time that it has taken
NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # the last from a QEMU that hangs, whose queue is full

BURST = 500
"""So many events of one guest are taken at once; hundreds come when a large guest's CPUs or disks are changed ..."""
RATE = 50.0
"""... and so many a second from then on."""
WORDS = 300
"""Characters of what QEMU answers that are repeated to a person."""


class Link(StrEnum):
    """What becomes of the connection, as Info tells it."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    SILENT = "not answering"
    GONE = "its socket is gone"
    FLOODED = "hung up on, for its many events"
    CLOSED = "closed"


class Monitor:
    """Connects once. When the link breaks by itself, `on_lost` is called, and the owner decides.

    `process` gives the PID and start time of the QEMU that has to be at the other end. While somebody is `busy()`
    with it, it isn't hung up on.
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
        """Whether it can be asked something: it may have broken off an instant ago, and nobody be told yet."""
        from qemu.qmp import Runstate

        running = self._client is not None and self._client.runstate is Runstate.RUNNING
        return running and self.link is Link.CONNECTED

    async def connect(self, limit: float, *, made: bool = False) -> None:
        """Connect within `limit` seconds, waiting for the socket to appear. Raises MonitorError.

        `made`: QEMU has been up before, so that a socket that isn't there was removed.
        """
        from qemu.qmp import QMPError

        from . import qmp

        # qemu.qmp reports what its caller reports too.
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
        """QEMU makes its socket at its start and never again."""
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
        """Raises EOFError when it was closed meanwhile: who answers then is the next QEMU, which has one monitor."""
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
        """The value that QEMU returns, which may be anything. Raises MonitorError."""
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
        """What the guest's CPUs do, as QMP's query-status has it. Raises MonitorError."""
        answer = await self.execute("query-status")
        return str(answer.get("status"))[:WORDS] if isinstance(answer, dict) else ""

    async def hear_out(self, limit: float) -> None:
        """For a QEMU that has ended: until all that it sent is told, `limit` seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await asyncio.gather(*self._tasks[:1], return_exceptions=True)  # it hangs up
        while not self._events.empty():
            self._on_event(self._events.get_nowait())

    async def close(self) -> None:
        """Also of one that is being connected. Idempotent."""
        self.link = Link.CLOSED
        self._closed.set()
        client, self._client = self._client, None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if client is not None:
            with contextlib.suppress(Exception):  # whatever the link died of is known by now
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
    """One line that a terminal shows as it is."""
    shown = "".join(character if character.isprintable() else " " for character in str(text)[: WORDS + 1])
    return shown if len(shown) <= WORDS else f"{shown[:WORDS]}..."
