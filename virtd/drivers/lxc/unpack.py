# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that unpacks an archive, which anybody may have made, for a new container.

    python3 -IS unpack.py JOB    JOB: Job's fields as JSON; the archive comes on standard input

It runs in a unit of its own and imports nothing of virtd. Whatever reads or writes the archive's files does so in a
user namespace that has the container's IDs and no others, so it can do no more than the container could. Files that
are written there afterwards are never reached through a link, FIFO or device from the archive. It ends before the
disk is full.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWUSER = 0x10000000  # unshare(2)
ROOM = 1 << 30  # bytes of a disk that are left free, or a twentieth of it if that is less
LOOK = 0.2  # seconds between two looks at the free space
WORDS = 4096  # bytes of tar's messages that are passed on
NEEDED = "IDs up to {} are needed"  # our own last line, which create.py parses
# What tar writes for each file whose owner isn't among the container's IDs.
REFUSED = rb"Cannot change ownership to uid (\d{1,10}), gid (\d{1,10}): Invalid argument\n"
# Of the other attributes, trusted.* and security.* mean something to the host's kernel; a container's root has none.
ATTRIBUTES = ("--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability")


# "\\b" in a directory's name would be a backspace.
AS_IT_IS = "--no-unquote"


class Job(NamedTuple):
    """`ids`: the first and how many; `option`: tar's option for the archive's compression.

    `source` is a directory that is copied in place of an archive; `shifted` are the IDs of the container whose root
    file system that is, if it is one.
    """

    target: str
    hostname: str
    ids: list[int]
    option: str = ""
    source: str = ""
    shifted: list[int] | None = None


class Full(Exception):
    """The disk is full; the text is for a person."""


def run(job: Job, archive: int = 0) -> int:
    """The exit status."""
    if job.shifted and (highest := beyond(job.source, job.shifted)):
        os.write(2, f"{NEEDED.format(highest)}\n".encode())
        return 1
    said, say = os.pipe()
    processes = []
    if job.source:
        archive, into = os.pipe()
        processes.append(fork(lambda: pack(job.source, into, say), job.shifted))
        os.close(into)
    processes.append(fork(lambda: unpack(job, archive, say), job.ids))
    os.close(say)
    if job.source:
        os.close(archive)
    highest, full = 0, False
    try:
        highest = watch(job.target, said)
    except Full as exc:
        full = True  # even if they have just come to their end
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        os.write(2, f"{exc}\n".encode())
    finally:
        os.close(said)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
    if highest:
        os.write(2, f"{NEEDED.format(highest)}\n".encode())
    return int(full or any(ends))


def beyond(source: str, shifted: list[int]) -> int:
    """The highest ID past the container's own that a file belongs to, as the container counts; 0 if none does.

    In its user namespace such files would belong to nobody.
    """
    last = str(shifted[0] + shifted[1] - 1)
    words = ("find", source, "-xdev", "(", "-uid", f"+{last}", "-o", "-gid", f"+{last}", ")", "-printf", "%U %G\n")
    out, into = os.pipe()
    pid = fork(lambda: become(words, os.open(os.devnull, os.O_RDONLY), into, 2), None)
    os.close(into)
    with open(out, "rb") as lines:
        highest = max((int(word) for line in lines for word in line.split()), default=shifted[0])
    os.waitpid(pid, 0)
    return highest - shifted[0]


def watch(target: str, said: int) -> int:
    """Pass on the first WORDS bytes that the others write, until they have ended.

    Returns the highest ID that they reported as missing. Raises Full.
    """
    left, look, highest, line = WORDS, 0.0, 0, b""
    while True:
        if time.monotonic() >= look:
            require_room(target)
            look = time.monotonic() + LOOK
        if select.select([said], [], [], LOOK)[0]:
            if not (data := os.read(said, 65536)):
                return highest
            os.write(2, data[:left])
            left = max(0, left - len(data))
            whole, _, line = (line + data).rpartition(b"\n")
            line = line[-WORDS:]
            for found in re.finditer(REFUSED, whole + b"\n"):
                highest = max(highest, *map(int, found.groups()))


def require_room(target: str) -> None:
    status = os.statvfs(target)
    if status.f_bavail * status.f_frsize < min(ROOM, status.f_blocks * status.f_frsize // 20):
        raise Full("it would fill the disk")
    if status.f_files and status.f_favail < status.f_files // 100:
        raise Full("it has more files than the disk can take")


def fork(work: Callable[[], None], ids: list[int] | None) -> int:
    """Run `work` in a new process, as root of a user namespace with `ids`, if there are any: its PID."""
    ours, theirs = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        _child(work, ids, theirs[0], ours[1])
    for fd in (ours[1], theirs[0]):
        os.close(fd)
    try:
        if os.read(ours[0], 1) and ids:
            for kind in ("uid", "gid"):
                with open(f"/proc/{pid}/{kind}_map", "w", encoding="ascii") as file:
                    file.write(f"0 {ids[0]} {ids[1]}")
            os.write(theirs[1], b"1")
    finally:
        os.close(ours[0])
        os.close(theirs[1])
    return pid


def _child(work: Callable[[], None], ids: list[int] | None, done: int, ready: int) -> NoReturn:
    status = 1
    try:
        if ids:
            enter(done, ready)
        os.close(ready)
        work()
        status = 0
    except BaseException as exc:
        os.write(2, f"{exc}\n".encode(errors="replace"))
    finally:
        os._exit(status)


def enter(done: int, ready: int) -> None:
    """Become root of a user namespace, with the IDs that are written for it from outside. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), f"no user namespace: {os.strerror(ctypes.get_errno())}")
    os.write(ready, b"1")
    if not os.read(done, 1):
        raise OSError("the container's IDs can't be had")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def pack(source: str, into: int, say: int) -> None:
    words = (
        "tar",
        AS_IT_IS,
        "-C",
        source,
        *ATTRIBUTES,
        "--numeric-owner",
        "--one-file-system",
        "--sparse",
        "-cf",
        "-",
        ".",
    )
    become(words, os.open(os.devnull, os.O_RDONLY), into, say)


def become(words: tuple[str, ...], *stdio: int) -> NoReturn:
    for place, fd in enumerate(stdio):
        os.dup2(fd, place)
    os.execvp(words[0], words)


def unpack(job: Job, archive: int, say: int) -> None:
    """Unpack it, set its host name, and remove the identity that it has from the image."""
    os.umask(0o022)
    # Device nodes can't be made there, and a container gets its own.
    exclude = ("--exclude=./dev/*", "--exclude=dev/*")
    packed = (job.option,) if job.option else ()
    words = ("tar", AS_IT_IS, "-x", "--numeric-owner", *exclude, *ATTRIBUTES, *packed, "-C", job.target, "-f", "-")
    if os.waitstatus_to_exitcode(os.waitpid(fork(lambda: become(words, archive, say, say), None), 0)[1]):
        os._exit(1)
    root = os.open(job.target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        name(root, job.hostname)
    finally:
        os.close(root)


def name(root: int, hostname: str) -> None:
    """Write etc/hostname, and empty etc/machine-id, in a root file system whose names may be anything."""
    try:
        etc = os.open("etc", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except OSError:  # none, or a link to somewhere
        return
    try:
        replace(etc, "hostname", f"{hostname}\n")
        if "machine-id" in os.listdir(f"/proc/self/fd/{etc}"):
            replace(etc, "machine-id", "")
    finally:
        os.close(etc)


def replace(directory: int, name: str, text: str) -> None:
    """Replace whatever is there by a new file, without opening it; a directory stays."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o644, dir_fd=directory)
    except OSError:
        return
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(run(Job(**json.loads(sys.argv[1]))))
