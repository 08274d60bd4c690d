# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a job's program writes: its progress and output to stdout, its errors to stderr."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from ... import untrusted
from ...paths import names
from .task import DRIVER

if TYPE_CHECKING:
    from ...paths import Paths

PROGRESS = rb"\((\d+(?:\.\d+)?)/100%\)"  # as `qemu-img -p` writes it
ROTATED = 3  # older files that a log may have


class JobLog:
    """The two logs of one job."""

    def __init__(self, paths: Paths, name: str) -> None:
        self._output = paths.console_log(DRIVER, name)
        self._errors = paths.stderr_log(DRIVER, name)

    def output(self, last: int = 1 << 20) -> bytes:
        """The end of what the program wrote to stdout."""
        return tail(self._output, last)

    def progress(self) -> float | None:
        """Percent; None before the program has reported any."""
        found = re.findall(PROGRESS, self.output(1024))
        return float(found[-1]) if found else None

    def words(self) -> str:
        """The last lines that it wrote to stderr, without the program's name."""
        text = tail(self._errors, 4096).decode(errors="replace")
        lines = [line.removeprefix("qemu-img: ").strip() for line in text.splitlines()]
        return "; ".join(line for line in lines[-3:] if line)

    def remove(self) -> None:
        """Idempotent; what can't be removed stays."""
        for log in (self._output, self._errors):
            for path in (log, *(f"{log}.{number}" for number in range(1, ROTATED + 1))):
                with contextlib.suppress(OSError):
                    os.unlink(path)


def logged(paths: Paths) -> set[str]:
    """The jobs that have logs."""
    return {name.removesuffix(".console") for name in names(f"{paths.log}/{DRIVER}", ".log")}


def tail(path: str, most: int) -> bytes:
    """The last `most` bytes of a file; none if it can't be read."""
    try:
        return untrusted.tail(path, most)
    except OSError:
        return b""
