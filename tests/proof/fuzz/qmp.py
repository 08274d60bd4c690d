# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU sends that its guest has taken over: on its monitor, and on its stderr."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from typing import Any
from unittest import mock

from virtd import errors, process
from virtd.drivers.qemu import ends
from virtd.drivers.qemu.monitor import BURST, Monitor
from virtd.drivers.qemu.monitor import WORDS as MOST
from virtd.drivers.qemu.news import News
from virtd.drivers.qemu.standstill import Standstill
from virtd.model.state import State

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": []}}\r\n{"return": {}}\r\n'
)
SEEDS = (
    GREETING + b'{"return": {"status": "running"}, "id": "__qmp#00000"}\r\n',
    GREETING + b'{"error": {"class": "GenericError", "desc": "no"}, "id": "__qmp#00000"}\r\n',
    GREETING
    + b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    + b'{"event": "GUEST_PANICKED", "data": {"action": "pause"}}\r\n{"event": "RESET", "data": {"guest": true}}\r\n'
    + b'{"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "device": "disk0", "nospace": true}}\r\n',
    b"qemu_system_powerdown_request \nqemu_system_shutdown_request reason=6\n",
    b"qemu-system-x86_64: terminating on signal 15 from pid 4711 (kill)\n",
    # What would have cost qemu.qmp hundreds of MB, or an assertion.
    GREETING + b"[" * 3000 + b"\r\n",
    GREETING + b'{"return": 1, "id": [1]}\r\n',
    GREETING + b"no JSON\r\n",
)
WORDS = (
    b"\r\n", GREETING, b'{"return": ', b'{"error": ', b'"id": "__qmp#00000"', b'"id": "__qmp#00001"',
    b'{"event": "STOP"}', b'"event": "SHUTDOWN"', b'"data": {}', b'"status": "shutdown"', b"[" * 900, b'{"a":' * 900,
    b"1e999", b"9" * 5000, b'"\\ud800"',
    b"qemu_system_shutdown_request reason=", b"terminating on signal ",
)  # fmt: skip
LIMIT = 16384
BRIEF = 150


class Machine:
    """As much of one as the news need."""

    name, alive, state, busy, record = "web1", True, State.RUNNING, False, None

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.guest_off = asyncio.Event()
        self.problems: dict[str, Any] = {}
        self.standstill = Standstill(self)  # type: ignore[arg-type]

    def note(self, state: State, reason: str, *, data: dict[str, Any] | None = None) -> None:
        assert reason.isprintable()
        self.state = state
        self.data = self.data if data is None else data

    def fields(self) -> dict[str, str]:
        return {}

    def spawn(self, work: Any, _name: str) -> None:
        work.close()


def target(data: bytes) -> None:
    words = data.decode(errors="replace")
    end = ends.judge(
        ends.evidence(None, ends.latest(ends.traced(words), []), None, words, "2026-01-01T00:00:00.000000Z")
    )
    assert len(end.reason) < 200 + len(words)
    asyncio.run(_talk(data))


async def _talk(data: bytes) -> None:
    me = (os.getpid(), process.start_time(os.getpid()))
    machine = Machine()
    news = News(machine)  # type: ignore[arg-type]

    said = ""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The first line as a greeting, the second when it was answered, the rest when something is asked."""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            *first, last = data.split(b"\r\n", 2)
            for part in first:
                writer.write(part + b"\r\n")
                await reader.read(65536)
            writer.write(last)
            await writer.drain()

    with tempfile.TemporaryDirectory() as directory, mock.patch("virtd.journal.send"):
        path = f"{directory}/qmp.sock"
        server = await asyncio.start_unix_server(serve, path)
        monitor = Monitor("web1", path, lambda: me, news.on_event, lambda: None)
        try:
            await monitor.connect(0.5)
            news.take_status(await monitor.status())
            await monitor.execute("stop", limit=0.5)
        except errors.MonitorError as exc:
            said = exc.message
        finally:
            await monitor.hear_out(0.5)
            await monitor.close()
            server.close()
    assert news.taken <= 2 * BURST
    assert len(said) < MOST + 200
    assert said.isprintable()
