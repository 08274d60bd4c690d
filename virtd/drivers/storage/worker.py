# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of jobs that don't involve a format: copy a file with its holes, or overwrite one with zeros.

    python3 -IS worker.py copy SOURCE TARGET [-- PROGRAM ARGUMENT...]
    python3 -IS worker.py wipe TARGET [-- PROGRAM ARGUMENT...]

It imports nothing of virtd. It writes its progress to stdout as `qemu-img -p` does, and errors to stderr. When it is
done it executes PROGRAM.
"""

from __future__ import annotations

import errno
import os
import sys

CHUNK = 16 << 20
TELL = 64 << 20  # bytes between two lines of progress
WINDOW = 64 << 20  # bytes after which the disk is made to begin writing


class Progress:
    """Reports now and then how much of `total` bytes is done."""

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._told = -TELL

    def add(self, count: int) -> None:
        self._done += count
        if self._done - self._told >= min(TELL, self._total // 100 or 1):
            self._told = self._done
            text = f"    ({min(100.0, self._done * 100 / self._total):.2f}/100%)\r"
            try:
                os.write(1, text.encode())
            except BrokenPipeError:  # systemd's store lost virtd's end, which is no reason to fail
                self._told = 2 * self._total


class Writeback:
    """Makes the disk begin with what is written, so that little is left to wait for at the end.

    Linux starts writing dirty pages that POSIX_FADV_DONTNEED names: posix_fadvise(2).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begun = 0

    def reached(self, at: int) -> None:
        if at - self._begun >= WINDOW:
            os.posix_fadvise(self._fd, self._begun, at - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = at


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data and no holes, as (start, end)."""
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole is left
                break
            if exc.errno == errno.EINVAL:  # a device has neither
                return [(at, size)]
            raise
        found.append((start, end))
        at = end
    return found


def length(fd: int) -> int:
    """The size, also of a block device, where fstat(2) has none."""
    return os.lseek(fd, 0, os.SEEK_END)


def copy(source: str, target: str) -> None:
    """Copy the data of `source`, leaving holes where it has some; a target that is a device gets zeros there."""
    old = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    new = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    size = length(old)
    regular = os.path.isfile(target)
    if regular:
        os.ftruncate(new, size)
    parts = extents(old, size) if regular else [(0, size)]
    progress = Progress(sum(end - start for start, end in parts))
    writeback = Writeback(new)
    kernel = regular
    for start, end in parts:
        at = start
        while at < end:
            count = 0
            if kernel:
                try:
                    count = os.copy_file_range(old, new, min(CHUNK, end - at), at, at)
                except OSError as exc:
                    if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                        raise
                    kernel = False
                    continue
                if count == 0:
                    raise OSError(errno.EIO, "the source became shorter")
            else:
                data = os.pread(old, min(CHUNK, end - at), at)
                if not data:
                    raise OSError(errno.EIO, "the source became shorter")
                write(new, data, at)
                count = len(data)
            at += count
            writeback.reached(at)
            progress.add(count)
    os.fsync(new)


def wipe(target: str) -> None:
    """Overwrite all data with zeros; holes have none."""
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    parts = extents(fd, length(fd))
    progress = Progress(sum(end - start for start, end in parts))
    writeback = Writeback(fd)
    zeros = bytes(CHUNK)
    for start, end in parts:
        at = start
        while at < end:
            piece = min(CHUNK, end - at)
            write(fd, zeros[:piece], at)
            at += piece
            writeback.reached(at)
            progress.add(piece)
    os.fsync(fd)


def write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, after = arguments[:at], arguments[at + 1 :]
    try:
        match arguments:
            case ["copy", source, target]:
                copy(source, target)
            case ["wipe", target]:
                wipe(target)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except OSError as exc:
        print(f"{exc.strerror or exc}", file=sys.stderr)
        return 1
    if after:
        os.execv(after[0], after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
