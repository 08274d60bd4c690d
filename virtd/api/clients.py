# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients of the Varlink sockets: connections are accepted, counted by user, and turned away.

Each unprivileged user may have a few connections, and all of them together some more. A connection beyond that
replaces one that has been idle, of the same user or of the user with the most; if there is none, the client gets an
error and is disconnected. A flood of connections leaves half of the loop's time to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from typing import TYPE_CHECKING, Protocol

from .. import errors
from ..host import Caller
from ..sparing import Sparing
from . import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .limits import Limits

log = logging.getLogger(__name__)

CONNECTIONS, ALL_CONNECTIONS = 64, 256
IDLE = 5.0  # seconds without a call after which a connection may be replaced
AT_ONCE = 64  # connections accepted before others have the loop
AGAIN = 0.1  # seconds before a listener is retried after descriptors ran out

ERRORS = "org.virtd1"  # all interfaces share its errors


class Client(Protocol):
    """A connection being served."""

    caller: Caller
    since: float | None  # when it became idle; None while a call is under way

    async def serve(self) -> None: ...
    def close(self) -> None: ...


class Clients:
    """Accepts connections on listening sockets until `close`; `make` creates the Client for one."""

    def __init__(
        self, limits: Limits, caller_of: Callable[[socket.socket], Caller], make: Callable[..., Client]
    ) -> None:
        self._limits = limits
        self._caller_of = caller_of
        self._make = make
        self._users: dict[int, dict[Client, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: dict[socket.socket, asyncio.TimerHandle | None] = {}
        self._sparing = Sparing(log)

    def listen(self, listeners: Sequence[socket.socket]) -> None:
        for listener in listeners:
            listener.setblocking(False)
            self._watch(listener)

    async def close(self) -> None:
        """End every connection; the listening sockets remain the owner's."""
        loop = asyncio.get_running_loop()
        for listener, timer in self._listeners.items():
            loop.remove_reader(listener)
            if timer is not None:
                timer.cancel()
        self._listeners.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, uid: int | None = None) -> int:
        """Connections of a user, or of all but root."""
        if uid is not None:
            return len(self._users.get(uid, ()))
        return sum(len(clients) for uid, clients in self._users.items() if uid != 0)

    # Listening

    def _watch(self, listener: socket.socket) -> None:
        self._listeners[listener] = None
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        self._listeners[listener] = loop.call_later(seconds, self._watch, listener)

    def _accept(self, listener: socket.socket) -> None:
        begun = time.monotonic()
        for _ in range(AT_ONCE):
            try:
                connection, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                # Out of descriptors, most likely. Clients in the backlog are served when there are some again.
                self._sparing.warning("Cannot accept a client: %s", exc.strerror)
                self._pause(listener, AGAIN)
                return
            try:
                self._admit(connection)
            except Exception:
                connection.close()
                self._sparing.exception("A client could not be served")
        self._pause(listener, time.monotonic() - begun)

    # Admitting

    def _admit(self, connection: socket.socket) -> None:
        caller = self._caller_of(connection)
        if caller.uid != 0 and not (self._limits.arrives(caller.uid) and self._room(caller.uid)):
            with contextlib.suppress(OSError):
                connection.send(_FULL, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            connection.close()
            return
        client = self._make(connection, caller)
        task = asyncio.create_task(client.serve(), name="varlink-connection")
        self._users.setdefault(caller.uid, {})[client] = task
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._gone(client, task))

    def _gone(self, client: Client, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        client.close()  # a task that was cancelled before its first step has closed nothing
        clients = self._users.get(client.caller.uid, {})
        clients.pop(client, None)
        if not clients:
            self._users.pop(client.caller.uid, None)

    def _room(self, uid: int) -> bool:
        """Whether this user may have one more connection, for which an idle one may be closed."""
        own = self._users.get(uid, {})
        if len(own) >= CONNECTIONS:
            return self._evict(own)
        if self.count() >= ALL_CONNECTIONS:
            most = max((user for user in self._users.items() if user[0] != 0), key=lambda user: len(user[1]))[1]
            if len(most) > len(own) + 1:
                return self._evict(most, any_of_them=True)
            return self._evict(own)
        return True

    def _evict(self, clients: dict[Client, asyncio.Task[None]], *, any_of_them: bool = False) -> bool:
        """End the connection that has been idle for the longest, or with `any_of_them` the oldest if none is idle."""
        idle = [client for client in clients if client.since is not None]
        longest = min(idle, key=lambda client: client.since or 0.0, default=None)
        if longest is None or longest.since is None or time.monotonic() - longest.since < IDLE:
            if not any_of_them:
                return False
            longest = next(iter(clients))
        clients.pop(longest).cancel()  # its place is free from now on, though its end takes a moment
        return True


def caller_of(connection: socket.socket) -> Caller:
    """The process at the other end, from the kernel (unix(7), SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Caller.of(uid, pid)


_BUSY = errors.Busy(
    "Unprivileged users have too many connections, or open too many a second", hint="Try again in a moment."
)
_FULL = wire.encode({"error": f"{ERRORS}.Busy", "parameters": _BUSY.fields()}) + b"\0"
