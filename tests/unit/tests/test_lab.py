# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's logic that needs no lab: numbered lines, names, notes, the initramfs format, the key of a root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import Checker
from tests.lab import cpio, lines, root, state, suites


def stream(first: int, last: int) -> bytes:
    return b"".join(lines.line(number) for number in range(first, last + 1))


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 7, 80, 81, 4096])
def test_a_whole_stream_is_whole_however_it_is_read(size: int) -> None:
    data = b"virtd-lab ready\r\n" + stream(1, 300) + b"hello\r\n" + stream(301, 400)
    report = lines.check(in_pieces(data, size), first=1)
    assert report.whole
    assert (report.first, report.last, report.right) == (1, 400, 400)
    assert report.others == [b"virtd-lab ready", b"hello"]


def test_lines_have_the_size_that_the_guest_writes() -> None:
    assert {len(lines.line(number)) for number in range(1, 60)} == {lines.SIZE}


def test_lost_lines_are_found_in_the_middle_and_at_the_beginning() -> None:
    report = lines.check([stream(3, 5), stream(9, 10)], first=1)
    assert report.lost == [(1, 2), (6, 8)]
    assert report.lines_lost == 5
    assert not report.whole


def test_a_stream_that_may_begin_anywhere_has_lost_nothing_at_its_beginning() -> None:
    assert lines.check([stream(70, 80)]).whole


def test_what_is_shown_from_anywhere_may_begin_with_the_answer() -> None:
    # A console that is attached between two lines shows the answer first when the guest is quick: see test_console.
    checker = Checker(anywhere=True)
    checker.feed(b"word\r\n" + stream(7, 9))
    assert (checker.tally.words, checker.tally.first, checker.tally.whole) == ([b"word"], 7, True)


@pytest.mark.parametrize("cut", [1, 5, 30, 76])
def test_the_end_of_a_line_at_the_beginning_is_no_fault(cut: int) -> None:
    data = lines.line(6)[cut:] + stream(7, 9)
    checker = Checker(anywhere=True)
    checker.feed(data)
    assert (checker.tally.lines, checker.tally.first, checker.tally.whole) == (3, 7, True)
    # The same where a whole line had to come first, or further on, is one.
    whole = Checker()
    whole.feed(data)
    checker.feed(data)
    assert not whole.tally.whole
    assert not checker.tally.whole


def test_repeated_lines_are_found() -> None:
    report = lines.check([stream(1, 5), stream(4, 8)], first=1)
    assert report.repeated == [4, 5]
    assert report.last == 8


@pytest.mark.parametrize("gone", [slice(40, 41), slice(79, 81), slice(100, 200), slice(160, 240)])
def test_no_lost_byte_goes_unnoticed(gone: slice) -> None:
    data = bytearray(stream(1, 10))
    del data[gone]
    assert not lines.check([bytes(data)], first=1).whole


def test_an_unfinished_line_at_the_end_is_no_fault() -> None:
    report = lines.check([stream(1, 3) + lines.line(4)[:30]], first=1)
    assert report.whole
    assert report.tail == lines.line(4)[:30]


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a.b", "a b", "x" * 33, "ä"])
def test_names_that_cannot_be_a_host_are_refused(name: str) -> None:
    with pytest.raises(state.LabError):
        state.directory_of(name)


def test_notes_are_merged_and_read_back(tmp_path: Path) -> None:
    assert state.read_state(str(tmp_path)) == {}
    state.write_state(str(tmp_path), {"suite": "trixie", "leader": 7})
    state.write_state(str(tmp_path), {"leader": 8, "root": "/a=b"})
    assert state.read_state(str(tmp_path)) == {"suite": "trixie", "leader": "8", "root": "/a=b"}


def test_a_reused_pid_is_not_taken_for_the_recorded_process() -> None:
    mine = os.getpid()
    assert state.recorded({"leader": str(mine), "leader_start": state.start_time(mine)}, "leader") == mine
    assert state.recorded({"leader": str(mine), "leader_start": "1"}, "leader") == 0
    assert state.recorded({}, "leader") == 0


def test_the_initramfs_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = cpio.Archive()
    archive.directory("bin")
    archive.file("bin/init", b"#!/bin/sh\n", 0o755)
    data = archive.finish()
    assert len(data) % 4 == 0
    assert data.count(b"070701") == 3
    if not any(Path(directory, "cpio").exists() for directory in os.environ["PATH"].split(":")):
        pytest.skip("this host has no cpio to compare with")
    done = subprocess.run(["cpio", "-t", "--quiet"], input=data, capture_output=True, check=True)
    assert done.stdout.split() == [b"bin", b"bin/init"]


def test_every_suite_has_a_root_of_its_own() -> None:
    assert len({root.key_of(suite) for suite in suites.SUITES.values()}) == len(suites.SUITES)


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(state.LabError, match="bookworm, forky, trixie"):
        suites.suite_named("sarge")
