# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cached root: a Debian system made once for each set of inputs, which every lab overlays and none writes to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from . import recipe
from .paths import SOURCE, all_labs, cache_dir
from .say import say
from .state import LabError, read_state
from .suites import Suite

# Files whose text decides what a root holds. The rest of the lab may change without costing anybody a new root.
_INPUTS = (
    "recipe.py",
    "guest.py",
    "container.py",
    "cpio.py",
    "stubs.py",
    "guest/init",
    "guest/udhcpc",
    "guest/console.c",
)


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
        os.utime(root)
        return root
    with _lock(cache / f"{suite.name}.lock", f"another lab is making the {suite.name} root; waiting for it"):
        if not root.exists():
            for left in cache.glob(f".*ing-{suite.name}-*"):
                remove_tree(left)
            building = cache / f".building-{suite.name}-{os.getpid()}"
            log = cache / f"{suite.name}.log"
            log.write_text("")
            say(f"making the {suite.name} root (once for each set of inputs; log: {log})")
            try:
                recipe.make(suite, building, log, key_of(suite))
                building.rename(root)
                os.utime(root)
            finally:
                remove_tree(building)
            say(f"the {suite.name} root is ready: {root}")
        prune(suite, keep=root)
    return root


def prune(suite: Suite, keep: Path) -> None:
    """Removes the suite's roots of other inputs that no lab stands on and none has been made from for an hour.

    The hour is for two checkouts that share a cache. Each root is renamed before the second look at what labs use: a
    lab notes its root first and mounts it then, so one that comes in between finds no root there and says so, and
    none gets a root that is being deleted.
    """
    for old in cache_dir().glob(f"{suite.name}-*"):
        recent = time.time() - old.stat().st_mtime < 3600
        if not old.is_dir() or old == keep or recent or str(old) in _used():
            continue
        doomed = old.with_name(f".removing-{old.name}")
        old.rename(doomed)
        if str(old) in _used():
            doomed.rename(old)
            continue
        say(f"removing the outdated root {old.name}")
        remove_tree(doomed)


def _used() -> set[str | None]:
    return {read_state(str(lab.dir)).get("root") for lab in all_labs()}


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
