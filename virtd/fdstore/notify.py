# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager.

systemd-python's notify() isn't used, for two reasons, both observed with version 235. It sends on a blocking socket
and holds the GIL meanwhile: when PID 1 is busy (a daemon-reload takes seconds with thousands of stored descriptors)
and its queue is full, *every* thread of the daemon is blocked; while a notify() was held up for 1.5 s, the main
thread ran once. And it reads NOTIFY_SOCKET from the environment at each call, so the variable would have to stay
where every child inherits it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

from virtd.fdstore.errors import NotifyFailed

# How long a message may wait for PID 1 to make room. A daemon-reload with 4,096 stored descriptors held it up for
# 3.5 s.
PATIENCE = 20.0

# systemd's NOTIFY_BUFFER_MAX: a longer message is dropped as a whole, and only PID 1's log says so.
LONGEST = 4096

Transport = Callable[[str, Sequence[int]], None]


def _address(path: str) -> str:
    """The socket address for a value of NOTIFY_SOCKET."""
    if path.startswith("@"):
        return "\0" + path[1:]
    if path.startswith("/"):
        return path
    # vsock:CID:PORT is the one a virtual machine's PID 1 talks to; it can't carry descriptors.
    raise NotifyFailed(f"NOTIFY_SOCKET={path} is not an AF_UNIX socket")


def connect(path: str, patience: float = PATIENCE, *, reserve: bool = False) -> Sender:
    """A function that sends one message and its descriptors to this NOTIFY_SOCKET; see Sender."""
    return Sender(_address(path), patience, reserve=reserve)


class Sender:
    """Called with a message and descriptors, it returns when they are in the manager's queue, where they outlive this
    process: SIGKILL in the next instruction doesn't unsend them. Raises NotifyFailed if there was no room for
    `patience` seconds, or nobody listens. Any thread may call it.

    With `reserve` a spare socket is kept for when no other can be created because too many files are open.
    """

    def __init__(self, address: str, patience: float, *, reserve: bool = False) -> None:
        self._address = address
        self._patience = patience
        self._spare = _socket() if reserve else None
        self._sparing = threading.Lock()

    def close(self) -> None:
        """Close the spare socket."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def __call__(self, text: str, fds: Sequence[int]) -> None:
        message = text.encode()
        if len(message) > LONGEST:
            raise NotifyFailed(f"a message of {len(message)} bytes; the service manager reads up to {LONGEST}")
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        deadline = time.monotonic() + self._patience
        try:
            # A socket for each message costs 10 µs, and needs neither a lock nor special treatment when the manager
            # has created a new socket. It is connected, because only then does poll() notice that the peer's queue is
            # full.
            with self._one() as sock:
                sock.connect(self._address)
                while True:
                    try:
                        sock.sendmsg([message], control, socket.MSG_NOSIGNAL)
                        return
                    except BlockingIOError:
                        _wait_for_room(sock, deadline)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                hint = "raise LimitNOFILE= in the unit: too many descriptors are in flight to PID 1"
            elif error.errno in (errno.EMFILE, errno.ENFILE):
                hint = "raise LimitNOFILE= in the unit: too many files are open"
            else:
                hint = "is the service manager alive?"
            raise NotifyFailed(f"the service manager accepted no message: {error.strerror}", hint=hint) from error

    @contextlib.contextmanager
    def _one(self) -> Iterator[socket.socket]:
        try:
            sock = _socket()
        except OSError as error:
            if self._spare is None or error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with self._sparing:
                yield self._spare
            return
        with sock:
            yield sock


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _wait_for_room(sock: socket.socket, deadline: float) -> None:
    """Return when sending is worth another try; TimeoutError if the deadline passes before."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    poll.poll(max(1, int(left * 1000)))


def barrier(send: Transport, timeout: float) -> bool:
    """Whether the manager has processed everything sent before, waiting for up to `timeout` seconds.

    It says that the messages were read, *not* that the descriptors were kept; `Store.verify` is for that.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            send("BARRIER=1", (theirs,))
        finally:
            os.close(theirs)
        poll = select.poll()
        poll.register(ours, 0)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(ours)
