# SPDX-License-Identifier: LGPL-2.1-or-later
"""Admission of D-Bus calls: a bus passes on whatever anybody sends, and without this any number would wait here.

GDBus reads messages in a thread of its own, faster than calls are answered. So each message is checked there, before
it is handed on: a user with too many unanswered calls gets an error, and after too many errors nothing. A bus allows
each connection 128 unanswered calls, so the bus itself soon stops such a caller.

Root's calls are never refused. At a connection's first call its user isn't known yet. Many such calls are admitted,
so that a user with many new connections doesn't keep root out.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

from ..allowance import Bucket
from ..systemd.bus.message import NO_REPLY_EXPECTED
from .introspection import PEER

if TYPE_CHECKING:
    from collections.abc import Callable

SENDER: Final = 16  # calls of one connection
USER: Final = 64  # of one user without rights
ALL: Final = 256  # of all of them
STRANGERS: Final = 1024  # of connections whose user isn't known yet
SMALL: Final = 64 << 10  # bytes of an unprivileged user's call
BYTES: Final = 8 << 20  # of all calls of strangers; small ones are admitted regardless
LITTLE: Final = 4 << 10
ERRORS: Final = 100.0  # a second; also for answers to Ping
KNOWN: Final = 1024  # connections that are remembered
LIMITS_EXCEEDED: Final = "org.freedesktop.DBus.Error.LimitsExceeded"


class Sender:
    """A connection to the bus; `uid` is None until it is known."""

    __slots__ = ("bytes", "calls", "uid")

    def __init__(self) -> None:
        self.uid: int | None = None
        self.calls = 0
        self.bytes = 0


class Door:
    """`refuse(message)` sends an error, and may be called in any thread. `admits` runs in GDBus's thread."""

    def __init__(self, refuse: Callable[[Any], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._refuse = refuse
        self._clock = clock
        self._lock = threading.Lock()
        self._senders: dict[str, Sender] = {}
        self._users: dict[int, int] = {}  # calls of each user without rights
        self._strangers = self._stranger_bytes = 0
        self._errors = Bucket(ERRORS, ERRORS, clock())
        self._pings = Bucket(ERRORS, ERRORS, clock())

    def admits(self, message: Any) -> bool:
        """Whether to admit a call; it counts until `leaves`."""
        if message.get_interface() == PEER:
            return self._pinged()  # GDBus answers these itself
        name = message.get_sender() or ""
        with self._lock:
            sender = self._senders.get(name)
            uid = sender.uid if sender is not None else None
            if uid == 0:
                assert sender is not None
                sender.calls += 1
                return True
            silent = int(message.get_flags()) & NO_REPLY_EXPECTED
            if uid is not None and silent:
                return False  # what they may call has no effect but its answer
            if self._room(sender, uid):
                body = message.get_body()
                size = body.get_size() if body is not None else 0
                if self._fits(uid, size) and not message.get_num_unix_fds():
                    self._enter(name, uid, size)
                    return True
            now = self._clock()
            if silent or self._errors.due(now) > 0:
                return False
            self._errors.take()
        self._refuse(message)
        return False

    def _pinged(self) -> bool:
        if self._pings.due(self._clock()) > 0:
            return False
        self._pings.take()
        return True

    def _room(self, sender: Sender | None, uid: int | None) -> bool:
        if sender is not None and sender.calls >= SENDER:
            return False
        if uid is None:
            return self._strangers < STRANGERS
        return self._users.get(uid, 0) < USER and sum(self._users.values()) < ALL

    def _fits(self, uid: int | None, size: int) -> bool:
        if uid is not None:
            return size <= SMALL
        return size <= LITTLE or self._stranger_bytes + size <= BYTES

    def _enter(self, name: str, uid: int | None, size: int) -> None:
        sender = self._senders.get(name)
        if sender is None:
            if len(self._senders) >= KNOWN:
                self._forget_some()
            sender = self._senders[name] = Sender()
        sender.calls += 1
        if uid is None:
            sender.bytes += size
            self._strangers += 1
            self._stranger_bytes += size
        else:
            self._users[uid] = self._users.get(uid, 0) + 1

    def _forget_some(self) -> None:
        """Forget the older half of the connections without a call here; a bus never assigns a unique name twice."""
        idle = [name for name, sender in self._senders.items() if not sender.calls]
        for name in idle[: max(1, len(idle) // 2)]:
            del self._senders[name]

    def learns(self, name: str, uid: int) -> None:
        """The user of a connection that has calls here has become known."""
        with self._lock:
            sender = self._senders.get(name)
            if sender is None or sender.uid is not None:
                return
            self._strangers -= sender.calls
            self._stranger_bytes -= sender.bytes
            sender.bytes = 0
            sender.uid = uid
            if uid != 0:
                self._users[uid] = self._users.get(uid, 0) + sender.calls

    def leaves(self, name: str) -> None:
        """A call has been answered."""
        with self._lock:
            sender = self._senders.get(name)
            if sender is None:
                return
            sender.calls -= 1
            if sender.uid is None:
                self._strangers -= 1
                if not sender.calls:
                    self._stranger_bytes -= sender.bytes
                    del self._senders[name]  # its user is unknown, most likely because it has left the bus
            elif sender.uid != 0:
                self._users[sender.uid] -= 1
                if not self._users[sender.uid]:
                    del self._users[sender.uid]
