# SPDX-License-Identifier: LGPL-2.1-or-later
"""The root file system for containers that labs hold: a small Debian with a full systemd, as an archive.

/usr/share/virtd-lab/debian.tar.xz; root has no password there.
"""

from __future__ import annotations

from pathlib import Path

from .say import run, say

_PACKAGES = ("systemd", "systemd-sysv", "dbus", "iproute2", "procps")


def make(root: Path, scratch: Path, log: Path, name: str, *, old_lists: bool) -> None:
    """Makes the archive of the suite `name` in `root`."""
    say("  a Debian for containers")
    archive = scratch / "debian.tar"
    hook = (
        'set -e; chroot "$1" passwd -q -d root; rm -f "$1/etc/hostname" "$1/etc/resolv.conf"; : >"$1/etc/machine-id"'
    )
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", "--"]
    argv += ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar"]
    argv += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    if old_lists:
        argv += ['--aptopt=Acquire::Check-Valid-Until "false"']
    argv += [f"--dpkgopt=path-exclude=/usr/share/{junk}/*" for junk in ("doc", "man", "locale", "info", "i18n")]
    argv += [f"--include={','.join(_PACKAGES)}", f"--customize-hook={hook}", name, str(archive)]
    run(argv, what="making a Debian for containers", log=log, timeout=1800)
    run(["xz", "-1", "-T2", str(archive)], what="packing it", log=log)
    Path(f"{archive}.xz").rename(root / "usr/share/virtd-lab/debian.tar.xz")
