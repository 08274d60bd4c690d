# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every test gets: it fails when it leaves an asyncio task, a child process or a file descriptor behind.

A daemon that runs for years dies of these, and each is found most cheaply on the day that it is written.
"""

from __future__ import annotations

import asyncio
import asyncio.runners
import contextlib
import gc
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Who starts the tests in the background (a CI does) may have them ignore these, and what is ignored stays so in every
# program that is started from here: virtdctl would then bear the ^C that a test sends it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

# GLib and GDBus keep these threads for as long as the process lives, each with an eventfd, from the first use on.
GLIB_THREADS = frozenset({"gmain", "gdbus", "pool-spawner", "dconf worker"})
EVENTFD = "anon_inode:[eventfd]"
PATIENCE = 5.0  # seconds for another thread to close what this one no longer needs


def open_descriptors() -> dict[int, str]:
    """Every open descriptor and what it refers to."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


def child_processes() -> set[int]:
    """PIDs of our children, zombies included."""
    children: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as file:
            children.update(int(pid) for pid in file.read().split())
    return children


def glib_threads() -> int:
    """How many of GLib's permanent threads there are."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/comm") as file:
            count += file.read().strip() in GLIB_THREADS
    return count


def command_line(pid: int) -> str:
    """Empty for a moment after execve(2) has closed descriptors, by which Popen knows that it was called."""
    for _ in range(30):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if words := file.read():
                return words.replace(b"\0", b" ").decode(errors="replace").strip()
        time.sleep(0.01)
    return "?"


def end_child(pid: int) -> None:
    """A leaked child must not disturb the tests that follow."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def left_open(descriptors: dict[int, str], threads: int) -> list[str]:
    """Which descriptors are open that weren't, given those and the number of GLib's threads before."""
    new_threads = glib_threads() > threads
    return [
        f"descriptor {fd}: {target}"
        for fd, target in open_descriptors().items()
        if descriptors.get(fd) != target and not (new_threads and target == EVENTFD)
    ]


def pytest_collection_finish() -> None:
    """Set aside what there is before the first test: no collection after a test need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    descriptors = open_descriptors()
    children = child_processes()
    threads = glib_threads()
    tasks: list[str] = []

    # asyncio.run() cancels what is left when the main coroutine returns and says nothing, so a leaked task shows only
    # there. The name is private; a Python that renames it fails here, by an AttributeError, and not silently.
    cancel_all = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

    def watch(loop: asyncio.AbstractEventLoop) -> None:
        tasks.extend(repr(task) for task in asyncio.all_tasks(loop))
        cancel_all(loop)

    def patch(function: Any) -> None:
        asyncio.runners._cancel_all_tasks = function  # type: ignore[attr-defined]

    patch(watch)
    try:
        yield
    finally:
        patch(cancel_all)

    # An object that closes its descriptor in __del__ warns about it, which -W error turns into a failure of its own.
    gc.collect()
    problems = [f"task {task}" for task in tasks]
    for pid in child_processes() - children:
        problems.append(f"child process {pid}: {command_line(pid)}")
        end_child(pid)
    # The last reference to a closed connection, and to its main context's eventfd, is dropped by GDBus' thread
    # when it next runs.
    deadline = time.monotonic() + PATIENCE
    while (left := left_open(descriptors, threads)) and all(EVENTFD in one for one in left):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    problems += left
    if problems:
        pytest.fail("the test left behind\n  " + "\n  ".join(problems), pytrace=False)
