# SPDX-License-Identifier: LGPL-2.1-or-later
"""One domain: a guest under QEMU, with its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from ... import errors, journal
from ...model import domain as model
from ...model.state import State
from ...records import now
from ..guest import End, Guest, Shared
from ..protocol import Problem
from . import command, ends, images, ownership
from . import host as hostinfo
from .monitor import Event, Link, Monitor

if TYPE_CHECKING:
    from ...model.settings import Qemu
    from ...records import Record
    from ...units import UnitState
    from ..protocol import Peers

log = logging.getLogger(__name__)

DRIVER = "qemu"
GREETING_LIMIT = 5.0  # seconds for the monitor of a guest that runs already
LINK_AGAIN = 1.0  # seconds until a link that was refused is tried again


class Machine(Guest[model.Domain]):
    """A domain."""

    driver = DRIVER
    noun = "domain"
    virtctl = "virtctl"
    definition_type = model.Domain

    def __init__(self, shared: Shared, name: str, settings: Qemu, peers: Peers) -> None:
        super().__init__(shared, name)
        self.settings = settings
        self.peers = peers
        self.monitor: Monitor | None = None
        # QEMU told that the guest has powered off, and waits (see operations.reboot).
        self.guest_off = asyncio.Event()
        self._linking = asyncio.Lock()  # held while the monitor is being connected

    def parse(self, text: str, source: str) -> model.Domain:
        return model.parse(text, source)

    def images(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """What the guest has open, by device and inode: the path, and whether it writes. Nothing when it is off."""
        if not self.alive or self.record is None:
            return {}
        return images.taken(self.record.data, self.running_definition)

    def judge(self, unit: UnitState | None) -> End:
        events = ends.read_events(command.events(self.runtime))
        return ends.judge(unit, events, self.request, self.last_words(), now())

    def adopted(self) -> None:
        self.spawn(self._stay_attached(), "attach")

    async def let_go(self) -> None:
        if self.monitor is not None:
            await self.monitor.close()
            self.monitor = None

    async def give_back(self, record: Record) -> None:
        self.guest_off.clear()
        for nic in record.data.get("nics", []):
            with contextlib.suppress(errors.HostError):
                await self.peers("network").detach(nic["interface"])
        old = hostinfo.account(self.settings).uid if record.data.get("owners") else 0
        ownership.give_back(ownership.recorded(record.data, old))

    def meaning(self, slot: str) -> str:
        match slot:
            case "stdin":
                return "its serial console takes no input any more"
            case "stdout":
                return "its serial console's output is lost from now on"
            case "stderr":
                return "QEMU's messages are lost from now on"
            case _:
                return "the log was opened again by its name"

    # The monitor

    async def attach(self, limit: float) -> None:
        """Connect the monitor of a guest that runs, and see what it does.

        What fails is a problem, not the guest's end.
        """
        async with self._linking:
            if self.monitor is None or self.monitor.link is not Link.CONNECTED:
                if self.monitor is not None:
                    await self.monitor.close()
                await self._connect(limit)

    async def _stay_attached(self) -> None:
        """Until there is a link. One that doesn't answer is left to the next command, which has a person waiting."""
        while self.alive:
            await self.attach(GREETING_LIMIT)
            if self.monitor is None or self.monitor.link is not Link.CLOSED:
                return
            await asyncio.sleep(LINK_AGAIN)

    async def _connect(self, limit: float) -> None:
        monitor = Monitor(self.name, command.monitor_socket(self.runtime), self.on_event)
        self.monitor = monitor
        try:
            await monitor.connect(limit)
            self._take_status(await monitor.execute("query-status"))
            self.problems.pop("monitor", None)
        except errors.MonitorError as exc:
            if self.alive and self.child is not None and self.child.alive():
                self.problems["monitor"] = Problem(exc.message, exc.hint)
                log.warning("%s: %s", self.name, exc)

    async def command(self, name: str, arguments: dict[str, Any] | None = None, *, limit: float = 5.0) -> Any:
        """One QMP command; a link that broke is made again first. Raises MonitorError."""
        async with self._linking:
            if self.monitor is None or self.monitor.link is not Link.CONNECTED:
                if self.monitor is not None:
                    await self.monitor.close()
                await self._connect(min(GREETING_LIMIT, limit))
            monitor = self.monitor
        if monitor is None:  # it ended meanwhile
            raise errors.MonitorError(f"{self.name} has ended")
        try:
            return await monitor.execute(name, arguments, limit=limit)
        finally:
            if monitor.link is Link.CLOSED and self.monitor is monitor and self.alive:
                self.spawn(self._stay_attached(), "attach")  # nobody tells us of its events until then

    def _take_status(self, status: dict[str, Any]) -> None:
        match str(status.get("status")):
            case "running":
                if self.state is State.PAUSED:
                    self.note(State.RUNNING, "resumed")
            case "shutdown":
                self.guest_off.set()
                self.note(State.PAUSED, "powered off, and kept")
            case "guest-panicked":
                self.note(State.PAUSED, "the guest's kernel panicked")
            case "io-error":
                self.note(State.PAUSED, "a disk reported an error")
            case "paused" if self.state is not State.PAUSED:
                self.note(State.PAUSED, "paused")
            case _:
                pass

    def on_event(self, event: Event) -> None:
        """What QEMU tells by itself. Its end is not told here: the process is the witness of that."""
        if not self.alive:
            return
        match str(event.get("event")), event.get("data") or {}:
            case "STOP", _ if self.state is State.RUNNING:
                # With on_poweroff = "keep" the guest's end comes before this; a reboot takes the state back at once.
                self.note(State.PAUSED, "powered off, and kept" if self.guest_off.is_set() else "paused")
            case "RESUME", _ if self.state is State.PAUSED:
                self.note(State.RUNNING, "resumed")
            case "GUEST_PANICKED", data if data.get("action") == "pause":
                self.note(State.PAUSED, "the guest's kernel panicked")
            case "BLOCK_IO_ERROR", data if data.get("action") == "stop":
                self.note(State.PAUSED, "a disk reported an error")
            case "SHUTDOWN", _:
                self.guest_off.set()
            case "RESET", data if data.get("guest"):
                journal.send(f"Domain {self.name} rebooted itself", **self.fields())
            case _:
                pass
