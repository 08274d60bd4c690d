# SPDX-License-Identifier: LGPL-2.1-or-later
"""One domain: a guest under QEMU, with its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Any

from ... import errors, journal
from ...allowance import Allowance
from ...guests.guest import Guest
from ...guests.guestrecord import AGAIN, Shared
from ...messages import Message
from ...model import domain as model
from ...model.state import State
from ...objects.protocol import Problem
from ...objects.turns import within
from . import directory, ends, nics, opened, ownership, prerequisites, userdb
from .monitor import Link, Monitor
from .news import STANDSTILL, News
from .users import running_as

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum
    from typing import Unpack

    from ...guests.verdict import End
    from ...model.settings import Qemu
    from ...objects.conflicts import Holding
    from ...objects.peers import Peers
    from ...records import Details, Record
    from ...systemd.state import UnitState
    from .kept import Kept
    from .standstill import Standstill
    from .swtpm import Swtpm

log = logging.getLogger(__name__)

DRIVER = "qemu"
REBOOT_GIVEN_UP = "reboot given up"  # a request, see operations.reboot
LAST_WORDS = 1.0  # seconds for the monitor's connection to end once QEMU has ended
GREETING_LIMIT = 5.0  # seconds for the monitor of a running guest to answer
LINK_AGAIN = 1.0  # seconds until a link that was refused, or broke, is tried again ...
LINK_AGAIN_AT_MOST = 64.0  # ... and, doubled each time, the most that this becomes
CALM = 60.0  # seconds after which a link counts as stable


class QemuGuest(Guest[model.Domain]):
    """A domain."""

    driver = DRIVER
    noun = "domain"
    definition_type = model.Domain

    def __init__(self, shared: Shared, name: str, settings: Qemu, peers: Peers) -> None:
        super().__init__(shared, name)
        self.settings = settings
        self.peers = peers
        self.monitor: Monitor | None = None
        # set once the guest has powered off while QEMU stays (see operations.reboot)
        self.guest_off = asyncio.Event()
        self.news = News(self)
        self.held: tuple[Any, list[Holding]] | None = None  # see holdings.running
        self.floods = 0  # how often its monitor was disconnected because of too many events
        self._linking = asyncio.Lock()  # held while the monitor is being connected
        self._linked_at = 0.0
        self._askers = 0
        self._attaching = False
        self._pause = 0.0  # seconds until a link that broke is made again
        self._flood_told = Allowance(1, 1 / 3600)

    def parse(self, text: str, source: str) -> model.Domain:
        return model.parse(text, source)

    def images(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """The open files by device and inode: path, and whether it writes. Empty when the guest is off."""
        return opened.taken(self.data, self.running_definition) if self.alive else {}

    @functools.cached_property
    def standstill(self) -> Standstill:
        from .standstill import Standstill  # hardly any guest ever stands still

        return Standstill(self)

    @functools.cached_property
    def tpm(self) -> Swtpm:
        from .swtpm import Swtpm  # most guests have none

        return Swtpm(self)

    def note(self, state: StrEnum, reason: str, **changes: Unpack[Details]) -> None:
        """See Persistent. A guest that is no longer paused no longer stands still."""
        if state is not State.PAUSED and STANDSTILL in self.data:
            changes["data"] = self.standstill.resumed(changes.get("data", self.data))
        super().note(state, reason, **changes)

    @property
    def cards(self) -> list[nics.Planned]:
        """Its network cards that are in networks, while it runs."""
        return nics.recorded(self.data) if self.alive else []

    @functools.cached_property
    def hardware(self) -> Kept:
        """What the guest sees of its machine."""
        from .kept import Kept  # no start of the daemon needs it

        return Kept(self)

    async def _learn_hardware(self, monitor: Monitor) -> None:
        """Make sure that its hardware is on record, even if an older virtd started it."""
        known = self.data.get("hardware")
        if isinstance(known, dict) and known.get("type") and known.get("model"):
            return
        if not await self.hardware.learn(monitor.execute):
            self.spawn(self._learn_later(), "hardware")

    async def _learn_later(self) -> None:
        """Try until it is on record; a full disk may stay full for a while."""
        pause = LINK_AGAIN
        while not await self.ended_within(pause):
            pause = min(2 * pause, LINK_AGAIN_AT_MOST)
            if self.monitor is None or not self.answers:
                return  # it is asked when the monitor is connected again
            if await self.hardware.learn(self.monitor.execute):
                self.shared.publish("changed", self)
                return

    async def hear_out(self) -> None:
        if self.monitor is not None:
            await self.monitor.hear_out(LAST_WORDS)

    def judge(self, unit: UnitState | None) -> End:
        if not (events := ends.read_events(directory.events(self.runtime))):
            words = self.last_words(self._words_from(), ends.TAIL)
            events = ends.latest(ends.traced(words), list(self.news.last))
        else:
            words = self.last_words()
        words = "\n".join(line for line in words.splitlines() if not ends.is_aside(line))
        if not words and self.data.get(AGAIN):
            words = "(nobody heard)"  # one that somebody else restarted writes to /dev/null
        return ends.judge(ends.evidence(unit, events, self.request, words, self.seen_at))

    def _words_from(self) -> int:
        """The offset in its log where this run begins; 0 after a rotation, because all of the file is of this run."""
        begun = self.data.get("words_from")
        log_file = self.child.stderr if self.child is not None else None
        return int(begun["offset"]) if begun and log_file is not None and log_file.file == begun["file"] else 0

    async def another_life(self) -> dict[str, Any]:
        """The guest was reset: the record's data, so that what QEMU has written until now no longer counts."""
        if self.child is None or self.child.stderr is None:
            return self.data
        await self.child.move_words()
        self.news.last.clear()
        log_file = self.child.stderr
        return self.data | {"words_from": {"file": log_file.file, "offset": log_file.size}}

    def sort_line(self, text: str) -> str | None:
        return None if ends.is_aside(text) else "warning"

    def recall(self) -> None:
        super().recall()
        if self.alive and STANDSTILL in self.data:
            self.standstill.recall()
        if self.alive and self.data.get("tpm"):
            self.tpm.recall()
        if self.alive and "media" in self.data:
            from . import media  # hardly any guest has an empty drive that shouldn't be

            media.recall(self)

    def adopted(self) -> None:
        if STANDSTILL in self.data:
            self.spawn(self.standstill.look(), STANDSTILL)
        self.watch_tpm()
        self._attach_later()

    def watch_tpm(self) -> None:
        """Notice it if its TPM, if it has one, ends before the guest does."""
        if self.data.get("tpm"):
            self.spawn(self.tpm.watch(), "tpm")

    async def let_go(self) -> None:
        if self.monitor is not None:
            await self.monitor.close()
            self.monitor = None

    async def give_back(self, record: Record) -> None:
        self.guest_off.clear()
        self.news.forget()
        self.floods, self._pause = 0, 0.0
        for nic in record.data.get("nics", []):
            with contextlib.suppress(errors.HostError):
                await self.peers.networks.detach(nic["interface"])
        facts = self.shared.services.facts
        old = prerequisites.account(self.settings, facts).uid if record.data.get("owners") else 0
        try:
            ownership.give_back(ownership.recorded(record.data, old))
        finally:
            if record.data.get("tpm"):
                await self.tpm.end(record)

    @property
    def user(self) -> userdb.Named | None:
        """The user of its own, from before its start until everything of it is put away."""
        return running_as(self.data)

    async def forgotten(self, record: Record) -> None:
        if record.data.get("tpm"):
            await self.tpm.forget(record)
        if (user := running_as(record.data)) is not None:
            userdb.remove(self.shared.services.paths.userdb, user)

    def name_user(self) -> None:
        """Make sure that its user has a name, without which the unit's ExecStop= can't run."""
        if (user := self.user) is not None:
            try:
                userdb.add(self.shared.services.paths.userdb, user, self.name)
                self.problems.pop("user", None)
            except errors.HostError as exc:
                self.problems["user"] = Problem(exc.message, exc.hint)

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
        """Connect the monitor of a running guest, and ask for its state.

        A failure is reported as a problem of the guest.
        """
        async with self._linking:
            if self.monitor is None or self.monitor.link is not Link.CONNECTED:
                if self.monitor is not None:
                    await self.monitor.close()
                await self._connect(limit)

    def _attach_later(self) -> None:
        """Connect in the background, since no events arrive until then."""
        if self.alive and not self._attaching:
            self._attaching = True
            self.spawn(self._stay_attached(), "attach")

    async def _stay_attached(self) -> None:
        """Try until there is a link. Without one the effect of a command that was answered late goes unnoticed."""
        try:
            while self.alive:
                if await self.ended_within(self._pause):
                    return
                self._pause = min(max(LINK_AGAIN, 2 * self._pause), LINK_AGAIN_AT_MOST)
                await self.attach(GREETING_LIMIT)
                if "events" in self.problems:
                    await self.ended_within(CALM)
                if self.monitor is None or self.monitor.link in (Link.CONNECTED, Link.GONE):
                    self.problems.pop("events", None)
                    return
        finally:
            self._attaching = False

    async def ended_within(self, seconds: float) -> bool:
        """Wait for `seconds`, or until the guest ends; whether it has."""
        return await within(self.over, seconds)

    async def _connect(self, limit: float) -> None:
        child = self.child
        monitor = Monitor(
            self.name,
            directory.monitor_socket(self.runtime),
            lambda: (child.pid, child.start) if child is not None else (0, 0),
            self.news.on_event,
            lambda: self._lost(monitor),
            lambda: self._askers > 0,
        )
        self.monitor = monitor
        try:
            with self._asking():
                await monitor.connect(limit, made=self.state is not State.STARTING)
                self._linked_at = time.monotonic()
                await self._close_runtime()
                self.news.take_status(await monitor.status())
                await self._restore_poweroff(monitor)
                await self._learn_hardware(monitor)
            self.problems.pop("monitor", None)
        except errors.MonitorError as exc:
            if self.alive and child is not None and child.alive():
                problem = Problem(exc.message, exc.hint)
                if self.problems.get("monitor") != problem:
                    log.warning("%s: %s", self.name, exc)
                self.problems["monitor"] = problem

    async def _restore_poweroff(self, monitor: Monitor) -> None:
        """Undo what a reboot has set and couldn't undo because QEMU didn't answer."""
        if self.request is not None and self.request.verb == REBOOT_GIVEN_UP:
            await monitor.execute("set-action", {"shutdown": self.at_poweroff})

    @property
    def at_poweroff(self) -> str:
        """What QEMU should do when the guest powers off, as a value for set-action."""
        domain = self.running_definition
        return "pause" if domain is not None and domain.on_poweroff is model.OnPoweroff.KEEP else "poweroff"

    async def _close_runtime(self) -> None:
        if directory.is_open(self.runtime):
            try:
                await asyncio.to_thread(directory.close, self.runtime)
            except OSError as exc:
                log.warning("%s: its directory can't be taken back: %s", self.name, exc)

    def _lost(self, monitor: Monitor) -> None:
        """The link broke without being closed."""
        if monitor is not self.monitor or not self.alive:
            return
        if time.monotonic() - self._linked_at > CALM:
            self._pause = 0.0
        self._pause = max(LINK_AGAIN, self._pause)
        if monitor.link is Link.FLOODED:
            self.floods += 1
            text = f"{self.name} makes QEMU send more events than virtd takes"
            hint = "virtd listens to it for a moment each minute: what is shown of it may be that old."
            self.problems["events"] = Problem(text, hint)
            if self._flood_told.take():
                journal.send(text, message_id=Message.EVENTS_HELD_BACK, level="warning", **self.fields())
        self._attach_later()

    async def command(self, name: str, arguments: dict[str, Any] | None = None, *, limit: float = 5.0) -> Any:
        """Execute a QMP command, after connecting again if need be; the value that QEMU returns may be anything.

        Raises MonitorError.
        """
        with self._asking():
            monitor = await self._linked(limit)
            try:
                return await monitor.execute(name, arguments, limit=limit)
            finally:
                if monitor.link in (Link.CLOSED, Link.SILENT) and self.monitor is monitor:
                    self._pause = max(LINK_AGAIN, self._pause)
                    self._attach_later()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Keep the link up until there is an answer, however many events QEMU sends."""
        self._askers += 1
        try:
            yield
        finally:
            self._askers -= 1

    @property
    def answers(self) -> bool:
        """Whether its known state is up to date: the monitor is connected and has answered every command."""
        return self.monitor is not None and self.monitor.link is Link.CONNECTED

    async def ask_state(self) -> str:
        """Ask for and note the run state, as QMP's query-status has it. Raises MonitorError."""
        with self._asking():
            status = await (await self._linked(GREETING_LIMIT)).status()
        if self.alive:
            self.news.take_status(status)
        return status

    async def _linked(self, limit: float) -> Monitor:
        async with self._linking:
            if self.monitor is None or not self.monitor.usable:
                if self.monitor is not None:
                    await self.monitor.close()
                await self._connect(min(GREETING_LIMIT, limit))
            monitor = self.monitor
        if monitor is None:  # it ended meanwhile
            raise errors.MonitorError(f"{self.name} has ended")
        if monitor.link is not Link.CONNECTED and (why := self.problems.get("monitor")) is not None:
            raise errors.MonitorError(why.text, hint=why.hint)
        return monitor
