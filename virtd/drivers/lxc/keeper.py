# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has containers live through a soft reboot: virtd-keeper.service, at its very end.

A soft reboot kills every process whose own control group isn't marked (killall.c of systemd 255). systemd marks a
unit's group by SurviveFinalKillSignal=, and no group below it, where LXC and all that a container makes are. So each
of those is marked before the killing begins, and what a container makes from then on as soon as it is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import select
import socket
import struct
import sys
import time

GROUPS = "/sys/fs/cgroup/virtd.slice/virtd-lxc.slice/virtd-*lxc-*.service"
MARK = "survive_final_kill_signal"  # of "user.", or "trusted." before Linux 5.7
OUTLAST = 60.0  # seconds; at this point nothing but the killing and the new systemd's start is ahead

IN_CREATE = 0x100
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000
EVENT = struct.Struct("iIII")


class Keeper:
    """Marks groups, and those that are made below them."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._watched: dict[int, str] = {}

    def take(self, group: str) -> None:
        """Watch it first, look below it last: what is made meanwhile is seen at least once."""
        watch = self._libc.inotify_add_watch(self.fd, os.fsencode(group), IN_CREATE | IN_ONLYDIR)
        if watch < 0:
            return  # it has just ended
        self._watched[watch] = group
        with contextlib.suppress(OSError):
            mark(group)
            with os.scandir(group) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            for path in below:
                self.take(path)

    def look(self) -> None:
        """Take what is new."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.fd, 1 << 16)
            at = 0
            while at < len(data):
                watch, mask, _, length = EVENT.unpack_from(data, at)
                name = data[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0")
                at += EVENT.size + length
                if mask & IN_IGNORED:
                    self._watched.pop(watch, None)
                elif name and (group := self._watched.get(watch)) is not None:
                    self.take(f"{group}/{os.fsdecode(name)}")

    def close(self) -> None:
        os.close(self.fd)


def mark(group: str) -> None:
    """Raises OSError."""
    try:
        os.setxattr(group, f"user.{MARK}", b"1")
    except FileNotFoundError:
        raise
    except OSError:
        os.setxattr(group, f"trusted.{MARK}", b"1")


def _ready() -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto(b"READY=1", f"\0{path[1:]}" if path.startswith("@") else path)


def main() -> int:
    keeper = Keeper()
    for group in glob.glob(GROUPS):
        keeper.take(group)
    _ready()
    poll = select.poll()
    poll.register(keeper.fd, select.POLLIN)
    until = time.monotonic() + OUTLAST
    while (left := until - time.monotonic()) > 0:
        poll.poll(left * 1000)
        keeper.look()
    return 0


if __name__ == "__main__":
    sys.exit(main())
