# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places in logs and claims on consoles, one by one; tests/unit/host/test_host.py has them with real guests."""

from __future__ import annotations

import asyncio
import os
import subprocess
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.whole_host import on_loop, until
from virtd import errors
from virtd.guests import console
from virtd.guests.console import Followers, Place, Writers
from virtd.logs.chain import Cursor
from virtd.logs.logfile import LogFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FakePump:
    """Counts who watches; has never anything left in its pipe."""

    def __init__(self) -> None:
        self.watched: list[str] = []

    def watch(self, key: str) -> None:
        self.watched.append(key)

    def unwatch(self, key: str) -> None:
        self.watched.remove(key)

    def drain(self, key: str) -> Future[int]:
        future: Future[int] = Future()
        future.set_result(0)
        return future


class Log:
    """A log that the test writes to, and the followers of it."""

    def __init__(self, path: str) -> None:
        self.file = LogFile(path, limit=1 << 10, backups=3)
        self.pump = FakePump()
        self.followers = Followers(self.pump)  # type: ignore[arg-type]
        self.over = asyncio.Event()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)

    def write(self, text: bytes) -> None:
        """As the pump does it: move, then tell."""
        os.write(self._pipe[1], text)
        while text:
            text = text[self.file.take(self._pipe[0], 1 << 16) :]
        self.followers.grown("key")

    async def place(self, asked: Cursor | None = None, lines: int = 0, *, wait: bool = False) -> Place:
        place = await self.followers.place(self.file, "key", asked, lines, self.over, wait=wait)
        if place.fd is not None:
            status = os.fstat(place.fd)
            assert f"{status.st_dev}:{status.st_ino}" == place.cursor.file
            os.close(place.fd)
        return place

    def close(self) -> None:
        self.file.close()
        for fd in self._pipe:
            os.close(fd)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(str(tmp_path / "web1.console.log"))
    yield log
    log.close()


@on_loop
async def test_a_place_without_waiting(log: Log) -> None:
    log.write(b"one\ntwo\n")
    place = await log.place()
    assert (place.cursor.offset, place.more, place.ended) == (8, False, False)
    assert place.fd is not None
    place = await log.place(lines=1)
    assert (place.cursor.offset, place.more) == (4, True)
    # Asked for a place in the file that it has: no descriptor.
    assert (await log.place(Cursor(place.cursor.file, 0))).fd is None
    assert log.pump.watched == []


@on_loop
async def test_all_followers_are_woken(log: Log) -> None:
    end = (await log.place()).cursor
    waiting = [asyncio.ensure_future(log.place(end, wait=True)) for _ in range(5)]
    await until(lambda: log.pump.watched == ["key"] * 5)
    log.write(b"x")
    places = await asyncio.gather(*waiting)
    assert [(place.cursor, place.more) for place in places] == [(end, True)] * 5
    # Nothing is left of them.
    assert log.pump.watched == []
    assert log.followers._waiting == {}
    log.write(b"nobody listens")


@on_loop
async def test_bytes_that_were_there_before_the_question(log: Log) -> None:
    end = (await log.place()).cursor
    log.write(b"x")
    assert (await log.place(end, wait=True)).more is True


@on_loop
async def test_a_log_that_refuses_is_told_of_at_once_and_once(log: Log) -> None:
    end = (await log.place()).cursor
    for reason in ("No space left on device", ""):
        waiting = asyncio.ensure_future(log.place(end, wait=True))
        await until(lambda: log.pump.watched)
        log.followers.refused("other", reason)
        await asyncio.sleep(0.02)
        assert not waiting.done()
        log.followers.refused("key", reason)
        place = await waiting
        assert (place.refused, place.more) == (reason, False)
        assert (await log.place(end)).refused == reason


@on_loop
async def test_a_file_that_is_rotated_away_between_two_looks(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write(b"one\n")
    first = log.file.file
    held = log.file.chain.open(first)  # so that no other gets its number
    real = log.file.chain.open

    def rotated(file: str) -> int:
        monkeypatch.setattr(log.file.chain, "open", real)
        for _ in range(4):
            log.write(b"x" * 2000 + b"\n")
        return real(file)

    monkeypatch.setattr(log.file.chain, "open", rotated)
    place = await log.place(lines=-1)
    assert place.cursor.file != first
    os.close(held)


@on_loop
async def test_bytes_of_another_guest_wake_nobody(log: Log) -> None:
    end = (await log.place()).cursor
    waiting = asyncio.ensure_future(log.place(end, wait=True))
    await until(lambda: log.pump.watched)
    log.followers.grown("other")
    log.followers.grown("key")  # a spurious one: there is nothing new
    await asyncio.sleep(0.02)
    assert not waiting.done()
    log.write(b"x")
    assert (await waiting).more is True


@on_loop
async def test_the_end_comes_after_the_last_byte(log: Log) -> None:
    end = (await log.place()).cursor
    log.write(b"last words\n")
    log.over.set()
    place = await log.place(end, wait=True)
    assert (place.more, place.ended) == (True, False)
    place = await log.place(Cursor(end.file, 11), wait=True)
    assert (place.more, place.ended) == (False, True)


@on_loop
async def test_a_waiting_follower_is_told_of_the_end(log: Log) -> None:
    waiting = asyncio.ensure_future(log.place((await log.place()).cursor, wait=True))
    await until(lambda: log.pump.watched)
    log.over.set()
    assert (await waiting).ended is True


@on_loop
async def test_a_rotation_while_waiting_brings_the_next_file(log: Log) -> None:
    log.write(b"x" * 100)
    end = (await log.place()).cursor
    waiting = asyncio.ensure_future(log.place(end, wait=True))
    await until(lambda: log.pump.watched)
    log.file.rotate()
    log.write(b"new")
    place = await waiting
    assert (place.cursor, place.more) == (Cursor(log.file.file, 0), True)
    assert place.fd is not None
    assert place.cursor.file != end.file


@on_loop
async def test_a_follower_in_vain_is_told_so_after_a_while(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "POLL", 0.05)
    end = (await log.place()).cursor
    place = await log.place(end, wait=True)
    assert place == Place(end, more=False, ended=False, fd=None)


@on_loop
async def test_a_follower_that_gives_up_leaves_nothing(log: Log) -> None:
    waiting = asyncio.ensure_future(log.place((await log.place()).cursor, wait=True))
    await until(lambda: log.pump.watched)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert log.pump.watched == []
    assert log.followers._waiting == {}


@on_loop
async def test_a_follower_misses_and_repeats_nothing(log: Log) -> None:
    """Whatever the order of writing, rotating, waking and asking."""
    total = b"".join(b"%d\n" % number for number in range(3000))
    seen = b""

    async def read() -> None:
        nonlocal seen
        place = await log.followers.place(log.file, "key", None, -1, log.over, wait=False)
        assert place.fd is not None
        fd = place.fd
        while not place.ended:
            data = os.pread(fd, 97, place.cursor.offset)
            seen += data
            cursor = Cursor(place.cursor.file, place.cursor.offset + len(data))
            place = await log.followers.place(log.file, "key", cursor, 0, log.over, wait=True)
            if place.fd is not None:
                os.close(fd)
                fd = place.fd
        os.close(fd)

    reading = asyncio.ensure_future(read())
    for start in range(0, len(total), 50):
        log.write(total[start : start + 50])
        await asyncio.sleep(0)
    log.over.set()
    await asyncio.wait_for(reading, 20)
    assert seen == total


# Who may type


def claim(writers: Writers, kept: dict[str, Any] | None = None, **more: Any) -> console.Claim:
    return writers.claim(
        "web1",
        kept,
        force=more.get("force", False),
        token=more.get("token"),
        by=more.get("by", "ann"),
        pid=os.getpid(),
    )


@on_loop
async def test_one_claim_at_a_time() -> None:
    writers = Writers("domain")
    first = claim(writers)
    with pytest.raises(errors.Busy, match=rf"The console of web1 is in use by ann \(PID {os.getpid()}\)"):
        claim(writers, by="ben")
    with pytest.raises(errors.Busy):
        claim(writers, by="ben", token="guessed")
    assert not first.taken.is_set()
    second = claim(writers, by="ben", force=True)
    assert (first.taken.is_set(), first.taken_by) == (True, "ben")
    assert second.token != first.token
    # Who was thrown out has nothing to give up any more.
    assert writers.release("web1", first) is False
    assert writers.release("web1", second) is True
    assert writers.release("web1", second) is False
    claim(writers, by="cem")


@on_loop
async def test_the_same_client_over_a_second_connection() -> None:
    """Its first connection broke and the server doesn't know yet."""
    writers = Writers("domain")
    first = claim(writers)
    again = claim(writers, token=first.token)
    assert again.token == first.token
    assert first.taken.is_set()
    assert writers.release("web1", first) is False


@on_loop
async def test_after_a_restart_the_place_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"token": "secret", "by": "ann", "pid": os.getpid()}
    with pytest.raises(errors.Busy, match="in use by ann"):
        claim(Writers("domain"), kept, by="ben")
    with pytest.raises(errors.Busy):
        claim(Writers("domain"), kept, by="ben", token="guessed")
    assert claim(Writers("domain"), kept, token="secret").token == "secret"
    assert claim(Writers("domain"), kept, by="ben", force=True).token != "secret"
    monkeypatch.setattr(console, "GRACE", 0.0)
    assert claim(Writers("domain"), kept, by="ben").by == "ben"


@pytest.fixture
def gone() -> int:
    """The PID of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


@on_loop
async def test_after_a_restart_a_client_that_is_gone_keeps_nobody_out(gone: int) -> None:
    kept = {"token": "secret", "by": "ann", "pid": gone}
    assert claim(Writers("domain"), kept, by="ben").by == "ben"


@on_loop
async def test_what_ends_a_claim() -> None:
    writers = Writers("domain")
    over = asyncio.Event()
    waiting = asyncio.ensure_future(console.write(claim(writers), over))
    await asyncio.sleep(0)
    claim(writers, force=True)
    assert await waiting == "taken-over"
    waiting = asyncio.ensure_future(console.write(claim(writers, force=True), over))
    await asyncio.sleep(0)
    over.set()
    assert await waiting == "ended"
