# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's mounts, from inside the mount namespace that units/virtd.service gives to virtd.

What is mounted on the host later appears there, and what is unmounted disappears. But a mount that is made read-only
(mount -o remount,ro,bind) stays writable there, and mounts below a private one never appear. So the files that
definitions name, and the kernel's settings, are reached through PID 1's root directory, proc_pid_root(5), where every
mount is as it is on the host. This takes CAP_SYS_PTRACE.
"""

from __future__ import annotations

import os


def _apart() -> bool:
    """Whether our mount namespace differs from PID 1's; False if that can't be determined."""
    try:
        return not os.path.samefile("/proc/self/ns/mnt", "/proc/1/ns/mnt")
    except OSError:
        return False


# Put before an absolute path, it leads to the host's file of that path. Empty without a namespace of our own.
PREFIX = "/proc/1/root" if _apart() else ""


def seen(path: str) -> str:
    """A path by which this process reaches the host's file `path`. An absolute link in it is followed in our own
    namespace; `reach.reached` follows all of them on the host."""
    return f"{PREFIX}{path}"


MOUNTS = "/proc/1/mountinfo" if PREFIX else "/proc/self/mountinfo"
