# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pump: every byte once, whoever is killed; a guest is never blocked or starved; silence costs nothing."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import queue
import resource
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.logs.pump_under_fire import count
from virtd.logs import channel as channel_module
from virtd.logs import mover
from virtd.logs import pump as pump_module
from virtd.logs.logfile import LogFile
from virtd.logs.pump import Loss, Pump

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30.0  # seconds until a test that waits for something that should happen fails


class Rig:
    """A pump whose callbacks come into queues, pipes that are written by hand, and logs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes: queue.Queue[str] = queue.Queue()
        self.losses: queue.Queue[Loss] = queue.Queue()
        self.ends: queue.Queue[str] = queue.Queue()
        self.pump = Pump(
            lambda function, *arguments: function(*arguments), on_bytes=self.bytes.put, on_drop=self.losses.put
        )
        self.pipes: list[int] = []
        self.logs: dict[str, LogFile] = {}

    def add(self, key: str, log: LogFile | None = None, **options: Any) -> int:
        """Add a pipe with a log of its own; returns the end to write to."""
        read, write = os.pipe()
        self.pipes += [read, write]
        self.logs[key] = log or LogFile(self.directory / f"{key}.log", **options)
        self.pump.add(key, read, self.logs[key], self.ends.put)
        return write

    def hang_up(self, write: int) -> None:
        self.pipes.remove(write)
        os.close(write)

    def content(self, key: str) -> bytes:
        return b"".join(Path(segment.path).read_bytes() for segment in self.logs[key].chain.files())

    def moved(self, key: str) -> int:
        """Bytes, until now."""
        return self.pump._channels[key].moved

    def close(self) -> None:
        self.pump.close()
        for fd in self.pipes:
            os.close(fd)
        for log in self.logs.values():
            log.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    rig.pump.start()
    yield rig
    rig.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """For what no callback tells."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def wakes() -> int:
    """How often the pump's thread has slept and been woken."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "pump":
            status = (task / "status").read_text()
            return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    raise AssertionError("no pump")


@pytest.fixture(autouse=True, scope="module")
def named_thread() -> Iterator[None]:
    """Only Python 3.14 gives threads their name in the kernel; older ones are given it here, for `wakes`."""
    run = Pump._run

    def named(self: Pump) -> None:
        Path("/proc/thread-self/comm").write_text("pump")
        run(self)

    Pump._run = named  # type: ignore[method-assign]
    yield
    Pump._run = run  # type: ignore[method-assign]


# Moving


def test_everything_is_in_the_log_when_the_end_is_told(rig: Rig) -> None:
    write = rig.add("guest", limit=50_000, backups=100)
    data = b"".join(b"%d\n" % number for number in range(200_000))
    for start in range(0, len(data), 3333):
        os.write(write, data[start : start + 3333])
    rig.hang_up(write)
    assert rig.ends.get(timeout=PATIENCE) == "guest"
    assert rig.content("guest") == data
    assert len(rig.logs["guest"].chain.files()) > 20
    assert rig.pump._channels == {}


def test_what_was_written_before_the_start_is_moved_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    write = rig.add("guest")
    os.write(write, b"while nobody was there\n")
    rig.hang_up(write)
    rig.pump.start()
    assert rig.ends.get(timeout=PATIENCE) == "guest"
    assert rig.content("guest") == b"while nobody was there\n"
    rig.close()


def test_a_pipe_is_made_as_large_as_it_may_be(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    write = rig.add("large")
    rig.pump.drain("large").result(PATIENCE)
    assert fcntl.fcntl(write, fcntl.F_GETPIPE_SZ) == 1 << 20
    real = fcntl.fcntl

    def stingy(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETPIPE_SZ and value > 1 << 18:
            raise PermissionError(errno.EPERM, "over the user's share")
        return int(real(fd, command, value))

    monkeypatch.setattr(fcntl, "fcntl", stingy)
    write = rig.add("small")
    rig.pump.drain("small").result(PATIENCE)
    assert real(write, fcntl.F_GETPIPE_SZ) == 1 << 18


def test_a_key_is_pumped_once_and_free_after_its_end(rig: Rig) -> None:
    write = rig.add("guest")
    with pytest.raises(ValueError, match="guest"):
        rig.pump.add("guest", 0, rig.logs["guest"])
    os.write(write, b"one\n")
    rig.hang_up(write)
    rig.ends.get(timeout=PATIENCE)
    write = rig.add("guest", rig.logs["guest"])
    os.write(write, b"two\n")
    rig.pump.drain("guest").result(PATIENCE)
    assert rig.content("guest") == b"one\ntwo\n"


def test_what_is_removed_is_left_alone(rig: Rig) -> None:
    write = rig.add("guest")
    os.write(write, b"moved\n")
    assert rig.pump.drain("guest").result(PATIENCE) in (0, 6)
    rig.pump.remove("guest").result(PATIENCE)
    os.write(write, b"left in the pipe\n")
    other = rig.add("other")
    os.write(other, b"x\n")
    rig.pump.drain("other").result(PATIENCE)
    assert rig.content("guest") == b"moved\n"
    assert os.read(rig.pipes[0], 100) == b"left in the pipe\n"
    rig.pump.remove("guest").result(PATIENCE)
    assert rig.pump.drain("guest").result(PATIENCE) == 0
    rig.pump.watch("guest")
    rig.pump.unwatch("guest")


def test_a_drain_ends_a_nap_and_tells_the_end_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "NAP", 3_600_000)
    write = rig.add("guest")
    os.write(write, b"first\n")
    wait_until(lambda: rig.logs["guest"].size == 6)
    # It naps for an hour now.
    os.write(write, b"second\n")
    assert rig.pump.drain("guest").result(PATIENCE) == 7
    assert rig.content("guest") == b"first\nsecond\n"
    os.write(write, b"last words\n")
    rig.hang_up(write)
    assert rig.pump.drain("guest").result(PATIENCE) == 11
    assert rig.ends.get_nowait() == "guest"
    assert rig.content("guest").endswith(b"last words\n")


def test_a_drain_that_nobody_waits_for_any_more(rig: Rig) -> None:
    """A follower that hangs up cancels its drain, at any moment; the next one is answered all the same."""
    write = rig.add("guest")
    for number in range(50):
        os.write(write, b"x" * 1000)
        rig.pump.drain("guest").cancel()
        rig.pump.drain("guest").result(PATIENCE)
        assert len(rig.content("guest")) == 1000 * (number + 1)
    rig.pump.remove("guest").cancel()
    wait_until(lambda: not rig.pump._schedule.channels)


def test_a_drain_of_a_flood_has_an_end(rig: Rig) -> None:
    write = rig.add("guest", limit=1 << 20, backups=1)
    with Flood(write):
        wait_until(lambda: rig.moved("guest") > 1 << 20)
        rig.pump.drain("guest").result(PATIENCE)


def test_callbacks_come_in_the_loop(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        here = threading.get_ident()
        told: list[tuple[str, bool]] = []
        over = asyncio.Event()
        pump = Pump(loop.call_soon_threadsafe, on_bytes=lambda key: told.append((key, threading.get_ident() == here)))
        pump.start()
        read, write = os.pipe()
        log = LogFile(tmp_path / "log")
        pump.add("guest", read, log, lambda key: over.set())
        pump.watch("guest")
        os.write(write, b"x\n")
        assert await asyncio.wrap_future(pump.drain("guest")) in (0, 2)
        os.close(write)
        await asyncio.wait_for(over.wait(), PATIENCE)
        assert told[0] == ("guest", True)
        assert log.size == 2
        await asyncio.wrap_future(pump.remove("guest"))
        pump.close()
        log.close()
        os.close(read)

    asyncio.run(main())


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    pump = Pump(loop.call_soon_threadsafe, on_bytes=print)
    loop.close()
    read, write = os.pipe()
    log = LogFile(tmp_path / "log")
    pump.add("guest", read, log)
    pump.watch("guest")
    pump.start()
    os.write(write, b"moved all the same\n")
    wait_until(lambda: log.size == 19)
    pump.close()
    pump.close()
    log.close()
    os.close(read)
    os.close(write)


def test_its_death_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    dead = threading.Event()
    pump = Pump(print, on_death=dead.set)

    def broken() -> bool:
        raise OSError(errno.EINVAL, "no such clock")

    monkeypatch.setattr(pump._schedule, "wait", broken)
    pump.start()
    pump._post(print)
    assert dead.wait(PATIENCE)
    assert "the pump has died" in caplog.text
    pump.close()


def test_close_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    rig = Rig(tmp_path)
    rig.add("guest")
    rig.pump.start()
    future = rig.pump.drain("guest")
    rig.close()
    assert threading.active_count() == before
    assert future.done()
    never_started = Rig(tmp_path)
    never_started.add("guest")
    never_started.close()


# Naps and followers


def test_silent_guests_cost_nothing(rig: Rig) -> None:
    writes = [rig.add(f"guest{number}") for number in range(20)]
    for write in writes:
        os.write(write, b"hello\n")
    wait_until(lambda: all(log.size == 6 for log in rig.logs.values()))
    wait_until(lambda: all(channel.armed for channel in rig.pump._schedule.channels.values()))
    time.sleep(0.05)
    before = wakes()
    time.sleep(0.5)
    assert wakes() == before


def test_a_nap_leaves_bytes_in_the_pipe_until_somebody_watches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "NAP", 3_600_000)
    write = rig.add("guest")
    os.write(write, b"1")
    wait_until(lambda: rig.logs["guest"].size == 1)
    before = wakes()
    for _ in range(1000):
        os.write(write, b"x")
    assert wakes() == before
    assert rig.logs["guest"].size == 1
    assert rig.bytes.empty()
    rig.pump.watch("guest")
    assert rig.bytes.get(timeout=PATIENCE) == "guest"
    assert rig.logs["guest"].size == 1001


def test_a_follower_is_told_of_every_line(rig: Rig) -> None:
    write = rig.add("guest")
    rig.pump.watch("guest")
    for number in range(1, 20):
        os.write(write, b"line\n")
        while rig.logs["guest"].size < number * 5:
            assert rig.bytes.get(timeout=PATIENCE) == "guest"
        while not rig.bytes.empty():
            rig.bytes.get_nowait()
    rig.pump.unwatch("guest")
    rig.pump.remove("guest").result(PATIENCE)
    while not rig.bytes.empty():
        rig.bytes.get_nowait()
    assert rig.content("guest") == b"line\n" * 19


def test_a_follower_of_a_flood_is_not_flooded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "NAP_WATCHED", 50)
    write = rig.add("guest", limit=1 << 20, backups=1)
    rig.pump.watch("guest")
    begin = time.monotonic()
    with Flood(write):
        wait_until(lambda: rig.moved("guest") > 50 << 20)
    rig.hang_up(write)
    rig.ends.get(timeout=PATIENCE)
    # One for every 50 ms at most, and what is owed at the end.
    assert 2 <= rig.bytes.qsize() <= (time.monotonic() - begin) / 0.05 + 2


# Kills


@pytest.mark.parametrize(("kills", "limit"), [(30, 40_000), (10, 0)])
def test_killed_again_and_again(tmp_path: Path, kills: int, limit: int) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("pump_under_fire.py"), tmp_path, str(kills), str(limit)],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    written = int(done.stderr)
    assert found["kills"] == kills
    assert found["lines"] == written
    assert found["last"] == written - 1
    assert [found[what] for what in ("lost", "repeated", "spoilt", "displaced")] == [0, 0, 0, 0]
    assert found["files"] == 1 if not limit else found["files"] > 5


def test_the_count_after_kills_sees_every_kind_of_damage() -> None:
    lines = [b"%015d\n" % number for number in range(100)]
    assert count(b"".join(lines)) == {
        "lines": 100, "last": 99, "lost": 0, "repeated": 0, "spoilt": 0, "displaced": 0
    }  # fmt: skip
    assert count(b"".join(lines[:50] + lines[51:]))["lost"] == 1
    assert count(b"".join(lines[:50] + lines[49:]))["repeated"] == 1
    assert count(b"".join(lines)[:-1])["spoilt"] == 1
    assert count(b"".join(lines[:50]) + b"".join(lines[50:])[3:])["spoilt"] == 1
    assert count(b"".join([lines[1], lines[0], *lines[2:]]))["displaced"] == 1


# A file that refuses


class Stubborn(LogFile):
    """A log on a disk that is full while `full` is set."""

    full = False

    def take(self, pipe_fd: int, most: int) -> int:
        if self.full and select.select([pipe_fd], [], [], 0)[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().take(pipe_fd, most)


def test_a_full_disk_blocks_no_guest_and_is_said_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "RETRY", 0.05)
    log = Stubborn(rig.directory / "full.log")
    write = rig.add("guest", log)
    os.write(write, b"before\n")
    wait_until(lambda: log.size == 7)
    log.full = True
    block = b"".join(b"%07d\n" % number for number in range(8192))
    for _ in range(160):
        os.write(write, block)  # 10 MiB through a pipe of 1 MiB: it returns only because somebody makes room
    begin = rig.losses.get(timeout=PATIENCE)
    assert (begin.key, begin.over, begin.dropped) == ("guest", False, 0)
    assert "No space" in begin.reason
    assert begin.path == log.path
    log.full = False
    end = rig.losses.get(timeout=PATIENCE)
    assert end.over
    assert end.since == begin.since
    os.write(write, b"after\n")
    rig.hang_up(write)
    rig.ends.get(timeout=PATIENCE)
    assert rig.losses.empty()
    content = rig.content("guest")
    assert content.startswith(b"before\n")
    assert content.endswith(b"0008191\nafter\n")
    assert end.dropped > 0
    assert len(content) + end.dropped == 7 + 160 * len(block) + 6


def test_a_full_disk_with_little_to_say_loses_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "RETRY", 0.02)
    log = Stubborn(rig.directory / "full.log")
    log.full = True
    write = rig.add("guest", log)
    os.write(write, b"a few words\n")
    assert not rig.losses.get(timeout=PATIENCE).over
    assert rig.pump.drain("guest").result(PATIENCE) == 0
    os.write(write, b"and more\n")
    log.full = False
    end = rig.losses.get(timeout=PATIENCE)
    assert (end.over, end.dropped) == (True, 0)
    rig.pump.drain("guest").result(PATIENCE)
    assert rig.content("guest") == b"a few words\nand more\n"


def test_last_words_for_a_full_disk_are_waited_for_not_for_ever(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "RETRY", 0.02)
    monkeypatch.setattr(channel_module, "LAST_WORDS", 0.1)
    log = Stubborn(rig.directory / "full.log")
    log.full = True
    write = rig.add("guest", log)
    os.write(write, b"last words\n")
    rig.hang_up(write)
    assert rig.ends.get(timeout=PATIENCE) == "guest"
    assert [(loss.over, loss.dropped) for loss in (rig.losses.get_nowait(), rig.losses.get_nowait())] == [
        (False, 0),
        (True, 11),
    ]
    assert log.size == 0


def test_a_real_limit_of_the_kernel(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "RETRY", 0.02)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = rig.add("guest", limit=0)
    data = b"".join(b"%07d\n" % number for number in range(1 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
    try:
        for start in range(0, len(data), 1 << 16):
            os.write(write, data[start : start + (1 << 16)])
        assert "large" in rig.losses.get(timeout=PATIENCE).reason
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    end = rig.losses.get(timeout=PATIENCE)
    rig.hang_up(write)
    rig.ends.get(timeout=PATIENCE)
    content = rig.content("guest")
    # Up to the limit nothing is missing, and after the gap nothing either.
    assert data.startswith(content[:5_000_000])
    assert data.endswith(content[5_000_000:])
    assert len(content) + end.dropped == len(data)


def test_a_log_nobody_can_write_is_no_reason_to_stop(rig: Rig) -> None:
    broken = rig.add("broken")
    os.close(rig.logs["broken"].fd)
    rig.logs["broken"].fd = rig.pipes[0]  # not a file at all
    good = rig.add("good")
    os.write(broken, b"x\n")
    assert rig.losses.get(timeout=PATIENCE).key == "broken"
    os.write(good, b"y\n")
    rig.pump.drain("good").result(PATIENCE)
    assert rig.content("good") == b"y\n"
    rig.pump.remove("broken").result(PATIENCE)
    rig.logs.pop("broken")


def test_a_bug_with_one_guest_stays_with_it(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(LogFile):
        def take(self, pipe_fd: int, most: int) -> int:
            raise ZeroDivisionError

    bad = rig.add("bad", Buggy(rig.directory / "bad.log"))
    good = rig.add("good")
    os.write(bad, b"x\n")
    os.write(good, b"y\n")
    wait_until(lambda: rig.logs["good"].size == 2)
    wait_until(lambda: "the pump stumbled" in caplog.text)
    rig.pump.remove("bad").result(PATIENCE)


# Many


class Flood:
    """A process that writes as fast as the pipe takes it."""

    def __init__(self, write: int) -> None:
        self.process = subprocess.Popen(["yes", "a flooding guest"], stdout=write)

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_flood_starves_nobody(rig: Rig) -> None:
    flooding = rig.add("flooding", limit=4 << 20, backups=1)
    others = {f"quiet{number}": rig.add(f"quiet{number}") for number in range(5)}
    with Flood(flooding) as flood:
        wait_until(lambda: rig.moved("flooding") > 4 << 20)
        for turn in range(1, 20):
            for write in others.values():
                os.write(write, b"line\n")
            for key in others:
                wait_until(lambda key=key, turn=turn: rig.logs[key].size == 5 * turn)  # type: ignore[misc]
        before = rig.moved("flooding")
        wait_until(lambda: rig.moved("flooding") > before + (4 << 20))
        assert flood.process.poll() is None
    for key in others:
        assert rig.content(key) == b"line\n" * 19


def test_with_many_guests_a_wake_serves_those_who_spoke(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(1000, (hard - 300) // 3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, many * 3 + 300), hard))
    monkeypatch.setattr(pump_module, "PIPE_SIZE", 1 << 16)
    served: list[str] = []
    serve = rig.pump._mover.serve

    def counting(channel: Any, now: float) -> None:
        served.append(channel.key)
        serve(channel, now)

    rig.pump._mover.serve = counting  # type: ignore[method-assign]
    try:
        writes = {str(number): rig.add(str(number)) for number in range(many)}
        for key, write in writes.items():
            os.write(write, f"hello from {key}\n".encode())
        for key in writes:
            rig.pump.drain(key).result(PATIENCE)
            assert rig.content(key) == f"hello from {key}\n".encode()
        wait_until(lambda: all(channel.armed for channel in rig.pump._schedule.channels.values()))
        served.clear()
        os.write(writes["7"], b"again\n")
        wait_until(lambda: rig.logs["7"].size == 19)
        assert set(served) == {"7"}
        for key in writes:
            rig.pump.remove(key).result(PATIENCE)
        assert not rig.pump._schedule.channels
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
