# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP connection to one guest: qemu.qmp with time limits, and errors of our own tree."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ... import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu.qmp import QMPClient

log = logging.getLogger(__name__)

ANSWER_LIMIT = 5.0  # seconds; a healthy QEMU answers in under one millisecond
RETRY = 0.005  # seconds between two looks while QEMU hasn't made its socket yet: it takes 30 to 50 ms
LATER = 0.1  # and on a busy machine, where it takes longer, this part of the time that it has taken

Event = dict[str, Any]


class Link(StrEnum):
    """What becomes of the connection, as `virtctl info` shows it."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    SILENT = "not answering"
    CLOSED = "closed"


class Monitor:
    """Connects once; when the link breaks it is `CLOSED` and the owner decides."""

    def __init__(self, name: str, path: str, on_event: Callable[[Event], None]) -> None:
        self._name = name
        self._path = path
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._events: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self.link = Link.CONNECTING

    async def connect(self, limit: float) -> None:
        """Connect within `limit` seconds, waiting for the socket to appear. Raises MonitorError."""
        from qemu.qmp import QMPError

        # qemu.qmp reports what its caller reports too.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self.link = Link.CONNECTING
        try:
            async with asyncio.timeout(limit):
                client = await self._reach()
        except TimeoutError:
            self.link = Link.SILENT
            raise errors.MonitorError(
                f"The QEMU monitor of {self._name} didn't answer within {limit:g} s",
                hint=f"The guest itself may be fine. virtctl stop {self._name} ends it without the monitor.",
            ) from None
        except (QMPError, OSError, EOFError) as exc:
            self.link = Link.CLOSED
            raise errors.MonitorError(f"Cannot connect to the QEMU monitor of {self._name}: {exc}") from exc
        self._client = client
        self.link = Link.CONNECTED
        self._events = asyncio.create_task(self._listen(client), name=f"qmp-events-{self._name}")

    async def _reach(self) -> QMPClient:
        """Raises EOFError when it was closed meanwhile: who answers then is the next QEMU, which has one monitor."""
        from qemu.qmp import ConnectError, QMPClient

        begun = time.monotonic()
        while not self._closed.is_set():
            # A look costs microseconds, an attempt that fails milliseconds, for qemu.qmp formats tracebacks.
            if not os.path.exists(self._path):
                await asyncio.sleep(max(RETRY, LATER * (time.monotonic() - begun)))
                continue
            client = QMPClient(self._name)
            try:
                await client.connect(self._path)
            except ConnectError as exc:
                # EINVAL is what asyncio makes of EAGAIN: a QEMU that hangs lets its queue of clients fill.
                if getattr(exc.exc, "errno", 0) not in (errno.ENOENT, errno.ECONNREFUSED, errno.EINVAL):
                    raise
                await asyncio.sleep(RETRY)
                continue
            if not self._closed.is_set():
                return client
            await client.disconnect()
        raise EOFError("the guest has ended")

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = ANSWER_LIMIT
    ) -> Any:
        """The value that QEMU returns. Raises MonitorError."""
        from qemu.qmp import ExecuteError, QMPError

        client = self._client
        if client is None:
            raise errors.MonitorError(f"The QEMU monitor of {self._name} is {self.link}")
        try:
            async with asyncio.timeout(limit):
                return await client.execute(command, arguments)
        except TimeoutError:
            self.link = Link.SILENT
            raise errors.MonitorError(
                f"The QEMU monitor of {self._name} didn't answer {command} within {limit:g} s"
            ) from None
        except ExecuteError as exc:
            raise errors.MonitorError(f"QEMU refused {command}: {exc}") from exc
        except (QMPError, OSError, EOFError) as exc:
            self.link = Link.CLOSED
            raise errors.MonitorError(f"The QEMU monitor of {self._name} broke off: {exc}") from exc

    async def close(self) -> None:
        """Also of one that is being connected. Idempotent."""
        self.link = Link.CLOSED
        self._closed.set()
        client, self._client = self._client, None
        task, self._events = self._events, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if client is not None:
            with contextlib.suppress(Exception):  # whatever the link died of is known by now
                await client.disconnect()

    async def _listen(self, client: QMPClient) -> None:
        with client.listener() as listener:
            async for event in listener:
                log.debug("%s: event %s", self._name, event)
                self._on_event(dict(event))
