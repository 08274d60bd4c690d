# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events: none is missing and none comes twice, whenever the daemon is killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.doubles.cuts import Cuts
from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd import errors, files
from virtd.host import Host, eventlog, events
from virtd.records import Record, Records
from virtd.replies.events import Change

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Reader:
    """Who reads all events, over restarts, by their numbers."""

    def __init__(self) -> None:
        self.known: int | None = None
        self.seen: list[Change] = []

    def read(self, host: Host) -> None:
        log = host.events._log
        if self.known is None:
            self.known = log.first - 1
        assert log.first - 1 <= self.known <= log.last
        found = log.read(self.known, 1 << 20)
        assert [change.sequence for change in found] == list(range(self.known + 1, log.last + 1))
        self.seen += found
        self.known = log.last

    def of(self, name: str) -> list[tuple[str, str | None, str | None]]:
        return [(change.change, change.state, change.reason) for change in self.seen if change.name == name]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """States and reasons that came to be on record, in this order."""
    found: list[tuple[str, str]] = []
    save = Records.save

    def saved(self: Records, record: Record) -> None:
        save(self, record)
        found.append((record.state, record.reason))

    monkeypatch.setattr(Records, "save", saved)
    return found


def append_is_a_step(world: World, patch: pytest.MonkeyPatch) -> None:
    real = os.write

    def append(fd: int, data: bytes) -> int:
        world.step("append event")
        return real(fd, data)

    patch.setattr(eventlog, "append", append)


# Whenever it is killed

WORK: dict[str, Callable[[Host], Awaitable[Any]]] = {
    "start": lambda host: host.domains.start("web1", by=ROOT),
    "stop": lambda host: host.domains.stop("web1", by=ROOT),
    "autostart": lambda host: host.domains.set_autostart("web1", True, by=ROOT),
    "undefine": lambda host: host.domains.undefine("web1", by=ROOT),
}


@pytest.mark.parametrize("what", WORK)
@on_loop
async def test_killed_at_every_step_no_event_is_missing_and_none_comes_twice(
    cuts: Cuts, written: list[tuple[str, str]], what: str
) -> None:
    for root, patch in cuts:
        world = World(root, patch)
        try:
            reader = Reader()
            async with world.daemon() as host:
                reader.read(host)
                await world.define("web1")
                if what == "stop":
                    await host.domains.start("web1", by=ROOT)
                reader.read(host)
                append_is_a_step(world, patch)
                written.clear()
                before = len(reader.seen)
                with contextlib.suppress(errors.VirtdError):
                    await cuts.cut(world, WORK[what](host))
            for _ in range(2):
                async with world.daemon() as host:
                    if (machine := host.domains.driver.machines.get("web1")) is not None:
                        await asyncio.wait_for(machine.settled.wait(), 20)
                    reader.read(host)
                    listed = {item["name"]: (item["state"], item["reason"]) for item in await host.domains.listing()}
            told = reader.of("web1")
            if what in ("start", "stop"):
                came = [key for key, _group in itertools.groupby(written)]
                assert [one[1:] for one in told[before:]] == came, cuts.where
            if "web1" in listed:
                assert told[-1][1:] == listed["web1"], cuts.where
            else:
                assert told[-1][0] == "removed", cuts.where
            assert all(one != another for one, another in itertools.pairwise(told)) or what == "autostart"
            assert [one[0] for one in told].count("added") == 1
        finally:
            world.close()
    assert "append event" in cuts.seen


@on_loop
async def test_what_happens_while_virtd_is_away_is_told(world: World) -> None:
    reader = Reader()
    async with world.daemon() as host:
        reader.read(host)
        await world.run("web1")
        await world.define("web2")
        reader.read(host)
    world.units.process("web1").kill()
    world.units.process("web1").wait()
    os.unlink(world.paths.definition("qemu", "web2"))
    with open(world.paths.definition("qemu", "web3"), "w", encoding="utf-8") as file:
        file.write(world.text("web3"))
    reader.seen.clear()
    async with world.daemon() as host:
        await until(lambda: host.domains.driver.machines["web1"].over.is_set())
        reader.read(host)
    assert [one[:2] for one in reader.of("web1")] == [("changed", "stopping"), ("changed", "crashed")]
    assert (reader.seen[-1].object or {})["since"] <= reader.seen[-1].at
    assert reader.of("web2") == [("removed", None, None)]
    assert reader.of("web3") == [("added", "stopped", "not started since boot")]
    async with world.daemon() as host:
        reader.seen.clear()
        reader.read(host)
    assert not reader.seen


# The log


def change(log: eventlog.EventLog, number: int, text: str = "") -> Change:
    return Change(
        sequence=log.last + 1, at="now", change="changed", kind="domain", name=f"web{number % 7}", state="running",
        reason=text, object={"uuid": str(number), "state": "running", "reason": text},
    )  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Any:
    log = eventlog.EventLog(str(tmp_path / "events"))
    assert not log.open()
    log.begin({})
    yield log
    log.close()


def again(log: eventlog.EventLog) -> eventlog.EventLog:
    other = eventlog.EventLog(log._path)
    assert other.open()
    return other


def test_a_line_that_was_cut_off_is_as_if_it_had_never_been(log: eventlog.EventLog) -> None:
    for number in range(3):
        log.append(change(log, number), (str(number),))
    size = os.stat(log._path).st_size
    log.append(change(log, 3), ("3",))
    whole = os.stat(log._path).st_size
    for end in range(whole - 1, size - 1, -1):
        os.truncate(log._path, end)
        other = again(log)
        assert (other.first, other.last) == (log.first, log.last - 1)
        assert os.stat(log._path).st_size == size
        other.append(change(other, 3), ("3",))
        assert other.read(other.last - 1, 9)[0].name == "web3"
        other.close()


def test_it_stays_small_and_knows_what_it_told(log: eventlog.EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog, "SIZE", 4096)
    first = log.first
    log.append(change(log, 6, "old"), eventlog.fingerprint(change(log, 6, "old").object))
    for number in range(500):
        item = change(log, number % 3)
        log.append(item, eventlog.fingerprint(item.object))
        assert os.stat(log._path).st_size < 8192
    assert log.last == first + 500
    assert log.first > first
    other = again(log)
    assert (other.first, other.last, other.told) == (log.first, log.last, log.told)
    assert other.told["domain/web6"][2] == "old"
    assert [item.sequence for item in other.read(other.first - 1, 5)] == list(range(other.first, other.first + 5))
    other.close()


def test_a_start_reads_what_follows_the_last_checkpoint(
    log: eventlog.EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog, "EVERY", 1024)
    for number in range(500):
        item = change(log, number)
        log.append(item, eventlog.fingerprint(item.object))
    decoded: list[bytes] = []
    decode = msgspec.json.decode

    def counted(line: bytes) -> Any:
        decoded.append(line)
        return decode(line)

    with monkeypatch.context() as patch:
        patch.setattr(msgspec.json, "decode", counted)
        other = again(log)
    assert len(decoded) < 30
    assert (other.first, other.last, other.told) == (log.first, log.last, log.told)
    assert [item.sequence for item in other.read(other.first - 1, 999)] == list(range(log.first, log.last + 1))
    assert other.read(other.first + 99, 3) == log.read(log.first + 99, 3)
    other.close()


def test_a_log_that_an_older_virtd_did_not_keep_is_discarded(log: eventlog.EventLog) -> None:
    eventlog.discard_unless(eventlog.FORMAT, log._path)
    assert os.path.exists(log._path)
    eventlog.discard_unless(None, log._path)
    assert not os.path.exists(log._path)


def test_a_new_log_has_larger_numbers(log: eventlog.EventLog) -> None:
    for number in range(3):
        log.append(change(log, number), (str(number),))
    before = log.last
    log.begin({})
    assert log.first > before + 1


@pytest.mark.parametrize(
    "damage", [b"", b"{}\n", b"\xff\n", b'{"first":1,"next":1,"told":{}}\n{"sequence":7}\n', b"[" * 9999 + b"\n"]
)
def test_a_damaged_log_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "events"
    path.write_bytes(damage)
    assert not eventlog.EventLog(str(path)).open()


# Goes on where its predecessor was killed: a record first, then the event.
WRITER = """
import os, sys
from virtd import files
from virtd.host import eventlog
from virtd.replies.events import Change
eventlog.SIZE = 4096
log, record = eventlog.EventLog(sys.argv[1]), sys.argv[2]
if not log.open():
    log.begin({})
number = int(open(record).read()) if os.path.exists(record) else 0
def tell(number):
    if log.told.get("domain/a") != (number,):
        item = {"uuid": number}
        log.append(Change(sequence=log.last + 1, at="", change="changed", kind="domain", name="a", state="running",
                          reason=str(number), object=item), (number,))
log.told = {key: told[:1] for key, told in log.told.items()}
if number:
    tell(number)
print("ready", flush=True)
while True:
    number += 1
    files.write(record, str(number).encode(), sync_directory=False)
    tell(number)
"""


def test_killed_for_real_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path, record = str(tmp_path / "events"), str(tmp_path / "record")
    seen: list[Change] = []
    for kill in range(15):
        command = [sys.executable, "-c", WRITER, path, record]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            wanted = (seen[-1].sequence - seen[0].sequence if seen else 0) + kill % 4 + 2
            deadline = time.monotonic() + 60
            while not (os.path.exists(record) and int(Path(record).read_text() or 0) >= wanted):
                assert time.monotonic() < deadline
            writer.kill()
        log = eventlog.EventLog(path)
        assert log.open()
        seen += log.read(seen[-1].sequence if seen else log.first - 1, 1 << 20)
        log.close()
    numbers = {change.sequence: int(change.reason or 0) for change in seen}
    assert len(numbers) == len(seen)
    assert len({sequence - number for sequence, number in numbers.items()}) == 1
    assert len(seen) > 15


# Subscribers


async def some(stream: Any, count: int) -> list[Change]:
    return [await asyncio.wait_for(anext(stream), 20) for _ in range(count)]


@on_loop
async def test_a_subscriber_goes_on_from_a_number(world: World) -> None:
    async with world.daemon() as host:
        stream = host.events.subscribe(None)
        (begun,) = await some(stream, 1)
        assert (begun.change, begun.kind) == ("begun", "")
        waiting = asyncio.create_task(some(stream, 1))
        await world.define("web1")
        (added,) = await waiting
        assert (added.sequence, added.change, added.name, added.state) == (
            begun.sequence + 1,
            "added",
            "web1",
            "stopped",
        )
        await stream.aclose()  # type: ignore[attr-defined]
    async with world.daemon() as host:
        await host.domains.set_autostart("web1", True, by=ROOT)
        stream = host.events.subscribe(begun.sequence)
        assert [item.change for item in await some(stream, 3)] == ["begun", "added", "changed"]
        await stream.aclose()  # type: ignore[attr-defined]
        for number in (begun.sequence - 1, added.sequence + 5, 0):
            with pytest.raises(errors.NotFound):
                await anext(host.events.subscribe(number))


@on_loop
async def test_a_slow_subscriber_gets_lagged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog, "SIZE", 4096)
    async with world.daemon() as host:
        stream = host.events.subscribe(None)
        await some(stream, 1)
        await world.define("web1")
        for number in range(40):
            await host.domains.set_autostart("web1", number % 2 == 0, by=ROOT)
        lagged, following = await some(stream, 2)
        assert (lagged.change, following.change) == ("lagged", "changed")
        assert following.sequence == lagged.sequence + 1 == host.events._log.first
        await stream.aclose()  # type: ignore[attr-defined]


@on_loop
async def test_a_log_that_cannot_be_written_costs_nothing_but_events(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "AGAIN", 0.01)
    async with world.daemon() as host:
        stream = host.events.subscribe(None)
        await some(stream, 1)
        with monkeypatch.context() as full:

            def append(_fd: int, data: bytes) -> int:
                return len(data) // 2

            full.setattr(eventlog, "append", append)
            await world.run("web1")
        await until(lambda: host.events._again is None)
        assert [item.change for item in await some(stream, 1)] == ["lagged"]
        await host.domains.stop("web1", by=ROOT)
        assert [item.state for item in await some(stream, 2)] == ["stopping", "stopped"]
        await stream.aclose()  # type: ignore[attr-defined]
    assert files.leftovers(world.paths.run) == []
