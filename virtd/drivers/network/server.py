# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq of one network: started, watched, restarted when it dies, reloaded and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import TYPE_CHECKING, Any

from ... import errors, journal
from ...children import ending
from ...children.child import Child
from ...guests.repeating import Repeater
from ...hints import do
from ...messages import Message
from ...objects.persistent import Tasks
from ...objects.protocol import Problem
from ...text import span
from . import dnsmasq, serverfiles
from .netrecord import DRIVER

if TYPE_CHECKING:
    from ...hints import Hint
    from ...model.network import Network
    from ...records import Record
    from .netrecord import NetRecord

log = logging.getLogger(__name__)

BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds between tries
STEADY = 60.0  # seconds of running after which its failures are forgotten
STOP_LIMIT = 15.0


class Server(Tasks):
    """A network's dnsmasq, recorded in the record of `net`."""

    def __init__(self, net: NetRecord) -> None:
        super().__init__(net.name, net.problems)
        self.net = net
        self.child: Child | None = None
        self.stderr = Repeater(net, send=_send)
        self._failures = 0
        self._begun = 0.0

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.alive()

    @property
    def pid(self) -> int | None:
        """The PID of the running dnsmasq."""
        return self.child.pid if self.child is not None and self.child.alive() else None

    @property
    def files(self) -> dnsmasq.Files:
        return dnsmasq.files_in(self.net.runtime, self.net.state_directory)

    # Starting and stopping

    async def run(self, network: Network, *, afresh: bool) -> None:
        """Have it run with the network's files; `afresh` replaces a running one. Raises a VirtdError."""
        changed = await asyncio.to_thread(serverfiles.update, self.net, network)
        if self.alive and not afresh and self.files.config not in changed:
            if changed:
                await self._hangup()
            return
        await self._replace(network)
        self.net.problems.pop("server", None)

    async def adapt(self, new: Network, old: Network) -> None:
        """Adapt to a changed definition: replace it only if needed, and go back to the old one if that fails."""
        if not new.serves:
            await self.end()
            self.net.save(**ending.GONE)
            return
        if dnsmasq.config(old, self.files) != dnsmasq.config(new, self.files):
            # After a crash before the new definition is in force, it may have read either one.
            self.net.remember(unsure=True)
        try:
            await self.run(new, afresh=False)
        except errors.VirtdError as exc:
            if not old.serves:
                raise
            await asyncio.to_thread(serverfiles.update, self.net, old)
            await self._replace(old)
            self.net.remember(unsure=False)
            raise errors.StartFailed(
                f"Network {self.net.name}: dnsmasq doesn't take the new definition, and goes on with the old one: "
                f"{exc.message}",
                hint="Mend the definition, then: systemctl reload virtd.",
            ) from exc

    async def read_hosts(self, network: Network) -> None:
        """Reload the reserved addresses. Raises HostError."""
        if await asyncio.to_thread(serverfiles.update, self.net, network) and self.alive:
            await self._hangup()

    async def _replace(self, network: Network) -> None:
        await self.end()
        self.spawn(self._watch(await self._spawn(network)), "watch")

    async def end(self) -> None:
        """Stop it and clear away what it leaves behind. May be repeated."""
        await self.end_tasks()
        record = self.net.record
        if self.child is None and (record is None or not (record.unit or record.slots)):
            return
        units = await self.net.shared.services.units()
        await units.stop(self.net.unit, timeout=STOP_LIMIT)
        await self.clear()

    async def clear(self) -> None:
        """Clear away one that has ended; the caller changes the record."""
        child = self.child or Child(self.net.shared.services, DRIVER, self.net.name)
        if self.child is not None:
            await child.drain()
        self.stderr.end()
        for exc in await ending.put_away(child):
            # The store drops slots later, and the next launch, or the next daemon, has systemd forget the unit.
            log.warning("dnsmasq of network %s left something that can't be put away yet: %s", self.net.name, exc)
        self.child = None
        for key in [key for key in self.net.problems if key.startswith("slot ")]:
            del self.net.problems[key]

    async def _spawn(self, network: Network) -> Child:
        from .serverlaunch import ServerLaunch  # imported late: the daemon can start without it

        launch = ServerLaunch(self.net, network, self.begin, self.put_away)
        await launch.launch()
        self._begun = time.monotonic()
        return launch.child

    def begin(self, child: Child) -> None:
        """Watch a recorded one."""
        self.child = child
        self.stderr.begin(child)

    async def put_away(self) -> None:
        """Clear away one that has ended, and remove it from the record."""
        await self.clear()
        with contextlib.suppress(
            errors.HostError
        ):  # a full disk: the next daemon finds that what is still recorded no longer exists
            self.net.save(**ending.GONE)

    async def _hangup(self) -> None:
        """Make it reload its lists (SIGHUP)."""
        units = await self.net.shared.services.units()
        with contextlib.suppress(errors.NotFound):  # it has just died, and is restarted with the new lists
            await units.kill(self.net.unit, signal.SIGHUP)

    # When it ends by itself

    async def _watch(self, child: Child) -> None:
        await child.ended()
        self.spawn(self._again(), "again")

    async def _again(self) -> None:
        """Report that it died and restart it, after ever longer pauses if it keeps dying."""
        from .serverlaunch import how

        net = self.net
        async with net.exclusive("restart dnsmasq of"):
            if self._wanted() is None:
                return
            unit = await self.child.verdict() if self.child is not None else None
            text = f"dnsmasq {how(unit)}"
            if unit is not None and unit.running:
                text = "dnsmasq was restarted by somebody"
                await (await net.shared.services.units()).stop(net.unit, timeout=STOP_LIMIT)
            self._failures = 0 if time.monotonic() - self._begun > STEADY else self._failures + 1
            self._say(f"Its {text}: no leases and no names until it is back")
            journal.send(
                f"Network {net.name}: {text}, and is started again",
                message_id=Message.NETWORK_SERVER_ENDED, level="error", **net.fields(),
            )  # fmt: skip
            await self.put_away()
            net.shared.publish("changed", net)
        while True:
            await asyncio.sleep(self._pause)
            async with net.exclusive("restart dnsmasq of"):
                if (network := self._wanted()) is None:
                    return
                try:
                    await asyncio.to_thread(serverfiles.update, net, network)
                    child = await self._spawn(network)
                except errors.VirtdError as exc:
                    self._failures += 1
                    self._say(f"dnsmasq can't be started again: {exc.message}", exc.hint)
                    log.warning("Network %s: %s; tried again in %g s", net.name, exc.message, self._pause)
                    continue
                net.problems.pop("server", None)
                net.note(net.state, f"{text} and was started again")
                net.shared.publish("changed", net)
                self.spawn(self._watch(child), "watch")
                return

    def _wanted(self) -> Network | None:
        """The network's definition if dnsmasq should be running and isn't; otherwise None."""
        return self.net.running if self.net.state.value == "active" and not self.alive else None

    @property
    def _pause(self) -> float:
        """Seconds until the next try."""
        return BACKOFF[min(self._failures, len(BACKOFF) - 1)]

    def _say(self, text: str, hint: Hint = "") -> None:
        """Report a problem of the network until dnsmasq runs again."""
        hint = hint or f"See: journalctl VIRTD_DRIVER=network VIRTD_NAME={self.net.name}."
        self.net.problems["server"] = Problem(text, f"It is started again in {span(self._pause)}. " + hint)

    # Taking it back

    def adopt(self, record: Record) -> None:
        """First step of a daemon's start: slots and pumps."""
        self.child = Child.adopt(self.net.shared.services, record)
        self.stderr.begin(self.child)
        # If it isn't running, slots that were recorded but not yet stored are no loss.
        for slot in self.child.lost if self.child.alive() else ():
            self.net.lost(
                slot,
                f"network {self.net.name} is lost: what dnsmasq says is lost from now on",
                "It runs on. " + do("stop", "network", self.net.name) + " and start it when convenient.",
            )

    def recall(self) -> None:
        """First step, too: report one that an earlier daemon saw end and hasn't restarted."""
        if self.net.record is not None and not self.net.record.unit and self._wanted() is not None:
            self._say("Its dnsmasq doesn't run: no leases and no names until it does")

    async def identify(self, *, unit_exists: bool) -> None:
        """Ask systemd for the PID if a crash came between the unit's start and its recording."""
        if self.child is None or self.alive or not unit_exists:
            return
        units = await self.net.shared.services.units()
        state = await units.state(self.net.unit)
        if state is not None and state.running:
            self.child.identify(state)
            self.net.save(**self.child.identity())

    async def take_back(self, network: Network) -> None:
        """Watch the running one, or start another as if it had just ended."""
        child = self.child
        if self.net.data.get("unsure"):
            await asyncio.to_thread(serverfiles.update, self.net, network)
            await self._replace(network)
            self.net.remember(unsure=False)
            self.net.problems.pop("server", None)
        elif child is None or not child.alive():
            self.spawn(self._again(), "again")
        else:
            journal.send(
                f"Adopted network {self.net.name} (dnsmasq is PID {child.pid})",
                message_id=Message.ADOPTED, VIRTD_PID=str(child.pid), **self.net.fields(),
            )  # fmt: skip
            self.spawn(self._watch(child), "watch")
            # A daemon may have been killed between writing a new file and the reload.
            if await asyncio.to_thread(serverfiles.update, self.net, network):
                await self._hangup()

    async def close(self) -> None:
        """Release everything held in this process; dnsmasq and its slots stay."""
        await self.end_tasks()
        if self.child is not None:
            await self.child.close()


def _send(text: str, **fields: Any) -> None:
    """Send a line of its log to the journal; most are a server's routine, hence level info."""
    journal.send(text, **fields | {"level": "warning" if "failed" in text or "error" in text else "info"})
