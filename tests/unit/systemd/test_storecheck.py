# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon-reload may do to the ground that virtd stands on is told while there is time to put it right."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.doubles.fake_pid1 import FakePid1, put_new
from tests.doubles.whole_host import on_loop, until
from virtd import errors
from virtd.fdstore import NotifyFailed, Store, StoreFull
from virtd.fdstore.notify import connect
from virtd.messages import Message
from virtd.systemd import storecheck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtd.systemd.units import Units

NONE = (1 << 64) - 1  # how systemd says that there is no limit


class Unit:
    """virtd.service as systemd has it."""

    def __init__(self, pid1: FakePid1) -> None:
        self.pid1 = pid1
        self.properties: dict[str, Any] = {
            "FileDescriptorStoreMax": 4096,
            "LimitNOFILESoft": 524288,
            "FileDescriptorStorePreserve": "yes",
            "LoadState": "loaded",
        }

    async def service_property(self, _unit: str, name: str) -> Any:
        if name not in self.properties:
            raise errors.HostError(f"Unknown property {name}")
        return self.properties[name]

    unit_property = service_property

    async def store_count(self, _unit: str) -> int:
        self.pid1.read()
        return len(self.pid1.names())

    def becomes(self, **properties: Any) -> None:
        """A daemon-reload: what is over the limit is dropped."""
        self.properties |= properties
        self.pid1.read()
        self.pid1.store_max = self.properties["FileDescriptorStoreMax"]
        while len(self.pid1.entries) > self.pid1.store_max:
            os.close(self.pid1.entries.pop().fd)


async def look(store: Store, unit: Unit) -> storecheck.Problems:
    """One look, with a PID 1 that reads its messages meanwhile."""

    async def read() -> None:
        while True:
            unit.pid1.read()
            await asyncio.sleep(0.001)

    reading = asyncio.ensure_future(read())
    try:
        return await storecheck.look(store, cast("Units", unit), "virtd.service")
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@pytest.fixture
def five(pid1: FakePid1, store: Store) -> Store:
    pid1.store_max = 4096
    store.resize(4096)
    for number in range(5):
        put_new(store, f"qemu/web1/{number}")
    pid1.read()
    return store


@on_loop
async def test_nothing_is_wrong(pid1: FakePid1, five: Store) -> None:
    unit = Unit(pid1)
    assert await look(five, unit) == {}
    unit.becomes(LimitNOFILESoft=NONE)
    assert await look(five, unit) == {}
    del unit.properties["FileDescriptorStorePreserve"]  # systemd before 254
    assert await look(five, unit) == {}


@on_loop
async def test_masked(pid1: FakePid1, five: Store) -> None:
    unit = Unit(pid1)
    unit.becomes(LoadState="masked", FileDescriptorStoreMax=0, FileDescriptorStorePreserve="no")
    assert pid1.names() == []
    found = await look(five, unit)
    assert list(found) == ["store"]
    text, hint = found["store"]
    assert "masked" in text
    assert hint.startswith("systemctl unmask virtd.service before virtd is stopped")
    unit.becomes(LoadState="loaded", FileDescriptorStoreMax=4096, FileDescriptorStorePreserve="yes")
    assert await look(five, unit) == {}
    assert len(pid1.names()) == 5, "systemd has all of it again"


@on_loop
async def test_the_file_is_gone_or_bad(pid1: FakePid1, five: Store) -> None:
    for load, said in (("not-found", "is gone"), ("bad-setting", "can't be used (bad-setting)")):
        unit = Unit(pid1)
        unit.becomes(LoadState=load)
        text, hint = (await look(five, unit))["store"]
        assert said in text
        assert "daemon-reload" in hint


@on_loop
async def test_a_store_that_was_made_smaller(pid1: FakePid1, five: Store) -> None:
    unit = Unit(pid1)
    unit.becomes(FileDescriptorStoreMax=2)
    text, hint = (await look(five, unit))["store"]
    assert "dropped 3 of 5" in text
    assert "FileDescriptorStoreMax=" in hint


@on_loop
async def test_a_store_that_would_not_outlive_a_stop(pid1: FakePid1, five: Store) -> None:
    unit = Unit(pid1)
    for value in ("no", "restart"):
        unit.becomes(FileDescriptorStorePreserve=value)
        assert "isn't yes" in (await look(five, unit))["preserve"][0]


@on_loop
async def test_fewer_open_files_than_are_stored(pid1: FakePid1, five: Store) -> None:
    unit = Unit(pid1)
    unit.becomes(LimitNOFILESoft=7)
    text, hint = (await look(five, unit))["files"]
    assert "LimitNOFILE= of virtd.service is 7" in text
    assert "Raise it to" in hint
    with pytest.raises(StoreFull, match="LimitNOFILE allows"):
        five.room_for(["qemu/web2/stdin"])
    unit.becomes(LimitNOFILESoft=524288)
    assert await look(five, unit) == {}
    five.room_for(["qemu/web2/stdin"])


@on_loop
async def test_a_unit_that_takes_nothing_is_given_nothing(pid1: FakePid1, five: Store) -> None:
    """PID 1 tells of each message in vain, after each daemon-reload: it would be all that the journal says."""
    unit = Unit(pid1)
    given = 0
    real = five.send_again

    def send_again() -> None:
        nonlocal given
        given += 1
        real()

    five.send_again = send_again  # type: ignore[method-assign]
    for properties in ({"FileDescriptorStoreMax": 3}, {"FileDescriptorStoreMax": 4096, "LoadState": "masked"}):
        unit.becomes(**properties)
        while len(pid1.entries) > 3:
            os.close(pid1.entries.pop().fd)
        for _ in range(12):
            assert "store" in await look(five, unit)
        assert given == 0, properties
    unit.becomes(LoadState="loaded")
    assert await look(five, unit) == {}
    assert given == 1


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr("virtd.journal.send", lambda text, **more: said.append((text, more["message_id"])))
    found = {"store": ("virtd.service is masked", "systemctl unmask virtd.service.")}
    storecheck.tell({}, found)
    storecheck.tell(found, found)
    storecheck.tell(found, {})
    assert said == [("virtd.service is masked. systemctl unmask virtd.service.", Message.STORE_AT_RISK)]


@on_loop
async def test_many_reloads_are_one_look(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And one that fails is told once, however often, and tried again."""
    monkeypatch.setattr(storecheck, "AGAIN", 0.001)
    monkeypatch.setattr(storecheck, "tell", lambda before, found: None)
    caplog.set_level(logging.INFO)
    answers: asyncio.Queue[storecheck.Problems | errors.VirtdError] = asyncio.Queue()
    asked = 0

    async def answer() -> storecheck.Problems:
        nonlocal asked
        asked += 1
        if isinstance(found := await answers.get(), errors.VirtdError):
            raise found
        return found

    problems: storecheck.Problems = {"bus": ("none of its business", "")}
    watch = storecheck.Watch(problems, answer)
    running = asyncio.ensure_future(watch.keep_looking())
    await until(lambda: asked == 1, "a look at the start")
    for _ in range(36):
        watch.due()
    answers.put_nowait({"store": ("masked", "unmask")})
    await until(lambda: asked == 2, "one more for the 36")
    assert "store" in problems
    for _ in range(5):
        answers.put_nowait(errors.HostError("systemd did not answer"))
    await until(lambda: asked == 7, "more tries, though nothing is due")
    assert "store" in problems
    assert [record.getMessage() for record in caplog.records] == [
        "Cannot check whether systemd still has all descriptors: systemd did not answer"
    ]
    answers.put_nowait({})
    await until(lambda: "store" not in problems, "an answer")
    assert caplog.records[-1].getMessage() == "systemd's descriptors can be checked again, after 5 failed attempts"
    assert (asked, problems) == (7, {"bus": ("none of its business", "")})
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def no_files_left() -> Iterator[list[int]]:
    """Not one more descriptor can be had; the list has those that are in the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken: list[int] = []
    yield taken
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_watchdog_is_told_without_a_descriptor_to_be_had(pid1: FakePid1, no_files_left: list[int]) -> None:
    send, unprepared = connect(pid1.path, reserve=True), connect(pid1.path)
    try:
        while True:
            try:
                no_files_left.append(os.dup(2))
            except OSError:
                break
        for _ in range(3):
            send("WATCHDOG=1", ())
        with pytest.raises(NotifyFailed, match="accepted no message"):
            unprepared("WATCHDOG=1", ())
    finally:
        os.close(no_files_left.pop())
        os.close(no_files_left.pop())
        send.close()
    assert pid1.read() == 3
