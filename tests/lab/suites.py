# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian suites that a lab can be made of, and what is put into their roots."""

from __future__ import annotations

from dataclasses import dataclass

from .state import LabError

DEFAULT = "trixie"

# What virtd and its tests use. Recommended packages are left out: they would bring a desktop along.
_PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "python3", "python3-gi", "gir1.2-glib-2.0", "python3-systemd",
    "python3-pydbus", "qemu-system-x86", "seabios", "ipxe-qemu", "qemu-utils", "dnsmasq-base", "nftables", "iproute2",
    "python3-nftables", "firewalld", "iputils-ping", "rpm", "kmod", "strace", "procps", "util-linux", "less", "jq",
    "lxc", "xz-utils", "systemd-container", "e2fsprogs", "xfsprogs", "btrfs-progs", "libnss-systemd", "ovmf",
    "swtpm", "swtpm-tools",
)  # fmt: skip

# What the guest and its disk are made of: fetched and unpacked, never installed.
_GUEST_PACKAGES = ("busybox-static", "mtools", "dosfstools", "syslinux", "syslinux-common")


@dataclass(frozen=True)
class Suite:
    """One suite: `python` is its Python's version, `wheels` what it lacks and PyPI has, as pip requirements."""

    name: str
    systemd: int
    python: str
    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    kernel: str = "linux-image-cloud-amd64"
    guest_packages: tuple[str, ...] = _GUEST_PACKAGES
    # Testing's package lists are valid for a week, and a mirror may lag behind; old packages do no harm in a lab.
    lists_may_be_old: bool = False


SUITES = {
    suite.name: suite
    for suite in (
        # firewalld of bookworm wants /etc/protocols, and doesn't say so.
        Suite("bookworm", 252, "3.11", (*_PACKAGES, "netbase"), ("msgspec==0.19.0", "qemu.qmp==0.0.6")),
        Suite("trixie", 257, "3.13", (*_PACKAGES, "python3-msgspec"), ("qemu.qmp==0.0.6",)),
        Suite("forky", 262, "3.14", (*_PACKAGES, "python3-msgspec", "python3-qemu-qmp"), (), lists_may_be_old=True),
    )
}


def suite_named(name: str) -> Suite:
    """The suite, or LabError with those there are."""
    try:
        return SUITES[name]
    except KeyError:
        raise LabError(f"no suite {name!r}; there are {', '.join(sorted(SUITES))}") from None
