# SPDX-License-Identifier: LGPL-2.1-or-later
"""The log file: rotation, what a crash or a person may leave behind, and followers that must see every byte once."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtd.errors import HostError
from virtd.logs import chain, logfile
from virtd.logs.chain import Cursor
from virtd.logs.logfile import LogFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Feed:
    """A pipe into a log, without a pump."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)

    def move(self, log: LogFile, data: bytes, most: int = 1 << 16) -> None:
        """Send `data` through the pipe and take all of it."""
        for start in range(0, len(data), 4096):
            os.write(self.write, data[start : start + 4096])
            self.take(log, most)

    def take(self, log: LogFile, most: int = 1 << 16) -> None:
        while True:
            try:
                log.take(self.read, most)
            except BlockingIOError:
                return

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed()
    yield feed
    feed.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "web1.console.log"


def contents(log: LogFile) -> bytes:
    return b"".join(Path(segment.path).read_bytes() for segment in log.chain.files())


def numbered(first: int, last: int) -> bytes:
    return b"".join(b"line %06d\n" % number for number in range(first, last))


class Follower:
    """What virtdctl does: hold the file, read to its end, go on with the next one."""

    def __init__(self, log: LogFile, cursor: Cursor) -> None:
        self.log = log
        self.cursor = cursor
        self.fd = log.chain.open(cursor.file)
        self.seen = b""

    def _read(self) -> None:
        while data := os.pread(self.fd, 1000, self.cursor.offset):
            self.seen += data
            self.cursor = Cursor(self.cursor.file, self.cursor.offset + len(data))

    def follow(self) -> None:
        """Read what there is."""
        while True:
            self._read()
            cursor, more = self.log.chain.locate(self.cursor)
            if cursor.file != self.cursor.file:
                os.close(self.fd)
                self.fd = self.log.chain.open(cursor.file)
            elif not more:
                return
            self.cursor = cursor

    def close(self) -> None:
        os.close(self.fd)


# The file itself


def test_directories_are_made_and_the_file_is_private(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, b"hello\n")
    assert path.read_bytes() == b"hello\n"
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.parent.stat().st_mode & 0o007 == 0
    assert log.size == 6
    assert log.file == f"{path.stat().st_dev}:{path.stat().st_ino}"
    assert fcntl.fcntl(log.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    log.close()
    log.close()


def test_an_existing_file_is_continued(path: Path, feed: Feed) -> None:
    path.parent.mkdir()
    path.write_bytes(b"before\n")
    log = LogFile(path)
    feed.move(log, b"after\n")
    assert path.read_bytes() == b"before\nafter\n"
    log.close()


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_what_is_no_file_is_refused(path: Path, kind: str) -> None:
    path.parent.mkdir()
    if kind == "symlink":
        path.symlink_to("/dev/null")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(HostError, match=r"web1\.console\.log"):
        LogFile(path)


def test_a_pipe_without_writers_says_so(path: Path) -> None:
    log = LogFile(path)
    read, write = os.pipe()
    os.write(write, b"last words")
    os.close(write)
    assert log.take(read, 4096) == 10
    assert log.take(read, 4096) == 0
    os.close(read)
    log.close()


# Rotation


def test_it_rotates_at_line_ends_and_keeps_as_many_backups_as_told(path: Path, feed: Feed) -> None:
    log = LogFile(path, limit=1000, backups=3)
    data = numbered(0, 1000)
    feed.move(log, data)
    assert [Path(segment.path).name for segment in log.chain.files()] == [
        "web1.console.log.3",
        "web1.console.log.2",
        "web1.console.log.1",
        "web1.console.log",
    ]
    assert sorted(path.parent.iterdir()) == sorted(Path(segment.path) for segment in log.chain.files())
    for segment in log.chain.files():
        assert Path(segment.path).stat().st_size == segment.size <= 1000 + len("line 000000\n")
        assert Path(segment.path).read_bytes().endswith(b"\n")
    assert data.endswith(contents(log))
    assert len(contents(log)) > 3000
    log.close()


def test_a_file_without_line_ends_is_cut_anyway(path: Path, feed: Feed) -> None:
    log = LogFile(path, limit=1000, backups=100)
    feed.move(log, b"x" * 10_000)
    assert len(log.chain.files()) > 5
    assert contents(log) == b"x" * 10_000
    log.close()


def test_no_limit_and_no_backups(path: Path, feed: Feed) -> None:
    log = LogFile(path, limit=0)
    feed.move(log, numbered(0, 10_000))
    assert len(log.chain.files()) == 1
    log.close()
    log = LogFile(path, limit=1000, backups=0)
    feed.move(log, numbered(10_000, 10_200))
    assert list(path.parent.iterdir()) == [path]
    assert numbered(10_000, 10_200).endswith(path.read_bytes())
    log.close()


def test_each_new_file_is_announced_when_it_is_at_the_path(path: Path, feed: Feed) -> None:
    told = []

    def on_rotate(fd: int) -> None:
        told.append(os.fstat(fd).st_ino)
        assert os.stat(path).st_ino == told[-1]
        assert os.fstat(fd).st_size == 0
        raise RuntimeError("a slot could not be replaced, the log goes on")

    log = LogFile(path, limit=1000, on_rotate=on_rotate)
    feed.move(log, numbered(0, 200))
    assert len(told) == len(set(told)) == 2
    assert contents(log) == numbered(0, 200)
    log.close()


def test_a_rotation_that_fails_lets_the_file_grow(path: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(path, limit=1000, backups=50)
    feed.move(log, numbered(0, 50))
    monkeypatch.setattr(logfile, "ROTATE_AGAIN", 5000)

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    feed.move(log, numbered(50, 300))
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    feed.move(log, numbered(300, 1000))
    assert len(log.chain.files()) > 3
    assert contents(log) == numbered(0, 1000)
    log.close()


def test_a_failure_half_way_is_taken_back(path: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(path, backups=3)
    feed.move(log, b"one\n")
    rename = os.rename

    def failing(source: str, target: str) -> None:
        if source.endswith(".new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        log.rotate()
    monkeypatch.undo()
    assert list(path.parent.iterdir()) == [path]
    feed.move(log, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    log.close()


# Crashes


class KilledError(BaseException):
    """Not an Exception, so that no clean-up runs that a SIGKILL wouldn't run."""


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the process 'die' after so many changes to the directory; returns the descriptors opened till then."""
    left = itertools.count(steps, -1)
    opened: list[int] = []

    def dying(function: Callable[..., int | None]) -> Callable[..., int | None]:
        def wrapper(*arguments: object) -> int | None:
            if next(left) <= 0:
                raise KilledError
            result = function(*arguments)
            if isinstance(result, int):
                opened.append(result)
            return result

        return wrapper

    for name in ("open", "rename", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return opened


@pytest.mark.parametrize("backups", [0, 1, 3])
@pytest.mark.parametrize("existing", [0, 1, 3])
def test_killed_at_any_step_of_a_rotation(tmp_path: Path, feed: Feed, existing: int, backups: int) -> None:
    for stored in (True, False):
        outcomes = []
        for steps in range(8):
            place = tmp_path / f"{steps}{stored}" / "log"
            with pytest.MonkeyPatch.context() as patch:
                outcomes.append(kill_a_rotation(place, feed, patch, steps, existing, backups, stored=stored))
        assert outcomes[0] is False
        assert outcomes[-1] is True


def kill_a_rotation(
    path: Path, feed: Feed, patch: pytest.MonkeyPatch, steps: int, existing: int, backups: int, *, stored: bool
) -> bool:
    """Rotate, die after so many steps, come again and see that nothing is lost; whether it was done in so few."""
    log = LogFile(path, backups=backups)
    for number in range(existing):
        feed.move(log, numbered(number * 10, number * 10 + 10))
        log.rotate()
    feed.move(log, numbered(existing * 10, existing * 10 + 10))
    os.write(feed.write, numbered(500, 505))
    kept = os.dup(log.fd)
    follower = Follower(log, Cursor(log.file, 0))
    follower._read()
    opened = crash_after(steps, patch)
    try:
        log.rotate()
        finished = True
    except KilledError:
        finished = False
        for fd in opened:
            os.close(fd)
    patch.undo()
    log.close()

    told: list[int] = []
    if stored:
        again = LogFile(path, fd=kept, backups=backups, on_rotate=told.append)
        moved_on = again.file != follower.cursor.file
        assert told == ([again.fd] if moved_on else [])
    else:
        os.close(kept)
        again = LogFile(path, backups=backups, on_rotate=told.append)
        assert told == []
    feed.take(again)
    follower.log = again
    follower.follow()
    assert follower.seen == numbered(existing * 10, existing * 10 + 10) + numbered(500, 505)
    everything = numbered(0, existing * 10 + 10) + numbered(500, 505)
    assert everything.endswith(contents(again))
    # At least as many whole backups as it was told to keep, or all there are; fewer by one only half-way through.
    assert contents(again).count(b"\n") >= min(existing, max(0, backups - (not finished))) * 10 + 5
    again.rotate()
    feed.move(again, b"afterwards\n")
    follower.follow()
    assert follower.seen.endswith(numbered(500, 505) + b"afterwards\n")
    assert not Path(f"{path}.new").exists()
    follower.close()
    again.close()
    return finished


def test_a_descriptor_of_an_older_file_leads_to_the_current_one(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    kept = os.dup(log.fd)
    feed.move(log, b"one\n")
    log.rotate()
    log.rotate()
    feed.move(log, b"three\n")
    log.close()
    told: list[int] = []
    log = LogFile(path, fd=kept, on_rotate=told.append)
    assert told == [log.fd]
    feed.move(log, b"four\n")
    assert path.read_bytes() == b"three\nfour\n"
    assert contents(log) == b"one\nthree\nfour\n"
    log.close()


@pytest.mark.parametrize("kind", ["pipe", "read-only", "closed"])
def test_a_useless_descriptor_is_replaced(path: Path, feed: Feed, kind: str) -> None:
    LogFile(path).close()
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open(path, os.O_RDONLY)
    if kind == "closed":
        os.close(fd)
    told: list[int] = []
    log = LogFile(path, fd=fd, on_rotate=told.append)
    assert told == [log.fd]
    feed.move(log, b"x\n")
    assert path.read_bytes() == b"x\n"
    log.close()


def test_an_appending_descriptor_is_made_fit_for_splice(path: Path, feed: Feed) -> None:
    path.parent.mkdir()
    path.write_bytes(b"before\n")
    log = LogFile(path, fd=os.open(path, os.O_RDWR | os.O_APPEND))
    feed.move(log, b"after\n")
    assert path.read_bytes() == b"before\nafter\n"
    log.close()


def test_with_a_descriptor_an_unusable_path_is_no_end(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    kept = os.dup(log.fd)
    log.close()
    path.rename(path.with_name("aside"))
    path.mkdir()
    log = LogFile(path, fd=kept)
    feed.move(log, b"still here\n")
    assert path.with_name("aside").read_bytes() == b"still here\n"
    assert not log.check()
    path.rmdir()
    assert log.check()
    feed.move(log, b"back\n")
    assert path.read_bytes() == b"back\n"
    log.close()


# People's hands


def test_a_file_moved_away_by_hand(path: Path, feed: Feed) -> None:
    told: list[int] = []
    log = LogFile(path, on_rotate=told.append)
    feed.move(log, b"one\n")
    follower = Follower(log, Cursor(log.file, 0))
    path.rename(path.with_name("web1.console.log-20261123"))
    feed.move(log, b"two\n")
    assert log.check()
    assert told == [log.fd]
    assert not log.check()
    feed.move(log, b"three\n")
    assert path.read_bytes() == b"three\n"
    assert path.with_name("web1.console.log-20261123").read_bytes() == b"one\ntwo\n"
    follower.follow()
    assert follower.seen == b"one\ntwo\nthree\n"
    follower.close()
    log.close()


def test_a_file_replaced_by_hand_is_continued_at_its_end(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, b"one\n")
    path.unlink()
    path.write_bytes(b"made by logrotate\n")
    assert log.check()
    feed.move(log, b"two\n")
    assert path.read_bytes() == b"made by logrotate\ntwo\n"
    log.close()


def test_the_whole_directory_removed(path: Path, feed: Feed) -> None:
    log = LogFile(path, limit=100)
    feed.move(log, numbered(0, 20))
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    feed.move(log, numbered(20, 40))
    assert path.exists()
    log.close()


@pytest.mark.parametrize("limit", [1 << 20, 64])
def test_a_file_cut_between_two_moves_gets_no_hole(path: Path, feed: Feed, limit: int) -> None:
    """logrotate's copytruncate, at a moment that nobody is told of: `check` is only called now and then."""
    log = LogFile(path, limit=limit, backups=1)
    for number in range(20):
        feed.move(log, b"line %06d\n" % number)
        if number % 3 == 2:
            os.truncate(path, 0)
    assert b"\0" not in contents(log)
    log.close()


def test_a_file_cut_by_hand_gets_no_hole(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, numbered(0, 100))
    follower = Follower(log, log.chain.tail(0))
    os.truncate(path, 0)
    assert not log.check()
    feed.move(log, b"afresh\n")
    assert path.read_bytes() == b"afresh\n"
    follower.follow()
    assert follower.seen == b"afresh\n"
    follower.close()
    log.close()


def test_a_line_added_by_hand_is_not_written_over(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, b"one\n")
    with path.open("ab") as file:
        file.write(b"a note\n")
    log.check()
    feed.move(log, b"two\n")
    assert path.read_bytes() == b"one\na note\ntwo\n"
    log.close()


# Followers


def test_a_follower_sees_every_byte_once_over_rotations(path: Path, feed: Feed) -> None:
    log = LogFile(path, limit=500, backups=200)
    feed.move(log, numbered(0, 10))
    follower = Follower(log, log.chain.tail(-1))
    for number in range(10, 500, 7):
        feed.move(log, numbered(number, number + 7))
        if number % 3 == 0:
            follower.follow()
    follower.follow()
    assert follower.seen == contents(log)
    follower.close()
    log.close()


def test_a_follower_that_is_ahead_of_the_known_size_is_not_sent_back(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, b"known\n")
    # The kernel has moved the bytes, the pump's thread hasn't added them up yet.
    with path.open("ab") as file:
        file.write(b"more\n")
    cursor = Cursor(log.file, 11)
    assert log.chain.locate(cursor) == (cursor, 0)
    log.close()


def test_a_slow_follower_reads_a_removed_file_to_its_end(path: Path, feed: Feed) -> None:
    log = LogFile(path, backups=1)
    feed.move(log, b"one\n")
    follower = Follower(log, Cursor(log.file, 0))
    for word in (b"two\n", b"three\n", b"four\n"):
        log.rotate()
        feed.move(log, word)
    assert log.chain.locate(follower.cursor) == (follower.cursor, 4)
    follower.follow()
    assert follower.seen == b"one\nthree\nfour\n"
    follower.close()
    log.close()


@pytest.mark.parametrize("numbers_are_reused", [False, True])
def test_what_a_slow_follower_has_missed_is_counted(path: Path, feed: Feed, numbers_are_reused: bool) -> None:
    log = LogFile(path, limit=0, backups=2)
    sizes, files, held = [100, 200, 300, 400, 500, 600], [], []
    for index, size in enumerate(sizes):
        feed.move(log, b"x" * (size - 1) + b"\n")
        files.append(log.file)
        if index == 0 or not numbers_are_reused:
            held.append(log.chain.open(log.file))  # whoever still reads a file holds it
        log.rotate()
    feed.move(log, b"the present\n")
    # It reads its own file to the end, and then goes on in the oldest that there is.
    for index in range(4 - 3 * numbers_are_reused):
        assert log.chain.locate(Cursor(files[index], 10)) == (Cursor(files[index], 10), sizes[index] - 10)
        place = Cursor(files[index], sizes[index])
        found, more = log.chain.locate(place)
        assert (found, more) == (Cursor(files[4], 0), 500)
        assert log.chain.missed(place, found) == sum(sizes[index + 1 : 4])
    for place in (Cursor(files[4], 500), Cursor(files[5], 600), Cursor(log.file, 5)):
        assert log.chain.missed(place, log.chain.locate(place)[0]) == 0
    # A later daemon knows nothing of what was removed before.
    again = LogFile(path, limit=0, backups=2)
    place = Cursor(files[0], 100)
    assert again.chain.locate(place) == (Cursor(files[4], 0), 500)
    assert again.chain.missed(place, Cursor(files[4], 0)) == chain.UNKNOWN
    for kept in (log, again):
        kept.close()
    for fd in held:
        os.close(fd)


def test_an_unknown_file_is_followed_by_the_oldest(path: Path, feed: Feed) -> None:
    log = LogFile(path)
    feed.move(log, b"one\n")
    first = log.file
    log.rotate()
    assert log.chain.newer("1:1") == first
    assert log.chain.newer(first) == log.file
    assert log.chain.newer(log.file) is None
    assert log.chain.locate(Cursor("1:1", 12345)) == (Cursor(first, 0), 4)
    with pytest.raises(FileNotFoundError):
        log.chain.open("1:1")
    log.close()


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\0"]), max_size=12), min_size=1, max_size=5),
    lines=st.integers(-1, 15),
    block=st.sampled_from([1, 2, 3, 1 << 16]),
)
def test_tail_begins_where_the_last_lines_do(parts: list[list[bytes]], lines: int, block: int) -> None:
    pieces = [b"".join(part) for part in parts]
    whole = b"".join(pieces)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "_BLOCK", block)
        path = Path(name) / "log"
        for number, piece in enumerate(reversed(pieces)):
            Path(f"{path}.{number}" if number else path).write_bytes(piece)
        log = LogFile(path, backups=4)
        follower = Follower(log, log.chain.tail(lines))
        follower.follow()
        follower.close()
        log.close()
    wanted = whole.splitlines(keepends=True) if b"\r" in whole else split_lines(whole)
    expected = whole if lines < 0 else b"".join(wanted[-lines:] if lines else [])
    assert follower.seen == expected


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their ends; only a newline ends one."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(1, 40)),
            st.tuples(st.just("rotate"), st.just(0)),
            st.tuples(st.just("follow"), st.just(0)),
            st.tuples(st.just("restart"), st.integers(0, 1)),
        ),
        max_size=25,
    )
)
def test_any_order_of_writing_rotating_restarting_and_following(script: list[tuple[str, int]]) -> None:
    feed = Feed()
    written = 0
    with tempfile.TemporaryDirectory() as name:
        log = LogFile(Path(name) / "log", limit=300, backups=100)
        stale = os.dup(log.fd)
        follower = Follower(log, log.chain.tail(-1))
        for step, amount in script:
            if step == "write":
                feed.move(log, numbered(written, written + amount))
                written += amount
            elif step == "rotate":
                log.rotate()
            elif step == "follow":
                follower.follow()
            else:
                log.close()
                fd = os.dup(stale) if amount else None
                log = follower.log = LogFile(Path(name) / "log", limit=300, backups=100, fd=fd)
        follower.follow()
        assert follower.seen == contents(log) == numbered(0, written)
        follower.close()
        log.close()
    os.close(stale)
    feed.close()
