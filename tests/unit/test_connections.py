# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's connections to a bus that comes late, hangs, or isn't there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.doubles.private_bus import private_bus
from virtd import connections, errors
from virtd.api.limits import Limits
from virtd.connections import HANGING, Connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.doubles.private_bus import PrivateBus
    from virtd.host import Host

# PyGObject 3.42's importer is of a kind that Python 3.11 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateBus]:
    with private_bus() as bus:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        yield bus


class Daemon:
    """As much of it as connections need; `connected` counts them."""

    def __init__(self) -> None:
        self.problems: dict[str, tuple[str, str]] = {}
        self.connections = Connections(lambda work: asyncio.create_task(work()))
        self.connected = 0

    @contextlib.asynccontextmanager
    async def running(self, bus: PrivateBus | None = None) -> AsyncIterator[None]:
        host = cast("Host", SimpleNamespace(problems=self.problems, settled=lambda: False))
        task = asyncio.create_task(self.connections.keep(host, Limits(), self._connected))
        try:
            yield
        finally:
            if bus is not None:  # a connection that is being made can't be given up
                os.kill(bus.process.pid, signal.SIGCONT)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _connected(self, _units: object, _first: bool) -> None:
        self.connected += 1
        await asyncio.Event().wait()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydbus  # noqa: F401 (the first time takes longer than all of this)

    for name, value in (("UNITS_LIMIT", 0.3), ("HUNG", 0.1), ("BUS_RETRY", 0.05)):
        monkeypatch.setattr(connections, name, value)


@pytest.mark.usefixtures("hurry")
def test_an_operation_waits_for_a_bus_that_hangs(bus: PrivateBus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        daemon = Daemon()
        os.kill(bus.process.pid, signal.SIGSTOP)
        async with daemon.running(bus):
            units = asyncio.create_task(daemon.connections.units())
            await until(lambda: daemon.problems)
            assert daemon.problems == {"bus": HANGING}
            # Longer than it would wait for a bus that isn't there.
            done, _ = await asyncio.wait([units], timeout=2 * connections.UNITS_LIMIT)
            assert not done, units.exception()
            os.kill(bus.process.pid, signal.SIGCONT)
            assert (await units).bus.unique_name
            assert daemon.problems == {}
            await until(lambda: daemon.connected)

    asyncio.run(main())
    assert "D-Bus answers again" in caplog.text


@pytest.mark.usefixtures("hurry")
def test_it_does_not_wait_for_ever(bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANG_LIMIT", 0.3)

    async def main() -> None:
        daemon = Daemon()
        os.kill(bus.process.pid, signal.SIGSTOP)
        async with daemon.running(bus):
            with pytest.raises(errors.HostError, match="can't be reached"):
                await daemon.connections.units()
            os.kill(bus.process.pid, signal.SIGCONT)
            await until(lambda: daemon.connected)

    asyncio.run(main())


@pytest.mark.usefixtures("hurry")
def test_a_bus_that_is_not_there_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")

    async def main() -> None:
        daemon = Daemon()
        async with daemon.running():
            await until(lambda: "no D-Bus at" in daemon.problems.get("bus", ("",))[0])
            with pytest.raises(errors.HostError, match="can't be reached"):
                await daemon.connections.units()

    asyncio.run(main())


@pytest.mark.usefixtures("hurry")
def test_a_bus_that_hangs_and_then_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does now is what counts."""
    hang, refuse = asyncio.Event(), errors.HostError("no D-Bus here")
    opened = []

    async def open_bus() -> Any:
        opened.append(1)
        if len(opened) == 1:
            await hang.wait()
        raise refuse

    monkeypatch.setattr("virtd.systemd.bus.Bus.open", open_bus)

    async def main() -> None:
        daemon = Daemon()
        async with daemon.running():
            await until(lambda: daemon.problems.get("bus") == HANGING)
            hang.set()
            await until(lambda: daemon.problems["bus"] == ("no D-Bus here", ""))
            with pytest.raises(errors.HostError, match="can't be reached"):
                await daemon.connections.units()

    asyncio.run(main())
