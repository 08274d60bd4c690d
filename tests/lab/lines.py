# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's numbered lines, and what of them a console log lacks, has twice, or has in pieces.

The format is guest/console.c's. What the guest says besides (its answers, its "ready") stands on lines of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SIZE = 80
_LETTERS = (b"abcdefghijklmnopqrstuvwxyz" * 4)[:104]


def line(number: int) -> bytes:
    """The guest's line of that number (counted from 1), CR LF included: 80 bytes."""
    start = number % 26
    return b"line %010d %b .\r\n" % (number, _LETTERS[start : start + 60])


@dataclass
class Report:
    """What `check` found; numbers are line numbers. `lost` has the gaps as first and last number that are missing."""

    first: int = 0
    last: int = 0
    right: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)
    tail: bytes = b""

    @property
    def lines_lost(self) -> int:
        """How many lines the gaps have in all."""
        return sum(last - first + 1 for first, last in self.lost)

    @property
    def whole(self) -> bool:
        """True if nothing is lost, repeated or cut; an unfinished line at the very end is no fault."""
        return not (self.lost or self.repeated or self.cut)

    def __str__(self) -> str:
        return (
            f"lines {self.first} to {self.last}: {self.lines_lost} lost, {len(self.repeated)} repeated, "
            f"{len(self.cut)} cut (lost {self.lost[:5]}, repeated {self.repeated[:5]}, cut {self.cut[:5]})"
        )


def check(chunks: Iterable[bytes], first: int = 0) -> Report:
    """Reads a log in pieces of any size (for one that was rotated: the oldest file first) and reports on its lines.

    `first` is the number the log has to begin with, 0 for any.
    """
    report = Report()
    wanted = first
    rest = b""
    for chunk in chunks:
        data = rest + chunk
        at = 0
        # The fast way: a good log is many right lines in a row.
        while wanted and data[at : at + SIZE] == line(wanted):
            _count(report, wanted)
            wanted += 1
            at += SIZE
        *records, rest = data[at:].split(b"\n")
        for record in records:
            wanted = _take(report, record, wanted)
    report.tail = rest
    return report


def check_file(path: str, first: int = 0) -> Report:
    """`check` of one file."""
    with open(path, "rb") as file:
        return check(iter(lambda: file.read(1 << 20), b""), first)


def _count(report: Report, number: int) -> None:
    report.first = report.first or number
    report.last = number
    report.right += 1


def _take(report: Report, record: bytes, wanted: int) -> int:
    """Files one record, without its LF, under what it is; returns the number that should come next, 0 for any."""
    number = int(record[5:15]) if record[5:15].isdigit() else 0
    if not number or record + b"\n" != line(number):
        # A part of a line still has its beginning or its end; anything else is an answer of the guest's.
        is_part = record.startswith(b"line ") or b"line 0" in record or record.endswith(b" .\r")
        (report.cut if is_part else report.others).append(record.rstrip(b"\r"))
        return wanted
    if number < wanted:
        report.repeated.append(number)
        return wanted
    if 0 < wanted < number:
        report.lost.append((wanted, number - 1))
    _count(report, number)
    return number + 1
