# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps containers alive over a soft reboot: virtd-keeper.service, at its very end.

A soft reboot kills every process whose own control group isn't marked (killall.c of systemd 255). With
SurviveFinalKillSignal= systemd marks a unit's group, but no group below it, where LXC and a container's processes
are. So each of those is marked before the killing begins. Containers are frozen throughout, so no new group can
appear. systemd itself stops all processes before it looks for those to kill, and continues them afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import signal
import socket
import struct
import sys
import time

from . import config

GROUPS = "/sys/fs/cgroup/virtd.slice/virtd-lxc.slice/virtd-*lxc-*.service"
MARK = "survive_final_kill_signal"  # of "user.", or "trusted." before Linux 5.7
FREEZE_LIMIT = 1.0  # seconds that freezing may take
KILL_LIMIT = 10.0  # seconds by which the killing must have begun; containers go on in any case
QUIET = 0.1  # seconds without another SIGCONT after which it is over

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
        """Watch `group` before looking below it: a group that is made meanwhile is seen at least once."""
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
        """Take the groups that are new."""
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

    def freeze(self, units: list[str]) -> list[str]:
        """Freeze all containers: the groups of those that weren't frozen before."""
        frozen = []
        for group in (found for unit in units if (found := payload(unit)) is not None):
            with contextlib.suppress(OSError):
                if _read(f"{group}/cgroup.freeze") == "0":
                    freeze(group, on=True)
                    frozen.append(group)
        until = time.monotonic() + FREEZE_LIMIT
        while time.monotonic() < until and not all("frozen 1" in _read(f"{group}/cgroup.events") for group in frozen):
            time.sleep(0.002)
        self.look()
        return frozen

    def close(self) -> None:
        os.close(self.fd)


def payload(unit: str) -> str | None:
    """A container's own control group, below its unit's; one deeper after each reboot, see cgroup.payload_of()."""
    while not os.path.isdir(f"{unit}/{config.PAYLOAD}"):
        unit = f"{unit}/{config.PIVOT}"
        if not os.path.isdir(unit):
            return None
    return f"{unit}/{config.PAYLOAD}"


def mark(group: str) -> None:
    """Raises OSError."""
    try:
        os.setxattr(group, f"user.{MARK}", b"1")
    except FileNotFoundError:
        raise
    except OSError:
        os.setxattr(group, f"trusted.{MARK}", b"1")


def freeze(group: str, *, on: bool) -> None:
    """Raises OSError."""
    with open(f"{group}/cgroup.freeze", "w", encoding="ascii") as file:
        file.write("1" if on else "0")


def _read(path: str) -> str:
    """ "" if there is none: it has ended."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _ready() -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto(b"READY=1", f"\0{path[1:]}" if path.startswith("@") else path)


def main() -> int:
    # systemd sends it to all processes after the killing. It continues us even while it is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})
    keeper = Keeper()
    units = glob.glob(GROUPS)
    for unit in units:
        keeper.take(unit)
    frozen = keeper.freeze(units)
    try:
        _ready()
        limit = KILL_LIMIT
        while signal.sigtimedwait({signal.SIGCONT}, limit) is not None:
            limit = QUIET
    finally:
        for group in frozen:
            with contextlib.suppress(OSError):
                freeze(group, on=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
