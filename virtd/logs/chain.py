# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a log, for its readers: which exist, in which order, and where lines begin.

A follower's place is a `Cursor`: the file's id ("dev:ino") and an offset. The follower keeps that file open, so the
id can't be reused for another file meanwhile. Reading the file to its end and continuing with `newer()` at offset 0
gives every byte once, across any number of rotations.

The writing thread (see logfile.py) reports each rotation. Everything else reads a snapshot and may be called from any
thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# Files that have left the chain and are still remembered for followers that hold them open.
RETIRED = 64
UNKNOWN = -1  # an unknown number of bytes was missed, perhaps none

_BLOCK = 1 << 16


class Segment(NamedTuple):
    """One file of the log: its id ("dev:ino"), its path at the time of asking, its size in bytes."""

    file: str
    path: str
    size: int


class Cursor(NamedTuple):
    """A place in the log: a file's id and the offset of the next byte to read there."""

    file: str
    offset: int


class Retired(NamedTuple):
    """A removed file: its size, the file after it, and the number of bytes in other files between the two."""

    size: int
    successor: str
    between: int


def file_id(status: os.stat_result) -> str:
    """The id of a file in a cursor."""
    return f"{status.st_dev}:{status.st_ino}"


class Current:
    """The file that grows. A rotation makes a new object, so that a snapshot is consistent."""

    __slots__ = ("file", "size")

    def __init__(self, file: str, size: int) -> None:
        self.file = file
        self.size = size


class Chain:
    """The current file of the log at `path` and up to `backups` older ones. It begins with `now` alone."""

    def __init__(self, path: str, backups: int, now: Current) -> None:
        self.path = path
        self.backups = backups
        self._retired: OrderedDict[str, Retired] = OrderedDict()
        self._files: tuple[tuple[Segment, ...], Current] = ((), now)

    # For the writing thread

    def backup(self, number: int) -> str:
        """The path of the backup with this number; 1 is the newest."""
        return f"{self.path}.{number}"

    def found(self, now: Current) -> None:
        """This is now the log's current file, whatever it was before; its backups are those in the directory."""
        older = self._scan()
        before = self._files[1]
        if now is not before:
            if before.file and all(segment.file != before.file for segment in older):
                self._retire(before.file, before.size, now.file)
            self._reuse(now.file)
        self._files = (older, now)

    def rotated(self, now: Current) -> None:
        """The current file has become the newest backup, and this one has replaced it."""
        files = self._snapshot()
        kept = files[-self.backups :] if self.backups else ()
        gone = files[: len(files) - len(kept)]
        order = [*(segment.file for segment in files), now.file]
        for index, segment in enumerate(gone):
            self._retire(segment.file, segment.size, order[index + 1])
        older = tuple(
            Segment(segment.file, self.backup(len(kept) - index), segment.size) for index, segment in enumerate(kept)
        )
        self._reuse(now.file)
        self._files = (older, now)

    def _scan(self) -> tuple[Segment, ...]:
        older = []
        for number in range(self.backups, 0, -1):
            try:
                status = os.stat(self.backup(number), follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                older.append(Segment(file_id(status), self.backup(number), status.st_size))
        return tuple(older)

    def _reuse(self, file: str) -> None:
        """Forget a removed file whose inode number a new file has, as ext4 reuses them at once."""
        if (old := self._retired.get(file)) is None:
            return
        for other, gone in list(self._retired.items()):
            if gone.successor == file:
                self._retired[other] = Retired(gone.size, old.successor, gone.between + old.size + old.between)
        del self._retired[file]

    def _retire(self, file: str, size: int, successor: str) -> None:
        self._retired[file] = Retired(size, successor, 0)
        while len(self._retired) > RETIRED:
            self._retired.popitem(last=False)

    # Reading, for any thread

    def _snapshot(self) -> tuple[Segment, ...]:
        older, now = self._files
        return (*older, Segment(now.file, self.path, now.size))

    def files(self) -> list[Segment]:
        """All files of the log, oldest first; the last one is the current one."""
        return list(self._snapshot())

    def newer(self, file: str) -> str | None:
        """The id of the file after `file`; None for the current one. An unknown file counts as the oldest."""
        chain = [segment.file for segment in self._snapshot()]
        for _ in range(RETIRED + 1):
            if file in chain:
                index = chain.index(file) + 1
                return chain[index] if index < len(chain) else None
            if file not in self._retired:
                return chain[0]
            file = self._retired[file].successor
            if file in chain:
                return file
        return chain[0]

    def locate(self, cursor: Cursor) -> tuple[Cursor, int]:
        """Where a follower continues, and how many bytes of that file it can read there (0: it has everything).

        At the end of an older file, that is the next newer one at offset 0. A truncated file begins again at 0. A
        file that has left the chain can be read to its end by anybody who still holds it open.
        """
        for _ in range(self.backups + RETIRED + 2):
            sizes = {segment.file: segment.size for segment in self._snapshot()}
            gone = self._retired.get(cursor.file)
            size = sizes.get(cursor.file, gone.size if gone is not None else 0)
            if cursor.offset < size:
                return cursor, size - cursor.offset
            after = self.newer(cursor.file)
            if after is None:
                if cursor.offset > size and self._was_cut(cursor):
                    return Cursor(cursor.file, 0), size
                return cursor, 0
            cursor = Cursor(after, 0)
        return cursor, 0

    def missed(self, place: Cursor, found: Cursor) -> int:
        """How many bytes between the file of `place` and that of `found` can't be read any more.

        The reader at `place` holds that file and reads it to its end. UNKNOWN if that file is unknown.
        """
        lost, file = 0, place.file
        chain = {segment.file for segment in self._snapshot()}
        while file != found.file and file not in chain:
            gone = self._retired.get(file)
            if gone is None:
                return UNKNOWN
            lost += gone.between + (gone.size if file != place.file else 0)
            file = gone.successor
        return lost

    def _was_cut(self, cursor: Cursor) -> bool:
        """Whether the current file ends before the cursor. Asks the file: readers may be ahead of `size` by a
        move."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return file_id(status) == cursor.file and status.st_size < cursor.offset

    def tail(self, lines: int) -> Cursor:
        """The beginning of the last `lines` lines over all files; 0: the end, -1: the very beginning.

        An unfinished last line counts as one. Files that vanish while they are read end the search there.
        """
        segments = self._snapshot()
        place = Cursor(segments[-1].file, segments[-1].size)
        if lines == 0:
            return place
        if lines < 0:
            return Cursor(segments[0].file, 0)
        last = True
        for segment in reversed(segments):
            try:
                fd = self.open(segment.file)
            except FileNotFoundError:
                return place
            try:
                for start, block in _backwards(fd, segment.size):
                    end = len(block)
                    if last:
                        last = False
                        # The stream's final line end ends the last line; it doesn't begin another.
                        end -= block.endswith(b"\n")
                    while (at := block.rfind(b"\n", 0, end)) >= 0:
                        lines -= 1
                        if not lines:
                            return Cursor(segment.file, start + at + 1)
                        end = at
                place = Cursor(segment.file, 0)
            finally:
                os.close(fd)
        return place

    def open(self, file: str) -> int:
        """A new read-only descriptor of the file with this id, which the caller closes. Raises FileNotFoundError."""
        # A rotation only moves files to higher numbers, so looking upwards can't miss one that is being moved.
        for path in (self.path, *(self.backup(number) for number in range(1, self.backups + 1))):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            if file_id(os.fstat(fd)) == file:
                return fd
            os.close(fd)
        raise FileNotFoundError(errno.ENOENT, f"no file {file} in the log", self.path)


def _backwards(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The blocks of a file from its end to its beginning, each with its offset."""
    while size > 0:
        start = max(0, size - _BLOCK)
        block = os.pread(fd, size - start, start)
        if len(block) < size - start:
            # Somebody truncated the file while it was read; the rest still has lines.
            block = block.ljust(size - start, b"\0")
        yield start, block
        size = start
