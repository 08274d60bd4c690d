# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7) instances, of which each user can have fs.inotify.max_user_instances: 128 by default.

dnsmasq takes one to watch /etc/resolv.conf, and has no option against that, which limits the number of networks with
DNS, except isolated ones. What the processes of a container use counts as root's as well, because root made the
container's user namespace, and a system in a container uses five to ten.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

LIMIT = "/proc/sys/fs/inotify/max_user_instances"
LINK = "anon_inode:inotify"
SYSTEM = 8  # what a system in a container uses, more or less
HINT = "sysctl -w fs.inotify.max_user_instances={} allows more; a file in /etc/sysctl.d does from the next boot on."


def limit() -> int:
    """The limit; 0 if the kernel doesn't say."""
    try:
        with open(LIMIT, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def hint() -> str:
    """How to allow more of them."""
    return HINT.format(max(1024, 8 * limit()))


def taken(uid: int) -> int:
    """How many the processes of a user have open."""
    found = 0
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        directory = f"/proc/{entry}/fd"
        with contextlib.suppress(OSError):  # it has ended, or is none of ours
            if os.stat(f"/proc/{entry}").st_uid == uid:
                for fd in os.listdir(directory):
                    with contextlib.suppress(OSError):  # closed meanwhile, as is the one that lists our own
                        found += os.readlink(f"{directory}/{fd}") == LINK
    return found


def left(most: int) -> int:
    """How many root can still open, up to `most`, found by trying."""
    libc = ctypes.CDLL(None, use_errno=True)
    opened: list[int] = []
    try:
        while len(opened) < most and (fd := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
            opened.append(fd)
    finally:
        for fd in opened:
            os.close(fd)
    return len(opened)
