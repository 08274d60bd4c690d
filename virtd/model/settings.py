# SPDX-License-Identifier: LGPL-2.1-or-later
"""/etc/virtd/virtd.toml: the daemon's own settings. Every one has a default; the file may be missing."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .. import errors
from . import document, size

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of each console and stderr log; `backups` older files are kept besides the one that is written."""

    max_size: str | int = "16M"
    backups: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3

    @property
    def max_bytes(self) -> int:
        return size.parse(self.max_size)


class Qemu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The QEMU driver. `binary` empty: the host's architecture's qemu-system in the usual places."""

    binary: str = ""
    user: str = "virtd-qemu"
    group: str = "virtd-qemu"
    start_timeout: Seconds = 30
    shutdown_timeout: Seconds = 60
    host_shutdown_timeout: Seconds = 60


class Dnsmasq(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What serves networks with addresses and names. `binary` empty: dnsmasq in the usual places."""

    binary: str = ""
    user: str = "virtd-dnsmasq"


class Lxc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The LXC driver. `directory` is where `virtctl container create` puts root file systems."""

    directory: str = "/var/lib/virtd/containers"
    start_timeout: Seconds = 30
    shutdown_timeout: Seconds = 60
    host_shutdown_timeout: Seconds = 60


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
    for key, binary in (("qemu.binary", settings.qemu.binary), ("dnsmasq.binary", settings.dnsmasq.binary)):
        if binary and not binary.startswith("/"):
            raise errors.InvalidDefinition(source, key, "expected an absolute path")
    if not settings.lxc.directory.startswith("/"):
        raise errors.InvalidDefinition(source, "lxc.directory", "expected an absolute path")
    return settings
