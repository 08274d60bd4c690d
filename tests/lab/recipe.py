# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a root is made: Debian's packages, a few of PyPI's, the guest, and the RPM that names them all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from . import container, guest, stubs
from .say import in_root, run, say
from .suites import Suite

# Units that would only cost time at boot or do something of their own while a test measures.
_MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "man-db.timer", "lxc.service", "lxc-net.service", "lxc-monitord.service",
    "console-getty.service", "getty.target", "systemd-tmpfiles-clean.timer", "xfs_scrub_all.timer",
)  # fmt: skip

# There for the tests that start it; its rules would be in the way of all others.
_DISABLED = ("firewalld.service",)

# In the root, but outside what Debian or mmdebstrap would clean away.
_SCRATCH = "var/virtd-lab-build"


def make(suite: Suite, root: Path, log: Path, key: str) -> None:
    """Makes the suite's root as `root`, which must not exist; what the steps print goes to `log`."""
    say(f"  Debian {suite.name}: {len(suite.packages)} packages and what they need (about a minute)")
    fetch = " ".join(suite.guest_packages)
    # The image package is asked for by its metapackage, which only depends on the one of the moment; from forky on
    # that one too depends on the packages that have the files.
    hook = f"""set -e
        mkdir -p "$1/{_SCRATCH}/debs"
        chroot "$1" sh -ec 'cd /{_SCRATCH}/debs
            needs() {{ apt-cache depends "$1" | sed -nE "s/.*Depends: *(linux-($2)-[^ ]*).*/\\1/p"; }}
            kernel=$(needs {suite.kernel} image | head -n 1)
            parts=$(needs "$kernel" "binary|modules")
            apt-get download -q -o APT::Sandbox::User=root "$kernel" $parts {fetch}'"""
    # A mount and a PID namespace of its own: whatever ends this process ends the whole build and its mounts.
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", "--"]
    argv += ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
    argv += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    if suite.lists_may_be_old:
        argv += ['--aptopt=Acquire::Check-Valid-Until "false"']
    argv += [f"--dpkgopt=path-exclude=/usr/share/{junk}/*" for junk in ("doc", "man", "locale", "info")]
    argv += [f"--include={','.join(suite.packages)}", f"--customize-hook={hook}", suite.name, str(root)]
    run(argv, what=f"making the {suite.name} root", log=log, timeout=1800)
    _configure(suite, root)
    if suite.wheels:
        say(f"  from PyPI: {', '.join(suite.wheels)}")
        _wheels(suite, root, log)
    scratch = root / _SCRATCH
    guest.make(root, scratch, log)
    container.make(root, scratch, log, suite.name, old_lists=suite.lists_may_be_old)
    say("  RPM stubs that name Debian's packages")
    stubs.install(root, scratch, log)
    shutil.rmtree(scratch)
    made = {"suite": suite.name, "key": key}
    (root / "usr/share/virtd-lab/root.json").write_text(json.dumps(made) + "\n")


def _configure(suite: Suite, root: Path) -> None:
    units = root / "etc/systemd/system"
    for unit in _MASKED:
        link = units / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    for unit in _DISABLED:
        for link in units.rglob("*"):
            if link.is_symlink() and link.readlink().name == unit:
                link.unlink()
    for name in ("etc/hostname", "etc/resolv.conf", "etc/machine-id", "var/lib/dbus/machine-id"):
        (root / name).unlink(missing_ok=True)
    # Tests compare times of host and lab; a lab has no time zone of its own.
    (root / "etc/localtime").unlink(missing_ok=True)
    (root / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")


def _wheels(suite: Suite, root: Path, log: Path) -> None:
    target = root / f"usr/local/lib/python{suite.python}/dist-packages"
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    argv += ["--implementation=cp", f"--python-version={suite.python}", f"--target={target}", *suite.wheels]
    run(argv, what="fetching Python packages", log=log)
    inside = f"/usr/local/lib/python{suite.python}/dist-packages"
    run(in_root(root, [f"python{suite.python}", "-m", "compileall", "-q", inside]), what="compiling them", log=log)
