# SPDX-License-Identifier: LGPL-2.1-or-later
"""A log with a size limit and numbered backups, filled by splice(2), that a SIGKILL at any instant leaves whole.

    web1.console.log      the current file, the only one that grows
    web1.console.log.1    the newest backup ... .N the oldest
    web1.console.log.new  there only while a rotation is under way; always empty

The path is the truth: whatever leads there is the current file, and its size says how much of the pipe has been
moved. A descriptor that was kept in the FD store is a short cut; if it leads elsewhere, because a rotation was cut
off or because somebody moved or removed the file by hand, the log goes on with the file at the path.

A follower's place is a `Cursor`: the file's id ("dev:ino") and an offset. It holds the file open while it has a
place in it, so the id can't be used again for another file meanwhile. Reading it to its end and going on with
`newer()` at offset 0 gives every byte once, over any number of rotations.

One thread (the pump's) calls `take`, `rotate`, `check` and `close`. The rest reads a snapshot and may be called
from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from .errors import HostError
from .files import make_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 16 << 20
DEFAULT_BACKUPS = 3

# Once over the limit, this many bytes may follow in search of a line end before the file is cut where it stands.
LINE_SEARCH = 512
# After a rotation that failed (a full disk, say), the file may grow by this much until the next attempt.
ROTATE_AGAIN = 1 << 20
# Files that left the chain and are still remembered for followers that hold them open.
RETIRED = 64
UNKNOWN = -1  # bytes that were missed, and perhaps none

_BLOCK = 1 << 16
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


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
    """A file that was removed: its size, the file after it, and the bytes that were in others between the two."""

    size: int
    successor: str
    between: int


def file_id(status: os.stat_result) -> str:
    """What a file is called in a cursor."""
    return f"{status.st_dev}:{status.st_ino}"


class _Current:
    """The file that grows. A rotation makes a new object, so that a snapshot is of one moment."""

    __slots__ = ("file", "size")

    def __init__(self, file: str, size: int) -> None:
        self.file = file
        self.size = size


class LogFile:
    """A log open for writing at its end. `limit` is in bytes and soft (a line is finished first); 0 means no limit.

    `on_rotate(fd)` is called, in the thread that writes, with the descriptor of each new current file that takes
    the place of another, once it is at the path; it belongs to this object and is valid during the call.

    `fd`: one that an earlier daemon kept, and that passes to the log. If the path leads elsewhere, the log goes on
    there, and `on_rotate` has been called by then. Raises HostError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limit: int = DEFAULT_LIMIT,
        backups: int = DEFAULT_BACKUPS,
        on_rotate: Callable[[int], object] | None = None,
        fd: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.limit = limit
        self.backups = backups
        self.on_rotate = on_rotate
        self._turn_at = limit or 1 << 62
        self._retired: OrderedDict[str, Retired] = OrderedDict()
        self.fd = -1
        self._now = _Current("", 0)
        if fd is not None and _usable(fd):
            self.fd = fd
            self._now = _measure(fd)
        elif fd is not None:
            logger.warning("log %s: the descriptor kept for it is of no use, opening the file", self.path)
            _close(fd)
        self._chain: tuple[tuple[Segment, ...], _Current] = ((), self._now)
        try:
            self._settle(announce=fd is not None)
        except OSError as error:
            # With a descriptor in hand the log still works, only its path is wrong; `check` tries again.
            if self.fd < 0:
                raise HostError(f"cannot open the log {self.path}: {error.strerror}") from error
            logger.warning(
                "log %s cannot be opened, going on with the descriptor kept: %s", self.path, error.strerror
            )

    @property
    def file(self) -> str:
        """The current file's id."""
        return self._now.file

    @property
    def size(self) -> int:
        """The current file's size in bytes; what a reader finds there may be ahead of it by one move."""
        return self._now.size

    def close(self) -> None:
        """Close the file. What reads (`files`, `locate`, `tail`, `open`) goes on to work."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # Writing: one thread only

    def take(self, pipe_fd: int, most: int) -> int:
        """Move up to `most` bytes from the pipe to the end of the log; returns how many, 0 when the writers are gone.

        Fewer than `most` means that the pipe was found empty then.

        Raises BlockingIOError when the pipe is empty, OSError when the file can't take them (they are then still in
        the pipe).
        """
        now = self._now
        # Somebody may have cut it (logrotate's copytruncate): written on at the old place it would begin with a hole.
        if os.fstat(self.fd).st_size != now.size:
            now.size = os.lseek(self.fd, 0, os.SEEK_END)
        if self._turn_at - now.size >= most:
            moved = os.splice(pipe_fd, self.fd, most, flags=_SPLICE)
            now.size += moved
            return moved
        return self._take_and_turn(pipe_fd, most)

    def _take_and_turn(self, pipe_fd: int, most: int) -> int:
        """The same where the limit may be in the way; moves on in the new file."""
        moved = 0
        while moved < most:
            now = self._now
            room = self._turn_at - now.size
            if room <= 0 and (self._at_line_end() or room <= -LINE_SEARCH):
                self._turn()
                continue
            # A pipe can't be peeked into, so the rest of the line goes byte by byte.
            wanted = min(room, most - moved) if room > 0 else 1
            try:
                step = os.splice(pipe_fd, self.fd, wanted, flags=_SPLICE)
            except OSError:
                if moved:
                    break
                raise
            now.size += step
            moved += step
            if step < wanted:
                break
        return moved

    def _turn(self) -> None:
        try:
            self.rotate()
        except OSError as error:
            logger.warning("log %s cannot be rotated, it grows past its limit: %s", self.path, error.strerror)
            self._turn_at = self.size + ROTATE_AGAIN

    def _at_line_end(self) -> bool:
        return self.size == 0 or os.pread(self.fd, 1, self.size - 1) == b"\n"

    def rotate(self) -> int:
        """Make the current file the newest backup and begin an empty one; returns its descriptor.

        Killed at any step, nothing is lost: files only move up to a free number or over the oldest, and the bytes
        are still in the pipe. Raises OSError, with the current file still the current one.
        """
        if not self._in_place():
            before = self.file
            self._settle(announce=True)
            if self.file != before:
                return self.fd
        fresh = self.path + ".new"
        _remove(fresh)
        fd = os.open(fresh, _OPEN | os.O_EXCL, 0o600)
        try:
            last = self._first_gap()
            # A rename over a file makes ext4 write the moved one to the disk there and then, which costs more than
            # all the rest here; so the oldest is removed first.
            _remove(self._backup(last) if last else self.path)
            for number in range(last, 1, -1):
                os.rename(self._backup(number - 1), self._backup(number))
            if last:
                os.rename(self.path, self._backup(1))
            os.rename(fresh, self.path)
        except OSError:
            os.close(fd)
            _remove(fresh)
            if self.backups and not os.path.lexists(self.path):
                os.rename(self._backup(1), self.path)
            raise
        files = self._snapshot()
        kept = files[-self.backups :] if self.backups else ()
        gone = files[: len(files) - len(kept)]
        now = _measure(fd)
        order = [*(segment.file for segment in files), now.file]
        for index, segment in enumerate(gone):
            self._retire(segment.file, segment.size, order[index + 1])
        older = tuple(
            Segment(segment.file, self._backup(len(kept) - index), segment.size) for index, segment in enumerate(kept)
        )
        self._reuse(now.file)
        self._replace(fd, now, older)
        self._announce()
        return self.fd

    def check(self) -> bool:
        """See whether the path still leads to this file and go on with what is there if not; True if it was replaced.

        Somebody's `truncate` or `>>` is noticed too, so that no hole appears and nothing is written over. If no
        file can be had at the path, the log goes on with the one it holds.
        """
        if self._in_place():
            return False
        before = self.file
        try:
            self._settle(announce=True)
        except OSError as error:
            logger.warning("log %s leads elsewhere and cannot be opened: %s", self.path, error.strerror)
        return self.file != before

    def _in_place(self) -> bool:
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        if file_id(status) != self.file:
            return False
        if status.st_size != self.size:
            self._now.size = os.lseek(self.fd, 0, os.SEEK_END)
        return True

    def _settle(self, *, announce: bool) -> None:
        """Put right what a rotation that was cut off has left, and hold the file at the path."""
        fresh = self.path + ".new"
        if os.path.lexists(fresh):
            if os.path.lexists(self.path):
                _remove(fresh)
            else:
                os.rename(fresh, self.path)
        try:
            fd = os.open(self.path, _OPEN, 0o600)
        except FileNotFoundError:
            make_directory(os.path.dirname(self.path), 0o700)
            fd = os.open(self.path, _OPEN, 0o600)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", self.path)
        older = self._scan()
        before = self._now
        if file_id(status) == before.file:
            os.close(fd)
            self._chain = (older, before)
            return
        now = _measure(fd)
        if before.file and all(segment.file != before.file for segment in older):
            self._retire(before.file, before.size, now.file)
        self._reuse(now.file)
        self._replace(fd, now, older)
        if announce:
            self._announce()

    def _replace(self, fd: int, now: _Current, older: tuple[Segment, ...]) -> None:
        old, self.fd = self.fd, fd
        self._now = now
        self._chain = (older, now)
        self._turn_at = self.limit or 1 << 62
        if old >= 0:
            os.close(old)

    def _announce(self) -> None:
        if self.on_rotate is None:
            return
        try:
            self.on_rotate(self.fd)
        except Exception:
            # The slot that wasn't replaced is a short cut only; the log goes on.
            logger.exception("log %s: its new descriptor was not taken", self.path)

    def _backup(self, number: int) -> str:
        return f"{self.path}.{number}"

    def _first_gap(self) -> int:
        """The first number that is free; the last one there may be if none is."""
        for number in range(1, self.backups):
            if not os.path.lexists(self._backup(number)):
                return number
        return self.backups

    def _scan(self) -> tuple[Segment, ...]:
        older = []
        for number in range(self.backups, 0, -1):
            try:
                status = os.stat(self._backup(number), follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                older.append(Segment(file_id(status), self._backup(number), status.st_size))
        return tuple(older)

    def _reuse(self, file: str) -> None:
        """A new file has the number of one that was removed, which ext4 gives away at once: that one is forgotten."""
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

    # Reading: any thread

    def _snapshot(self) -> tuple[Segment, ...]:
        older, now = self._chain
        return (*older, Segment(now.file, self.path, now.size))

    def files(self) -> list[Segment]:
        """All files of the log, oldest first; the last one is the current one."""
        return list(self._snapshot())

    def newer(self, file: str) -> str | None:
        """The id of the file that follows `file`; None for the current one. A file nobody remembers is older than
        all.
        """
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
        """Where a follower goes on, and how many bytes it can read there in that file (0: it has everything).

        At the end of an older file that is the next newer one at offset 0. A file that was cut short begins again
        at 0. A file that has left the chain can be read to its end by whoever still holds it open.
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
        """How many bytes came after the file of `place` and before that of `found`, and can't be read any more.

        Whoever is at `place` holds that file and reads it to its end. UNKNOWN for a file that nobody remembers.
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
        """Whether the current file ends before the cursor. Only the file knows: a reader may be ahead of `size` by
        a move.
        """
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
                        # The stream's final line end closes the last line; it doesn't begin another.
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
        for path in (self.path, *(self._backup(number) for number in range(1, self.backups + 1))):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            if file_id(os.fstat(fd)) == file:
                return fd
            os.close(fd)
        raise FileNotFoundError(errno.ENOENT, f"no file {file} in the log", self.path)


def _usable(fd: int) -> bool:
    """Whether a log can be kept with this descriptor: a regular file, read and written, and (for splice) not
    O_APPEND.
    """
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE != os.O_RDWR or not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        if flags & os.O_APPEND:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
    except OSError:
        return False
    return True


def _measure(fd: int) -> _Current:
    """Put the descriptor's position at the file's end."""
    return _Current(file_id(os.fstat(fd)), os.lseek(fd, 0, os.SEEK_END))


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _backwards(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The blocks of a file from its end to its beginning, each with its offset."""
    while size > 0:
        start = max(0, size - _BLOCK)
        block = os.pread(fd, size - start, start)
        if len(block) < size - start:
            # Somebody cut the file while it was read; what is left still has lines.
            block = block.ljust(size - start, b"\0")
        yield start, block
        size = start


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
