# SPDX-License-Identifier: LGPL-2.1-or-later
"""/etc/virtd/virtd.toml: the daemon's own settings. Every one has a default; the file may be missing."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from .. import errors
from . import document, size

SHARED = "virtd-qemu"  # the user and group that the package makes

# With less a guest that does nothing wrong could be killed, or its disks fail: see drivers/qemu/limits.py.
OVERHEAD_MIN, TASKS_MIN = 256 << 20, 128

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of each console and stderr log; `backups` older files are kept besides the current one."""

    max_size: str | int = "16M"
    backups: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3

    @property
    def max_bytes(self) -> int:
        return size.parse(self.max_size)


class Qemu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The QEMU driver. `binary` empty: the host's architecture's qemu-system in the usual places.

    `user` empty: each guest runs as a user of its own, with an ID of the `uid_count` from `first_uid` on. A guest may
    take `memory_overhead` besides its memory ("unlimited": no limit), and have `tasks_overhead` threads besides its
    vCPUs' (0: no limit).
    """

    binary: str = ""
    user: str = ""
    group: str = ""
    first_uid: Annotated[int, msgspec.Meta(ge=1000, le=0x7FFFFFFE)] = 0x78000000
    uid_count: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 0x10000
    memory_overhead: str | int = "1G"
    tasks_overhead: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 256
    start_timeout: Seconds = 30
    shutdown_timeout: Seconds = 60
    host_shutdown_timeout: Seconds = 60

    @property
    def shared_user(self) -> str:
        """The user that jobs on volumes run as, and, if `user` is set, all guests."""
        return self.user or SHARED

    @property
    def shared_group(self) -> str:
        return self.group or SHARED

    @property
    def overhead_bytes(self) -> int | None:
        """None: no limit."""
        return None if self.memory_overhead == "unlimited" else size.parse(self.memory_overhead)


class Dnsmasq(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The DHCP and DNS server of networks. `binary` empty: dnsmasq in the usual places."""

    binary: str = ""
    user: str = "virtd-dnsmasq"


class Lxc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The LXC driver. `directory` is where new containers' root file systems are put.

    `memory` and `pids` limit containers whose definitions don't: a size, or a share of the host's memory; processes
    and threads, 0 for as many as suit the host.
    """

    directory: str = "/var/lib/virtd/containers"
    memory: str | int = "75%"
    pids: Annotated[int, msgspec.Meta(ge=0, le=4194304)] = 0
    start_timeout: Seconds = 30
    shutdown_timeout: Seconds = 60
    host_shutdown_timeout: Seconds = 60

    def memory_bytes(self, total: int) -> int:
        """`memory`, on a host that has `total` bytes. Raises ValueError."""
        if isinstance(self.memory, str) and (share := re.fullmatch("([0-9]{1,3})%", self.memory.strip())):
            if not 1 <= int(share[1]) <= 100:
                raise ValueError(self.memory)
            return total * int(share[1]) // 100
        return size.parse(self.memory)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    log: Log = Log()
    qemu: Qemu = Qemu()
    dnsmasq: Dnsmasq = Dnsmasq()
    lxc: Lxc = Lxc()


def parse(text: str, source: str) -> Settings:
    """Raises InvalidDefinition."""
    settings = document.decode(text, source, Settings)
    try:
        limit = settings.log.max_bytes
    except ValueError:
        limit = -1
    if limit < 1 << 16:
        raise errors.InvalidDefinition(source, "log.max_size", 'expected a size of at least 64K, such as "16M"')
    try:
        overhead = settings.qemu.overhead_bytes
    except ValueError:
        overhead = -1
    if overhead is not None and overhead < OVERHEAD_MIN:
        raise errors.InvalidDefinition(
            source, "qemu.memory_overhead", 'expected a size of at least 256M, such as "1G", or "unlimited"'
        )
    if 0 < settings.qemu.tasks_overhead < TASKS_MIN:
        raise errors.InvalidDefinition(
            source, "qemu.tasks_overhead", f"expected at least {TASKS_MIN}, or 0: no limit"
        )
    if settings.qemu.first_uid + settings.qemu.uid_count > 0x7FFFFFFF:
        raise errors.InvalidDefinition(source, "qemu.uid_count", "expected user IDs below 2147483647")
    for key, binary in (("qemu.binary", settings.qemu.binary), ("dnsmasq.binary", settings.dnsmasq.binary)):
        if binary and not binary.startswith("/"):
            raise errors.InvalidDefinition(source, key, "expected an absolute path")
        if re.search(r"[\\\"'$%;\0-\x1f\x7f]", binary):
            # systemd considers a unit with such a program broken, at the latest when it reads its units again.
            raise errors.InvalidDefinition(
                source, key, f"expected a path that systemd can run: no quotes, backslashes, $, % or ;, got {binary}"
            )
    if not settings.lxc.directory.startswith("/"):
        raise errors.InvalidDefinition(source, "lxc.directory", "expected an absolute path")
    try:
        memory = settings.lxc.memory_bytes(1 << 40)
    except ValueError:
        memory = 0
    if memory < 1 << 20:
        raise errors.InvalidDefinition(
            source, "lxc.memory", 'expected a size of at least 1M, such as "4G", or a share of the host\'s, as "75%"'
        )
    return settings
