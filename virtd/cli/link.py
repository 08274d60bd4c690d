# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection that is renewed whenever the daemon goes away, for a loop that has other things to do meanwhile."""

from __future__ import annotations

import time

from virtd.cli.client import KNOCK, Connection, unreachable
from virtd.errors import VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virtd.cli.client import Parameters, Reply, Session

RETRY = 0.1  # seconds between two attempts to connect


class Link:
    """A connection for one long question, renewed, with the question repeated, whenever it breaks.

    `question(again)` returns method and parameters. A new connection first asks something small, because the answer
    to the question itself may be hours away, and only an answer shows that a daemon is running.
    """

    def __init__(self, session: Session, question: Callable[[bool], tuple[str, Parameters]], *, more: bool) -> None:
        self._session = session
        self._question = question
        self._more = more
        self._connection: Connection | None = None
        self._knocking = False
        self._retry_at = float("inf")  # nothing is retried before open()
        self.lost_at: float | None = None
        self.asked = False

    def open(self) -> None:
        """Connect for the first time, when an absent daemon is an error."""
        try:
            self._connection = Connection(self._session.address, 0)
            self._ask(again=False)
        except (ConnectionResetError, BrokenPipeError, BlockingIOError):
            self._lose()
        except OSError as exc:
            raise unreachable(self._session.address, exc) from exc

    def poll_fd(self, now: float) -> int:
        """The descriptor to poll; -1 while there is none. Connects if it is time to."""
        if self._connection is None and now >= self._retry_at:
            if self._session.must_wait():
                self._lose()
                return -1
            try:
                self._connection = Connection(self._session.address, 0)
                self._connection.send(KNOCK, {})
                self._knocking = True
            except OSError:
                self._lose()
        return -1 if self._connection is None else self._connection.fileno()

    def ask(self) -> None:
        """Ask the next question on the present connection."""
        if self._connection is not None and not self._knocking and not self.asked:
            try:
                self._ask(again=False)
            except OSError:
                self._lose()

    def receive(self) -> Reply | None:
        """The reply, if it has arrived. Raises the VirtdError that the daemon answered with."""
        if self._connection is None:
            return None
        try:
            reply = self._answer()
        except OSError:
            self._lose()
            return None
        if reply is not None:
            self.asked = False
        return reply

    def _answer(self) -> Reply | None:
        assert self._connection is not None
        if not self._knocking:
            return self._connection.receive(0)
        try:
            if self._connection.receive(0) is None:
                return None
        except VirtdError:
            pass  # it doesn't know that question, but it is running
        self._knocking = False
        self.lost_at = None
        self._ask(again=True)
        return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, *, again: bool) -> None:
        assert self._connection is not None
        method, parameters = self._question(again)
        self._connection.send(method, parameters, more=self._more)
        self.asked = True

    def _lose(self) -> None:
        self.close()
        now = time.monotonic()
        self.lost_at = self.lost_at or now
        self._retry_at = now + RETRY
        self._knocking = self.asked = False
