# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices when an interface, an address, a block device or a mount appears, without saying which.

Mounts: poll(2) of mountinfo gives POLLPRI after each change of the table, proc_pid_mountinfo(5).
Interfaces and addresses: rtnetlink(7). Devices: kernel uevents, NETLINK_KOBJECT_UEVENT of netlink(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
from typing import TYPE_CHECKING

from .. import mountinfo

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_UEVENT = 15  # NETLINK_KOBJECT_UEVENT, linux/netlink.h
_KERNEL = 1  # the group of the kernel's own events; udev's is 2
_ROUTE = 0x1 | 0x10 | 0x100 | 0x40 | 0x400  # RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, _IPV4_ROUTE, _IPV6_ROUTE
_ROOM = 1 << 16


class Arrivals:
    """Calls `came()` on the loop, once per burst, until `close`. Sources that cannot be watched are left out."""

    def __init__(self, came: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._came = came
        self._sockets: list[socket.socket] = []
        self._poll: select.epoll | None = None
        self._mounts = -1
        for protocol, groups in ((socket.NETLINK_ROUTE, _ROUTE), (_UEVENT, _KERNEL)):
            try:
                self._open(protocol, groups)
            except OSError as exc:
                log.warning("Netlink %d can't be listened to: %s", protocol, exc.strerror)
        try:
            self._watch_mounts()
        except OSError as exc:
            log.warning("%s can't be watched: %s", mountinfo.PATH, exc.strerror)

    def close(self) -> None:
        for one in self._sockets:
            self._loop.remove_reader(one.fileno())
            one.close()
        self._sockets.clear()
        if self._poll is not None:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None
        if self._mounts >= 0:
            os.close(self._mounts)
            self._mounts = -1

    def _open(self, protocol: int, groups: int) -> None:
        one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
        try:
            one.bind((0, groups))
        except OSError:
            one.close()
            raise
        self._sockets.append(one)
        self._loop.add_reader(one.fileno(), self._drain, one)

    def _drain(self, one: socket.socket) -> None:
        for _ in range(100):
            try:
                one.recv(_ROOM)
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:  # an overrun: more arrived than was read, so something did arrive
                    log.warning("Netlink: %s", exc)
                    self._loop.remove_reader(one.fileno())
                break
        self._came()

    def _watch_mounts(self) -> None:
        self._mounts = os.open(mountinfo.PATH, os.O_RDONLY | os.O_CLOEXEC)
        # The file is always readable, so the loop's own selector would spin.
        self._poll = select.epoll()
        self._poll.register(self._mounts, select.EPOLLPRI)
        self._loop.add_reader(self._poll.fileno(), self._mounted)

    def _mounted(self) -> None:
        if self._poll is not None:
            with contextlib.suppress(OSError):
                self._poll.poll(0)
        self._came()
