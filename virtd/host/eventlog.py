# SPDX-License-Identifier: LGPL-2.1-or-later
"""The latest events, in a file of bounded size that survives a restart of the daemon: one line of JSON each.

The file also holds checkpoints: the state of every object as last reported to subscribers. From these the next daemon
knows what it still has to report, however long ago an object last changed, and needs to read only the lines after the
last checkpoint. An event exists once its line is complete; a line cut off by a kill is removed, and its object is
reported again. The file is in /run and need not survive a reboot, so nothing is synced: an event costs one write(2).

The first number is the time in microseconds, so the numbers of an earlier boot are smaller.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from array import array
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import errors, files
from ..text import plainly

if TYPE_CHECKING:
    from ..replies.events import Change

log = logging.getLogger(__name__)

FORMAT: Final = 1  # version of the line format; a running daemon publishes it in daemon.json
SIZE: Final = 1 << 20  # maximum size of the file in bytes; more if a checkpoint is larger than half of EVERY
EVERY: Final = 16 << 10  # minimum bytes of events between two checkpoints
Told = tuple[Any, ...]

_CHECKPOINT = b'{"first":'
_EVENT = b'{"sequence":'


def fingerprint(item: Any) -> Told:
    """The fields whose change is an event; an object's processes, sizes and progress aren't among them."""
    return tuple(item.get(key) for key in ("uuid", "state", "reason", "since", "autostart", "waits", "error"))


def append(fd: int, data: bytes) -> int:
    return os.write(fd, data)


def discard_unless(written: Any, path: str) -> None:
    """Remove a log that the previous daemon didn't keep; `written` is the format that it published, if any.

    A virtd without this log recorded no events, so subscribers must learn that there is a gap.
    """
    if written != FORMAT and os.path.lexists(path):
        try:
            files.remove(path)
        except errors.HostError as exc:
            log.warning("%s", exc)


class EventLog:
    """The file. `told` is the state last reported to subscribers, by "kind/name".

    Methods may raise OSError; they then leave everything as it was.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._size = 0
        self._checkpoint = 0  # offset at which the last checkpoint begins
        self._after = EVERY  # bytes after which the next checkpoint is due
        self._offsets: array[int] | None = None  # offsets of the events' lines, once a reader needs them
        self.first = 0  # number of the oldest event in the file, or of the next one
        self.last = -1  # number of the newest event
        self.told: dict[str, Told] = {}

    def open(self) -> bool:
        """Continue an earlier daemon's log. False if there is none that can be continued; then call `begin`."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._recall(os.pread(self._fd, os.fstat(self._fd).st_size, 0))
        except FileNotFoundError:
            return False
        except (
            OSError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
            msgspec.MsgspecError,
        ) as exc:
            log.warning("The events in %s can't be continued: %s", self._path, exc)
            self.close()
            self.told = {}
            return False
        return True

    def _recall(self, data: bytes) -> None:
        end = data.rindex(b"\n") + 1
        at = data.rfind(b"\n" + _CHECKPOINT, 0, end) + 1
        head, *lines = data[at:end].splitlines()
        known = msgspec.json.decode(head)
        self.first, self.last = int(known["first"]), int(known["next"]) - 1
        self.told = {key: tuple(told) for key, told in known["told"].items()}
        for line in lines:
            event = msgspec.json.decode(line)
            if event["sequence"] != self.last + 1:
                raise ValueError(f"event {event['sequence']} follows {self.last}")
            self.last += 1
            item = event["object"]
            self._note(f"{event['kind']}/{event['name']}", fingerprint(item) if item is not None else None)
        if end < len(data):
            os.ftruncate(self._fd, end)
        self._size, self._checkpoint, self._offsets = end, at, None
        self._after = max(EVERY, 2 * len(head))

    def begin(self, told: dict[str, Told]) -> None:
        """Begin a new log in which `told`, the state of all existing objects, counts as reported."""
        self.told = told
        first = max(time.time_ns() // 1000, self.last + 2)
        self._replace(first, first - 1, b"", array("Q"))

    def append(self, change: Change, told: Told | None) -> None:
        """Append an event; `change` must have the number after `last`."""
        data = _encode(change) + b"\n"
        if self._size + len(data) > SIZE + self._after - EVERY:
            self._shorten()
        elif self._size - self._checkpoint > self._after:
            self._write_checkpoint()
        self._write(data)
        self.last = change.sequence
        if self._offsets is not None:
            self._offsets.append(self._size - len(data))
        self._note(f"{change.kind}/{change.name}", told)

    def read(self, after: int, most: int) -> list[Change]:
        """The events after number `after`, at most `most` of them."""
        from ..replies.events import Change

        if after >= self.last:
            return []
        offsets = self._index()
        begin = max(after + 1 - self.first, 0)
        index = begin + most
        end = offsets[index] if index < len(offsets) else self._size
        data = os.pread(self._fd, end - offsets[begin], offsets[begin])
        return [msgspec.json.decode(line, type=Change) for line in data.splitlines() if line.startswith(_EVENT)]

    def forget(self, key: str) -> None:
        """Drop an object that disappears without an event."""
        self.told.pop(key, None)

    def _note(self, key: str, told: Told | None) -> None:
        if told is None:
            self.told.pop(key, None)
        else:
            self.told[key] = told

    def _index(self) -> array[int]:
        if self._offsets is None:
            offsets, at = array("Q"), 0
            for line in os.pread(self._fd, self._size, 0).splitlines(keepends=True):
                if line.startswith(_EVENT):
                    offsets.append(at)
                at += len(line)
            if len(offsets) != self.last + 1 - self.first:
                raise OSError(f"{self._path} is damaged")
            self._offsets = offsets
        return self._offsets

    def _write(self, data: bytes) -> None:
        try:
            written = append(self._fd, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes fit")
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _head(self, first: int, last: int) -> bytes:
        return _encode({"first": first, "next": last + 1, "told": self.told}) + b"\n"

    def _write_checkpoint(self) -> None:
        head = self._head(self.first, self.last)
        self._write(head)
        self._checkpoint, self._after = self._size - len(head), max(EVERY, 2 * len(head))

    def _shorten(self) -> None:
        """Drop the older half of the events, and all checkpoints."""
        offsets = self._index()
        kept = next((i for i, at in enumerate(offsets) if self._size - at <= SIZE // 2), len(offsets))
        start = offsets[kept] if kept < len(offsets) else self._size
        data = os.pread(self._fd, self._size - start, start)
        lines = [line for line in data.splitlines(keepends=True) if line.startswith(_EVENT)]
        lengths = itertools.accumulate(map(len, lines), initial=0)
        self._replace(self.first + kept, self.last, b"".join(lines), array("Q", lengths)[:-1])

    def _replace(self, first: int, last: int, lines: bytes, offsets: array[int]) -> None:
        """Rewrite the file with the events `first` to `last`, at `offsets` in `lines`.

        A kill leaves either the old file or the new one. The checkpoint follows the events.
        """
        head = self._head(first, last)
        temporary = f"{self._path}.new"
        fd = os.open(
            temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            if os.write(fd, lines + head) < len(lines) + len(head):
                raise OSError("the events don't fit")
            os.rename(temporary, self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.first, self.last = fd, first, last
        self._size, self._checkpoint, self._offsets = len(lines) + len(head), len(lines), offsets
        self._after = max(EVERY, 2 * len(head))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # a name that isn't UTF-8 came from a path or from somebody's text
        return msgspec.json.encode(plainly(msgspec.to_builtins(value)))
