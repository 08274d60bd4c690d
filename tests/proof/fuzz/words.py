# SPDX-License-Identifier: LGPL-2.1-or-later
"""What children write on their two outputs: a job's progress and last words, and lines for the journal."""

from __future__ import annotations

import os
import re
import tempfile
from typing import cast

import msgspec

from virtd.drivers.qemu.guest import QemuGuest
from virtd.drivers.storage import joblog
from virtd.logs.chain import Cursor
from virtd.logs.logfile import LogFile
from virtd.logs.stderrlog import StderrLog

SEEDS = (
    b"    (0.00/100%)\r    (12.50/100%)\r    (100.00/100%)\r",
    b"qemu-img: Could not open '/a': No such file\nqemu-img: b\n",
    b"qemu-system-x86_64: warning: a\n\x1b[31mred\x1b[0m\n" + b"x" * 9000,
)
WORDS = (b"/100%)", b"(1e9", b"9" * 400, b"qemu-img: ", b"\x1b]52;", b"\0")
LIMIT = 20000


def target(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "log")
        with open(path, "wb") as file:
            file.write(data)
        found = re.findall(joblog.PROGRESS, joblog.tail(path, 1024))
        if found:
            msgspec.json.encode(float(found[-1]))
        log = LogFile(path)
        said: list[str] = []
        try:
            stderr = StderrLog(
                log, {}, Cursor(log.file, 0), sort=_sort, send=lambda text, **_fields: said.append(text)
            )
            while stderr.forward(final=True):
                pass
        finally:
            log.close()
        for text in said:
            text.encode()  # sendv() takes no surrogates


def _sort(text: str) -> str | None:
    return QemuGuest.sort_line(cast("QemuGuest", None), text)
