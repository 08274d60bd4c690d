# SPDX-License-Identifier: LGPL-2.1-or-later
"""The place in a log that a viewer has reached.

The daemon hands out the log *file* and says when there is more in it; the bytes don't pass through the daemon. The
place, (file, offset), means the same to any daemon, so a viewer continues after a restart where it was: nothing is
printed twice and nothing is left out.
"""

from __future__ import annotations

import os
import select

from virtd.cli.output import rounded
from virtd.errors import VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virtd.cli.client import Parameters, Reply

CHUNK = 65536


UNKNOWN = -1  # an unknown number of bytes was skipped, perhaps none


class Cursor:
    """A file and an offset; owns the file's descriptor. It begins with the last `lines` lines: -1 for all, 0 for
    none.

    `say` is called with a sentence about what can't be shown. `skipped`: the number of bytes missing before the next
    ones, which the reader resets to 0. `refused`: why the log can't be written at present.
    """

    def __init__(self, name: str, log: str, lines: int, say: Callable[[str], None]) -> None:
        self.skipped = 0
        self.refused = ""
        self._say = say
        self.file: str | None = None
        self.offset = 0
        self.ended = False
        self.state = ""
        self._name = name
        self._log = log
        self._lines = lines or None
        self._fd = -1

    def parameters(self, *, wait: bool) -> Parameters:
        """Parameters of Follow: for the start, or for what follows this place."""
        started = self.file is not None
        return {
            "name": self._name,
            "log": self._log,
            "file": self.file,
            "offset": self.offset if started else None,
            "lines": None if started else self._lines,
            "wait": wait,
        }

    def accept(self, reply: Reply) -> bool:
        """Accept a reply of Follow; returns whether it leads to another file."""
        parameters = reply.parameters
        self.ended = bool(parameters.get("ended"))
        self.state = str(parameters.get("state", ""))
        self._gaps(int(parameters.get("missed") or 0), str(parameters.get("refused") or ""))
        file = parameters.get("file")
        moved = file is not None and file != self.file
        if moved:
            if not reply.fds:
                raise VirtdError("virtd sent no descriptor of the log file")
            self.close()
            self._fd = reply.fds.pop(0)
            self.file = str(file)
            self.offset = int(parameters.get("offset") or 0)
        reply.close()
        return moved

    def _gaps(self, skipped: int, refused: str) -> None:
        if skipped:
            self.skipped = UNKNOWN if UNKNOWN in (skipped, self.skipped) else self.skipped + skipped
            if skipped == UNKNOWN:
                why = "some of the log may be missing here: it was rotated while virtd was restarted"
            else:
                why = f"{rounded(skipped)} of the log are missing here: they were rotated away before they were read"
            self._say(f"virtdctl: {why}")
        if refused and refused != self.refused:
            self._say(
                f"virtdctl: the log can't be written at present ({refused}), so new output can't be shown; "
                "see virtdctl status"
            )
        elif self.refused and not refused:
            self._say("virtdctl: the log can be written again; output in between may be lost")
        self.refused = refused

    def read(self) -> bytes:
        """The next bytes of the present file, empty at its end."""
        data = os.pread(self._fd, CHUNK, self.offset) if self._fd >= 0 else b""
        self.offset += len(data)
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_all(fd: int, data: bytes) -> None:
    """Write everything to a terminal, pipe or file, whatever part each write(2) accepts."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Another user of this terminal has made it non-blocking, which a shell's children can't prevent.
            select.select([], [fd], [])
