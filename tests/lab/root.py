# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cached root: a Debian system made once for each set of inputs, which every lab overlays and none writes to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from . import guest, stubs
from .paths import SOURCE, all_labs, cache_dir
from .say import LabError, in_root, run, say
from .suites import Suite

# Files whose text decides what a root holds. The rest of the lab may change without costing anybody a new root.
_INPUTS = ("root.py", "suites.py", "guest.py", "cpio.py", "stubs.py", "guest/init", "guest/console.c")

# Units that would only cost time at boot or do something of their own while a test measures.
_MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "man-db.timer", "console-getty.service", "getty.target", "systemd-tmpfiles-clean.timer",
)  # fmt: skip

# In the root, but outside what Debian or mmdebstrap would clean away.
_SCRATCH = "var/virtd-lab-build"


def key_of(suite: Suite) -> str:
    """A short hash of everything that decides what the suite's root will hold, Debian's own changes excepted."""
    digest = hashlib.sha256(repr(suite).encode())
    for name in _INPUTS:
        digest.update(b"\0" + name.encode() + b"\0" + (SOURCE / name).read_bytes())
    return digest.hexdigest()[:12]


def cached_root(suite: Suite) -> Path:
    """The suite's root, made first when there is none for the present inputs. Safe to call from several processes."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"{suite.name}-{key_of(suite)}"
    if root.exists():
        return root
    with _lock(cache / f"{suite.name}.lock", f"another lab is making the {suite.name} root; waiting for it"):
        if not root.exists():
            for left in cache.glob(f".building-{suite.name}-*"):
                remove_tree(left)
            building = cache / f".building-{suite.name}-{os.getpid()}"
            log = cache / f"{suite.name}.log"
            log.write_text("")
            say(f"making the {suite.name} root (once for each set of inputs; log: {log})")
            try:
                _build(suite, building, log)
                building.rename(root)
            finally:
                remove_tree(building)
            say(f"the {suite.name} root is ready: {root}")
        prune(suite, keep=root)
    return root


def prune(suite: Suite, keep: Path) -> None:
    """Removes the suite's roots of other inputs, unless a lab still stands on one."""
    used = {lab.read().get("root") for lab in all_labs()}
    for old in cache_dir().glob(f"{suite.name}-*"):
        if old.is_dir() and old != keep and str(old) not in used:
            say(f"removing the outdated root {old.name}")
            remove_tree(old)


def remove_tree(top: Path) -> None:
    """Deletes a tree that nothing is mounted in: a mount below it would have its contents deleted along."""
    if not top.exists():
        return
    prefix = f"{top.resolve()}/"
    with open("/proc/self/mountinfo") as mounts:
        inside = [point for point in (line.split()[4] for line in mounts) if f"{point}/".startswith(prefix)]
    if inside:
        raise LabError(f"{inside[-1]} is still mounted, so {top} is not removed")
    shutil.rmtree(top)


@contextlib.contextmanager
def _lock(path: Path, waiting: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(suite: Suite, root: Path, log: Path) -> None:
    say(f"  Debian {suite.name}: {len(suite.packages)} packages and what they need (about a minute)")
    fetch = " ".join(suite.guest_packages)
    # The image package is asked for by its metapackage, which only depends on the one of the moment.
    hook = f"""set -e
        mkdir -p "$1/{_SCRATCH}/debs"
        chroot "$1" sh -ec 'cd /{_SCRATCH}/debs
            kernel=$(apt-cache depends {suite.kernel} | sed -n "s/.*Depends: *\\(linux-image-[^ ]*\\).*/\\1/p" | head -n 1)
            apt-get download -q -o APT::Sandbox::User=root "$kernel" {fetch}'"""
    # A mount and a PID namespace of its own: whatever ends this process ends the whole build and its mounts.
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", "--"]
    argv += ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
    argv += ["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{junk}/*" for junk in ("doc", "man", "locale", "info")]
    argv += [f"--include={','.join(suite.packages)}", f"--customize-hook={hook}", suite.name, str(root)]
    run(argv, what=f"making the {suite.name} root", log=log, timeout=1800)
    _configure(suite, root)
    if suite.wheels:
        say(f"  from PyPI: {', '.join(suite.wheels)}")
        _wheels(suite, root, log)
    scratch = root / _SCRATCH
    guest.make(root, scratch, log)
    say("  RPM stubs that name Debian's packages")
    stubs.install(root, scratch, log)
    shutil.rmtree(scratch)
    made = {"suite": suite.name, "key": key_of(suite)}
    (root / "usr/share/virtd-lab/root.json").write_text(json.dumps(made) + "\n")


def _configure(suite: Suite, root: Path) -> None:
    units = root / "etc/systemd/system"
    for unit in _MASKED:
        link = units / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
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
