# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU that its guest has taken over, at the other end of the monitor: what it costs is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.whole_host import on_loop, until
from virtd import errors, process
from virtd.drivers.qemu import monitor as module
from virtd.drivers.qemu.monitor import BURST, Link, Monitor
from virtd.drivers.qemu.qmp import MESSAGE_LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

ME = (os.getpid(), process.start_time(os.getpid()))
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
EVENT = (
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "GUEST_CRASHLOADED", "data": {"action": "run"}}\r\n'
)


class Hostile:
    """Listens as QEMU does; after the handshake `play` says what comes, with each command that is sent to it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "qmp.sock")
        self.events: list[dict[str, Any]] = []
        self.lost = 0
        self.greeting = GREETING
        self.play: Callable[[dict[str, Any]], bytes] = lambda command: answer(command, {})
        self.after = b""  # follows the handshake without being asked for
        self.endless = b""  # the same, without end
        self.monitor = Monitor("web1", self.path, lambda: ME, self.events.append, self._on_lost)

    def _on_lost(self) -> None:
        self.lost += 1

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            writer.write(self.greeting)
            await reader.read(65536)
            writer.write(b'{"return": {}}\r\n' + self.after)
            commands = asyncio.ensure_future(self._answer(reader, writer))
            try:
                while self.endless and not writer.is_closing():
                    writer.write(self.endless)
                    await writer.drain()
                await commands
            finally:
                commands.cancel()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(self.play(json.loads(data)))
            await writer.drain()


@contextlib.asynccontextmanager
async def hostile(path: Path) -> AsyncIterator[Hostile]:
    it = Hostile(path)
    server = await asyncio.start_unix_server(it.serve, it.path)
    try:
        yield it
    finally:
        await it.monitor.close()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def answer(command: dict[str, Any], value: object) -> bytes:
    return json.dumps({"return": value, "id": command["id"]}).encode() + b"\r\n"


@on_loop
async def test_a_flood_is_hung_up_on_and_forgotten(tmp_path: Path) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.endless = EVENT * 1000
        await qemu.monitor.connect(5)
        await until(lambda: qemu.monitor.link is Link.FLOODED, "the line to be hung up")
        assert qemu.lost == 1
        assert BURST * 0.9 <= len(qemu.events) <= BURST * 2
        with pytest.raises(errors.MonitorError):
            await qemu.monitor.execute("query-status")


@on_loop
async def test_events_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu.qmp keeps each in its own listener, and in the history of every other."""
    count = 20_000
    monkeypatch.setattr(module, "BURST", count)
    async with hostile(tmp_path) as qemu:
        qemu.monitor = Monitor("web1", qemu.path, lambda: ME, lambda event: None, lambda: None)
        qemu.play = lambda command: EVENT * count + answer(command, 5)
        await qemu.monitor.connect(5)
        tracemalloc.start()
        try:
            assert await qemu.monitor.execute("one", limit=60) == 5
            left, _most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left < len(EVENT) * count // 2, "what an event left behind is more than half of its text"


@on_loop
async def test_who_has_more_to_ask_is_not_hung_up_on(tmp_path: Path) -> None:
    busy = True
    async with hostile(tmp_path) as qemu:
        qemu.endless = EVENT * 100
        qemu.monitor = Monitor("web1", qemu.path, lambda: ME, qemu.events.append, qemu._on_lost, lambda: busy)
        await qemu.monitor.connect(5)
        for _ in range(5):
            await until(lambda: qemu.monitor._client is not None and qemu.monitor._client.flooded, "the flood")
            await asyncio.sleep(0.01)
            assert qemu.monitor.usable
            await qemu.monitor.execute("stop")
        busy = False
        await until(lambda: qemu.monitor.link is Link.FLOODED, "the line to be hung up")
        assert not qemu.monitor.usable
        assert len(qemu.events) <= BURST * 2


@on_loop
async def test_a_command_is_answered_in_a_flood(tmp_path: Path) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.play = lambda command: EVENT * 5000 + answer(command, {"status": "paused"}) + EVENT * 5000
        await qemu.monitor.connect(5)
        assert await qemu.monitor.status() == "paused"
        await until(lambda: qemu.monitor.link is Link.FLOODED, "the line to be hung up")
        assert len(qemu.events) <= BURST * 2


DEEP = b"[" * (MESSAGE_LIMIT - 100)
WIDE = b'{"id": "x", "return": [' + b"[],".join([b""] * 30000) + b"[]]}"
GARBAGE = [
    b"no JSON\r\n",
    b"\xff\xfe\r\n",
    b"\r\n",
    DEEP + b"\r\n",
    DEEP + b"]" * len(DEEP) + b"\r\n",
    b"x" * 10 * MESSAGE_LIMIT,
    b'{"return": "' + b"x" * 2 * MESSAGE_LIMIT + b'"}\r\n',
    WIDE + b"\r\n",
    b'{"a":' * 900 + b"1" + b"}" * 900 + b"\r\n",
    b'{"return": 1, "id": [1]}\r\n',
    b'{"return": 1, "id": {"a": 1}}\r\n',
    b'{"return": 1, "id": null}\r\n',
    b"[]\r\n",
    b"5\r\n",
    b"9" * 100_000 + b"\r\n",
    b'{"event": 5}\r\n',
    b'{"event": {"a": 1}, "data": 7}\r\n',
    b'{"event": "STOP", "data": []}\r\n',
    b'{"error": {"desc": 5}}\r\n',
    b'{"error": 5, "id": "x"}\r\n',
    b'{"QMP": {}}\r\n',
    b"{}\r\n",
    b'{"return": {}, "id": "\\ud800"}\r\n',
]


@pytest.mark.parametrize("when", ["greeting", "after", "asked"])
@pytest.mark.parametrize("garbage", GARBAGE)
@on_loop
async def test_garbage_costs_little_and_is_not_repeated(tmp_path: Path, garbage: bytes, when: str) -> None:
    async with hostile(tmp_path) as qemu:
        match when:
            case "greeting":
                qemu.greeting = garbage
            case "after":
                qemu.after = garbage
            case _:
                qemu.play = lambda command: garbage.replace(b'"x"', json.dumps(command["id"]).encode())
        tracemalloc.start()
        try:
            with contextlib.suppress(errors.MonitorError):
                await qemu.monitor.connect(0.2)
                await qemu.monitor.execute("stop", limit=0.2)
            _left, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 100 * MESSAGE_LIMIT


@pytest.mark.parametrize("garbage", [garbage for garbage in GARBAGE if b"QMP" not in garbage])
@on_loop
async def test_an_error_is_one_short_line(tmp_path: Path, garbage: bytes) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.greeting = garbage
        with pytest.raises(errors.MonitorError) as caught:
            await qemu.monitor.connect(0.2)
        assert len(caught.value.message) < 200
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("error", ["x" * 1000, "\x1b]52;c;AAAA\x07", 7, None, {"a": 1}])
@on_loop
async def test_what_qemu_refuses_with_is_one_short_line(tmp_path: Path, error: object) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.play = lambda command: (
            json.dumps({"error": {"class": "GenericError", "desc": error}, "id": command["id"]}).encode() + b"\r\n"
        )
        await qemu.monitor.connect(5)
        with pytest.raises(errors.MonitorError) as caught:
            await qemu.monitor.execute("stop")
        assert len(caught.value.message) < 500
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("value", [5, None, [], "running", {"status": 7}, {"status": "x" * 100_000}])
@on_loop
async def test_any_status_is_some_status(tmp_path: Path, value: object) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.play = lambda command: answer(command, value)
        await qemu.monitor.connect(5)
        assert len(await qemu.monitor.status()) <= 300


@on_loop
async def test_only_the_guests_own_process_is_believed(tmp_path: Path) -> None:
    """qmp.sock was a link to another guest's monitor, or somebody else listened there."""
    async with hostile(tmp_path) as qemu:
        parent = (os.getppid(), process.start_time(os.getppid()))
        other = Monitor("web2", qemu.path, lambda: parent, qemu.events.append, qemu._on_lost)
        with pytest.raises(errors.MonitorError, match="listens there"):
            await other.connect(1)
        os.symlink(qemu.path, tmp_path / "link")
        linked = Monitor("web2", str(tmp_path / "link"), lambda: ME, qemu.events.append, qemu._on_lost)
        with pytest.raises(errors.MonitorError, match="a link"):
            await linked.connect(1)
        await other.close()
        await linked.close()


@on_loop
async def test_what_the_client_before_did_not_take_comes_first(tmp_path: Path) -> None:
    """As QEMU 10.0 has it: what it still had to send to the last client, from the middle of a line on."""
    async with hostile(tmp_path) as qemu:
        qemu.greeting = EVENT[30:] + EVENT * 100_000 + GREETING
        await qemu.monitor.connect(20)
        await qemu.monitor.execute("stop")
        assert qemu.events == []


@on_loop
async def test_a_link_that_breaks_is_told_of(tmp_path: Path) -> None:
    async with hostile(tmp_path) as qemu:
        qemu.after = b"no JSON\r\n"
        await qemu.monitor.connect(5)
        await until(lambda: qemu.lost == 1, "the owner to be told")
        assert qemu.monitor.link is Link.CLOSED


@on_loop
async def test_a_socket_that_was_removed_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "run/web1").mkdir(parents=True)
    path = str(tmp_path / "run/web1/qmp.sock")

    async def refused(*, made: bool) -> tuple[str, Link]:
        monitor = Monitor("web1", path, lambda: ME, lambda event: None, lambda: None)
        with pytest.raises(errors.MonitorError) as caught:
            await monitor.connect(0.05, made=made)
        await asyncio.sleep(0)
        link = monitor.link
        await monitor.close()
        return caught.value.message, link

    said, link = await refused(made=True)
    assert f"its socket {path} was removed" in said
    assert link is Link.GONE
    said, link = await refused(made=False)
    assert "didn't answer within 0.05 s" in said
    assert link is Link.SILENT
    for directory in ("run/web1", "run"):
        (tmp_path / directory).rmdir()
        assert f"its directory {tmp_path / directory} was removed" in (await refused(made=True))[0]


@on_loop
async def test_a_closing_that_is_cancelled_closes_all_the_same(tmp_path: Path) -> None:
    """As at the daemon's end, which comes at any time."""
    async with hostile(tmp_path) as qemu:
        await qemu.monitor.connect(5)
        closing = asyncio.ensure_future(qemu.monitor.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        # Otherwise its socket is left open, which fails this test.
