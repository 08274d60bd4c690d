# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way from a child's stderr log to the journal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from virtd.logs import stderrlog
from virtd.logs.chain import Cursor
from virtd.logs.logfile import LogFile
from virtd.logs.stderrlog import StderrLog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIELDS = {"VIRTD_DRIVER": "qemu", "VIRTD_NAME": "web1", "VIRTD_UUID": "b4f0b3b0-0000-4000-8000-000000000001"}


class Rig:
    def __init__(self, path: Path) -> None:
        self.read, self.write = os.pipe()
        self.log = LogFile(path, backups=5)
        self.entries: list[str] = []
        self.now = 0.0
        self.fails = False

    def say(self, data: bytes) -> None:
        for start in range(0, len(data), 32768):
            os.write(self.write, data[start : start + 32768])
            self.log.take(self.read, 1 << 20)

    def forwarder(self, cursor: Cursor | None = None) -> StderrLog:
        return StderrLog(self.log, FIELDS, cursor, send=self.send, clock=lambda: self.now)

    def send(self, text: str, *, level: str, **fields: str) -> None:
        if self.fails:
            raise KeyboardInterrupt
        assert level == "warning"
        assert fields == FIELDS
        self.entries.append(text)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "web1.log")
    yield rig
    rig.log.close()
    os.close(rig.read)
    os.close(rig.write)


def test_new_lines_are_sent_once(rig: Rig) -> None:
    rig.say(b"from an earlier run\n")
    forwarder = rig.forwarder()
    assert not forwarder.forward()
    rig.say(b"qemu-system-x86_64: warning: one\r\n\nqemu-system-x86_64: two\n")
    assert not forwarder.forward()
    assert not forwarder.forward()
    assert rig.entries == ["qemu-system-x86_64: warning: one", "qemu-system-x86_64: two"]


def test_an_unfinished_line_waits_for_its_end_or_the_childs(rig: Rig) -> None:
    forwarder = rig.forwarder()
    rig.say(b"half a ")
    forwarder.forward()
    assert rig.entries == []
    rig.say(b"line\nlast wo")
    forwarder.forward()
    assert rig.entries == ["half a line"]
    rig.say(b"rds")
    assert not forwarder.forward(final=True)
    assert not forwarder.forward(final=True)
    assert rig.entries == ["half a line", "last words"]


def test_it_goes_on_from_what_the_record_says(rig: Rig) -> None:
    first = rig.forwarder()
    rig.say(b"one\n")
    first.forward()
    rig.say(b"two\n")
    rig.log.rotate()
    rig.say(b"three\n")
    second = rig.forwarder(Cursor(first.cursor.file, first.cursor.offset))
    while second.forward():
        pass
    assert rig.entries == ["one", "two", "three"]


def test_a_line_is_counted_only_when_it_is_sent(rig: Rig) -> None:
    forwarder = rig.forwarder()
    rig.say(b"one\n")
    before = forwarder.cursor
    rig.fails = True
    with pytest.raises(KeyboardInterrupt):
        forwarder.forward()
    assert forwarder.cursor == before
    rig.fails = False
    forwarder.forward()
    assert rig.entries == ["one"]


def test_a_place_in_a_file_that_is_gone(rig: Rig) -> None:
    rig.say(b"old\n")
    rig.log.rotate()
    rig.say(b"new\n")
    rig.forwarder(Cursor("1:1", 99)).forward()
    assert rig.entries == ["new"]


def test_a_flood_is_counted_and_not_repeated(rig: Rig) -> None:
    forwarder = rig.forwarder()
    rig.say(b"".join(b"line %d\n" % number for number in range(1000)))
    while forwarder.forward():
        pass
    assert rig.entries == [f"line {number}" for number in range(100)]
    rig.now += 2.0
    rig.say(b"later\n")
    forwarder.forward()
    assert rig.entries[100:] == [f"900 lines or more are only in {rig.log.path}", "later"]
    rig.say(b"x\n" * 500)
    while forwarder.forward(final=True):
        pass
    assert rig.entries[-1] == f"481 lines or more are only in {rig.log.path}"


def test_far_behind_it_jumps_to_the_end(rig: Rig) -> None:
    forwarder = rig.forwarder()
    rig.say(b"a\n" * (stderrlog.BACKLOG // 2 + 100) + b"the end\n")
    reads = 1
    while forwarder.forward():
        reads += 1
    assert reads <= 2
    rig.now += 100.0
    forwarder.forward()
    assert "lines or more are only in" in rig.entries[-1]


def test_lines_that_no_journal_likes(rig: Rig) -> None:
    forwarder = rig.forwarder()
    rig.say(b"\xff\xfe caf\xc3\xa9\n" + b"x" * 20_000 + b"\nshort\n")
    while forwarder.forward():
        pass
    assert rig.entries[0] == "\\xff\\xfe café"
    assert [len(entry) for entry in rig.entries[1:]] == [8192, 8192, 3616, 5]
