# SPDX-License-Identifier: LGPL-2.1-or-later
"""Repeats in the journal, under the guest's name, what a guest's process writes to stderr.

The lines are read from the log file, where they already are, from a position that the caller keeps in the record: a
line is sent first and counted as sent afterwards, so a crash between the two repeats it and never loses it. A child
that floods its stderr fills only its own log: beyond a certain rate, lines are not repeated but counted, and the
journal says how many there are, and where.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from .. import journal
from ..allowance import Bucket
from .chain import Cursor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .logfile import LogFile

BURST = 100
"""Lines that are sent at once ..."""
RATE = 10.0
"""... and lines a second from then on."""

LINE = 8192
"""Bytes after which a long line is sent in pieces."""
STEP = 1 << 16
"""Most bytes that one call reads."""
BACKLOG = 1 << 20
"""With a larger backlog, in bytes, it isn't worthwhile to continue line by line; the end of the log says more."""


class StderrLog:
    """Forwards one log. `cursor` is the position to keep; without one, forwarding begins at the log's end.

    `fields` are the journal's (VIRTD_DRIVER= and so on). `sort` gives a line's level, or None to leave it out.
    `send(text, level=..., **fields)` writes one entry.
    """

    def __init__(
        self,
        log: LogFile,
        fields: Mapping[str, str],
        cursor: Cursor | None = None,
        *,
        sort: Callable[[str], str | None] = lambda _text: "warning",
        send: Callable[..., object] = journal.send,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._fields = dict(fields)
        self._sort = sort
        self._send = send
        self._clock = clock
        self._allowance = Bucket(RATE, BURST, clock())
        self._unsent = 0
        current = log.chain.files()[-1]
        if cursor is None:
            cursor = Cursor(current.file, current.size)
        elif all(segment.file != cursor.file for segment in log.chain.files()):
            # Its file is gone, and how much of the older ones was sent is unknown: repeating little is better than
            # repeating all.
            cursor = Cursor(current.file, 0)
        self.cursor = cursor

    def forward(self, *, final: bool = False) -> bool:
        """Send what is new; True if there is more, and the call should be repeated when there is time.

        An unfinished line waits for its end; with `final`, when nothing more can follow, it is sent as it is.
        """
        self._skip_backlog()
        cursor, size = self._log.chain.locate(self.cursor)
        data = self._read(cursor, min(size, STEP)) if size else b""
        grows = cursor.file == self._log.file
        end = data.rfind(b"\n") + 1
        if len(data) - end >= LINE or (final and len(data) == size) or not grows:
            end = len(data)
        for line in data[:end].split(b"\n") if end else ():
            for start in range(0, len(line), LINE):
                self._forward_line(line[start : start + LINE])
        self.cursor = Cursor(cursor.file, cursor.offset + end)
        more = end > 0 and self._log.chain.locate(self.cursor)[1] > 0
        if self._unsent and (self._may_send() or (final and not more)):
            self._say_unsent()
        return more

    def _read(self, cursor: Cursor, size: int) -> bytes:
        try:
            fd = self._log.chain.open(cursor.file)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, size, cursor.offset)
        finally:
            os.close(fd)

    def _skip_backlog(self) -> None:
        """Skip lines that are too many for anybody to read in the journal."""
        files = self._log.chain.files()
        at = next((index for index, segment in enumerate(files) if segment.file == self.cursor.file), 0)
        behind = sum(segment.size for segment in files[at:]) - self.cursor.offset
        if behind > BACKLOG:
            current = files[-1]
            self.cursor = Cursor(current.file, max(0, current.size - STEP))
            self._unsent += 1

    def _may_send(self) -> bool:
        return self._allowance.due(self._clock()) == 0

    def _forward_line(self, line: bytes) -> None:
        text = line.decode(errors="backslashreplace").rstrip()
        level = self._sort(text) if text else None
        if level is None:
            return
        if not self._may_send():
            self._unsent += 1
            return
        if self._unsent:
            self._say_unsent()
        self._allowance.take()
        self._send(text, level=level, **self._fields)

    def _say_unsent(self) -> None:
        self._send(f"{self._unsent} lines or more are only in {self._log.path}", level="warning", **self._fields)
        self._unsent = 0
