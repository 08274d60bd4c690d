# SPDX-License-Identifier: LGPL-2.1-or-later
"""A log with a size limit and numbered backups, filled by splice(2), which a SIGKILL at any instant leaves intact.

    web1.console.log      the current file, the only one that grows
    web1.console.log.1    the newest backup ... .N the oldest
    web1.console.log.new  exists only during a rotation; always empty

The path is the truth: whatever leads there is the current file, and its size says how much of the pipe has been
moved. A descriptor from the FD store is only a shortcut; if it refers to another file, because a rotation was cut off
or because somebody moved or removed the file by hand, the log continues with the file at the path.

One thread (the pump's) calls `take`, `rotate`, `check` and `close`. Readers of the log use its chain of files
(chain.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from typing import TYPE_CHECKING

from ..errors import HostError
from ..files import make_directory
from .chain import Chain, Current, file_id

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 16 << 20
DEFAULT_BACKUPS = 3

# Once over the limit, this many bytes may follow in search of a line end before the file is cut where it stands.
LINE_SEARCH = 512
# After a rotation that failed (a full disk, say), the file may grow by this much until the next attempt.
ROTATE_AGAIN = 1 << 20
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class LogFile:
    """A log open for writing at its end. `limit` is in bytes and soft (a line is finished first); 0 means no limit.

    `on_rotate(fd)` is called, in the writing thread, with the descriptor of each new current file that replaces
    another, once it is at the path; it belongs to this object and is valid during the call.

    `fd`: one that an earlier daemon kept, and that the log now owns. If the path leads elsewhere, the log continues
    there, after calling `on_rotate`. Raises HostError.
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
        self.fd = -1
        self._now = Current("", 0)
        if fd is not None and _usable(fd):
            self.fd = fd
            self._now = _measure(fd)
        elif fd is not None:
            logger.warning("log %s: the descriptor kept for it is unusable, opening the file", self.path)
            _close(fd)
        self.chain = Chain(self.path, backups, self._now)
        try:
            self._open_current(announce=fd is not None)
        except OSError as error:
            # With a descriptor the log still works, only its path is wrong; `check` tries again.
            if self.fd < 0:
                raise HostError(f"cannot open the log {self.path}: {error.strerror}") from error
            logger.warning(
                "log %s cannot be opened, continuing with the descriptor kept: %s", self.path, error.strerror
            )

    @property
    def file(self) -> str:
        """The current file's id."""
        return self._now.file

    @property
    def size(self) -> int:
        """The current file's size in bytes; the file itself may be ahead of it by one move."""
        return self._now.size

    def close(self) -> None:
        """Close the file. Its chain can be read all the same."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # Writing, for one thread only

    def take(self, pipe_fd: int, most: int) -> int:
        """Move up to `most` bytes from the pipe to the end of the log; returns how many, 0 if the writers are gone.

        Fewer than `most` means that the pipe was found empty then.

        Raises BlockingIOError if the pipe is empty, OSError if the file can't be written (the bytes then stay in the
        pipe).
        """
        now = self._now
        # Somebody may have truncated it (logrotate's copytruncate): writing on at the old offset would leave a hole.
        if os.fstat(self.fd).st_size != now.size:
            now.size = os.lseek(self.fd, 0, os.SEEK_END)
        if self._turn_at - now.size >= most:
            moved = os.splice(pipe_fd, self.fd, most, flags=_SPLICE)
            now.size += moved
            return moved
        return self._take_and_turn(pipe_fd, most)

    def _take_and_turn(self, pipe_fd: int, most: int) -> int:
        """Like `take`, if the limit may be reached; continues in the new file."""
        moved = 0
        while moved < most:
            now = self._now
            room = self._turn_at - now.size
            if room <= 0 and (self._at_line_end() or room <= -LINE_SEARCH):
                self._turn()
                continue
            # One can't peek into a pipe, so the rest of the line is moved byte by byte.
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

        A kill at any step loses nothing: files only move up to a free number or over the oldest, and the bytes are
        still in the pipe. Raises OSError; then the current file is still the current one.
        """
        if not self._in_place():
            before = self.file
            self._open_current(announce=True)
            if self.file != before:
                return self.fd
        fresh = self.path + ".new"
        _remove(fresh)
        fd = os.open(fresh, _OPEN | os.O_EXCL, 0o600)
        try:
            last = self._first_gap()
            # A rename over a file makes ext4 write the moved one to disk immediately, which costs more than
            # everything else here; so the oldest is removed first.
            _remove(self.chain.backup(last) if last else self.path)
            for number in range(last, 1, -1):
                os.rename(self.chain.backup(number - 1), self.chain.backup(number))
            if last:
                os.rename(self.path, self.chain.backup(1))
            os.rename(fresh, self.path)
        except OSError:
            os.close(fd)
            _remove(fresh)
            if self.backups and not os.path.lexists(self.path):
                os.rename(self.chain.backup(1), self.path)
            raise
        now = _measure(fd)
        self.chain.rotated(now)
        self._replace(fd, now)
        self._announce()
        return self.fd

    def check(self) -> bool:
        """Check that the path still leads to this file, and otherwise continue with the file there; True if it was
        replaced.

        A `truncate` or `>>` is noticed too, so that no hole appears and nothing is overwritten. If no file can be
        opened at the path, the log continues with the one that it has.
        """
        if self._in_place():
            return False
        before = self.file
        try:
            self._open_current(announce=True)
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

    def _open_current(self, *, announce: bool) -> None:
        """Repair what an interrupted rotation has left, and open the file at the path."""
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
        if file_id(status) == self._now.file:
            os.close(fd)
            self.chain.found(self._now)
            return
        now = _measure(fd)
        self.chain.found(now)
        self._replace(fd, now)
        if announce:
            self._announce()

    def _replace(self, fd: int, now: Current) -> None:
        old, self.fd = self.fd, fd
        self._now = now
        self._turn_at = self.limit or 1 << 62
        if old >= 0:
            os.close(old)

    def _announce(self) -> None:
        if self.on_rotate is None:
            return
        try:
            self.on_rotate(self.fd)
        except Exception:
            # The slot that wasn't replaced is only a shortcut; the log continues.
            logger.exception("log %s: its new descriptor was not accepted", self.path)

    def _first_gap(self) -> int:
        """The first free number; the last permitted one if none is free."""
        for number in range(1, self.backups):
            if not os.path.lexists(self.chain.backup(number)):
                return number
        return self.backups


def _usable(fd: int) -> bool:
    """Whether this descriptor is suitable for a log: a regular file, readable and writable, and (for splice) not
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


def _measure(fd: int) -> Current:
    """Set the descriptor's position to the file's end."""
    return Current(file_id(os.fstat(fd)), os.lseek(fd, 0, os.SEEK_END))


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
