# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq of one network: begun, watched, begun again when it dies, told of changes, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from ... import errors, files, journal, layout, untrusted
from ...children import ending
from ...children.child import Child
from ...children.launch import Launch
from ...guests.repeating import Repeater
from ...hints import do
from ...messages import Message
from ...objects.persistent import Tasks
from ...objects.protocol import Problem
from ...systemd.state import CLD_EXITED, UnitState, signal_name
from ...text import span
from . import dnsmasq, prerequisites
from .netrecord import DRIVER

if TYPE_CHECKING:
    from ...hints import Hint
    from ...model.network import Network
    from ...records import Record
    from ...systemd.transient import UnitSpec
    from .netrecord import NetRecord

log = logging.getLogger(__name__)

READY_LIMIT = 10.0  # seconds from its start until its sockets are open
LOOK = 0.01  # seconds between two looks at whether they are
BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds before one try and the next
STEADY = 60.0  # seconds after which one that runs counts as well again
STOP_LIMIT = 15.0


class Server(Tasks):
    """A network's dnsmasq; `net` keeps the record that tells of it."""

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
        """Of the one that runs."""
        return self.child.pid if self.child is not None and self.child.alive() else None

    @property
    def files(self) -> dnsmasq.Files:
        return dnsmasq.files_in(self.net.runtime, self.net.state_directory)

    # Beginning and ending

    async def run(self, network: Network, *, afresh: bool) -> None:
        """Have it run with the network's files; with `afresh` also one that runs is replaced. Raises a VirtdError."""
        changed = await asyncio.to_thread(self._write, network)
        if self.alive and not afresh and self.files.config not in changed:
            if changed:
                await self._hangup()
            return
        await self._replace(network)
        self.net.problems.pop("server", None)

    async def adapt(self, new: Network, old: Network) -> None:
        """A changed definition: replaced only if it must be, and if it can't be begun so, begun as it was."""
        if not new.serves:
            await self.end()
            self.net.save(**ending.GONE)
            return
        if dnsmasq.config(old, self.files) != dnsmasq.config(new, self.files):
            # A crash before the new definition is in force leaves one that has read either of them.
            self.net.remember(unsure=True)
        try:
            await self.run(new, afresh=False)
        except errors.VirtdError as exc:
            if not old.serves:
                raise
            await asyncio.to_thread(self._write, old)
            await self._replace(old)
            self.net.remember(unsure=False)
            raise errors.StartFailed(
                f"Network {self.net.name}: dnsmasq doesn't take the new definition, and goes on with the old one: "
                f"{exc.message}",
                hint="Mend the definition, then: systemctl reload virtd.",
            ) from exc

    async def read_hosts(self, network: Network) -> None:
        """Have it know for whom addresses are set aside. Raises HostError."""
        if await asyncio.to_thread(self._write, network) and self.alive:
            await self._hangup()

    async def _replace(self, network: Network) -> None:
        await self.end()
        self._watch(await self._spawn(network))

    async def end(self) -> None:
        """Stop it and clear away what it leaves. Idempotent."""
        await self.end_tasks()
        record = self.net.record
        if self.child is None and (record is None or not (record.unit or record.slots)):
            return
        units = await self.net.shared.services.units()
        await units.stop(self.net.unit, timeout=STOP_LIMIT)
        await self.clear()

    async def clear(self) -> None:
        """Put away one that has ended. The record is the caller's."""
        child = self.child or Child(self.net.shared.services, DRIVER, self.net.name)
        if self.child is not None:
            await child.drain()
        self.stderr.end()
        for exc in await ending.put_away(child):
            # The store drops slots later, and the next launch, or the next daemon, has the unit forgotten.
            log.warning("Not all that dnsmasq of network %s left is put away: %s", self.net.name, exc)
        self.child = None
        for key in [key for key in self.net.problems if key.startswith("slot ")]:
            del self.net.problems[key]

    def _write(self, network: Network) -> set[str]:
        """Bring its files up to date: the paths of those that were changed. In a thread."""
        mine = self.files
        account = prerequisites.account(self.net.shared.settings)
        changed = set()
        try:
            layout.ensure(self.net.shared.services.paths)
            files.make_directory(self.net.runtime, 0o755)
            files.make_directory(self.net.state_directory, 0o710)
            self._lease_file(account)
        except OSError as exc:
            raise errors.HostError(f"Cannot make the directories of network {self.net.name}: {exc}") from exc
        for path, text in (
            (mine.config, dnsmasq.config(network, mine)),
            (mine.hosts, dnsmasq.hosts(network, self.net.ports)),
            (mine.names, dnsmasq.names(network)),
        ):
            if content(path) != text:
                files.write(path, text.encode(), mode=0o644)
                changed.add(path)
        return changed

    def _lease_file(self, account: prerequisites.Account) -> None:
        """The one file that dnsmasq may write, which it changes in place, in a directory that isn't its own: one that
        was taken over can fill neither. (Before, the directory was dnsmasq's.) Raises OSError.
        """
        directory, path = self.net.state_directory, self.files.leases
        os.chown(directory, os.geteuid(), account.gid)
        os.chmod(directory, 0o710)
        for entry in os.scandir(directory):
            if entry.path != path or not entry.is_file(follow_symlinks=False):
                files.remove_tree(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
        fd = untrusted.open_regular(path)
        try:
            os.fchown(fd, account.uid, account.gid)
        finally:
            os.close(fd)

    async def _spawn(self, network: Network) -> Child:
        launch = _Launch(self, network)
        await launch.launch()
        self._begun = time.monotonic()
        return launch.child

    def begin(self, child: Child) -> None:
        """Look after one that is on record."""
        self.child = child
        self.stderr.begin(child)

    async def put_away(self) -> None:
        """Clear away one that has ended, and have it off the record."""
        await self.clear()
        with contextlib.suppress(errors.HostError):  # a full disk: what a record that stays tells of isn't there
            self.net.save(**ending.GONE)

    async def _hangup(self) -> None:
        """Have it read its lists again."""
        units = await self.net.shared.services.units()
        with contextlib.suppress(errors.NotFound):  # it has just died, and is begun again with the new lists
            await units.kill(self.net.unit, signal.SIGHUP)

    # Its own end

    def _watch(self, child: Child) -> None:
        """Begin it again when it ends."""

        async def watch() -> None:
            await child.ended()
            self.spawn(self._again(), "again")

        self.spawn(watch(), "watch")

    async def _again(self) -> None:
        """It has died: say so, and begin it again, after ever longer pauses while it doesn't stay."""
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
                    await asyncio.to_thread(self._write, network)
                    child = await self._spawn(network)
                except errors.VirtdError as exc:
                    self._failures += 1
                    self._say(f"dnsmasq can't be started again: {exc.message}", exc.hint)
                    log.warning("Network %s: %s; tried again in %g s", net.name, exc.message, self._pause)
                    continue
                net.problems.pop("server", None)
                net.note(net.state, f"{text} and was started again")
                net.shared.publish("changed", net)
                self._watch(child)
                return

    def _wanted(self) -> Network | None:
        """The network's definition, if there should be a dnsmasq and is none."""
        return self.net.running if self.net.state.value == "active" and not self.alive else None

    @property
    def _pause(self) -> float:
        """Seconds until the next try."""
        return BACKOFF[min(self._failures, len(BACKOFF) - 1)]

    def _say(self, text: str, hint: Hint = "") -> None:
        """What the network has to say for itself until its dnsmasq runs."""
        hint = hint or f"See: journalctl VIRTD_DRIVER=network VIRTD_NAME={self.net.name}."
        self.net.problems["server"] = Problem(text, f"It is started again in {span(self._pause)}. " + hint)

    # Taking it back

    def adopt(self, record: Record) -> None:
        """First step of a daemon's start: slots and pumps."""
        self.child = Child.adopt(self.net.shared.services, record)
        self.stderr.begin(self.child)
        # Of one that doesn't run, slots that were on record and not put yet are no loss.
        for slot in self.child.lost if self.child.alive() else ():
            self.net.lost(
                slot,
                f"network {self.net.name} is lost: what dnsmasq says is lost from now on",
                "It runs on. " + do("stop", "network", self.net.name) + " and start it when convenient.",
            )

    def recall(self) -> None:
        """First step as well: one that an earlier daemon has seen end, and hasn't begun again."""
        if self.net.record is not None and not self.net.record.unit and self._wanted() is not None:
            self._say("Its dnsmasq doesn't run: no leases and no names until it does")

    async def identify(self, *, unit_exists: bool) -> None:
        """A crash between the unit's start and the record of its PID: ask systemd who it is."""
        if self.child is None or self.alive or not unit_exists:
            return
        units = await self.net.shared.services.units()
        state = await units.state(self.net.unit)
        if state is not None and state.running:
            self.child.identify(state)
            self.net.save(**self.child.identity())

    async def take_back(self, network: Network) -> None:
        """Watch the one that runs. One that ended meanwhile is begun again, as if it had ended under our eyes."""
        record = self.net.record
        if record is not None and record.data.get("unsure"):
            await asyncio.to_thread(self._write, network)
            await self._replace(network)
            self.net.remember(unsure=False)
            self.net.problems.pop("server", None)
        elif (child := self.child) is None or not child.alive():
            self.spawn(self._again(), "again")
        else:
            journal.send(
                f"Adopted network {self.net.name} (dnsmasq is PID {child.pid})",
                message_id=Message.ADOPTED, VIRTD_PID=str(child.pid), **self.net.fields(),
            )  # fmt: skip
            self._watch(child)
            # A daemon that was killed between a new file and the word of it has left that word to us.
            if await asyncio.to_thread(self._write, network):
                await self._hangup()

    async def close(self) -> None:
        """Let go of everything in this process; dnsmasq and its slots stay."""
        await self.end_tasks()
        if self.child is not None:
            await self.child.close()


class _Launch(Launch):
    """One try to have a dnsmasq for the network."""

    def __init__(self, server: Server, network: Network) -> None:
        net = server.net
        super().__init__(
            Child(net.shared.services, DRIVER, net.name),
            f"Cannot start network {net.name}",
            f"Network {net.name}: dnsmasq",
            net.fields(),
        )
        self.server = server
        self.net = net
        self.network = network

    def require(self) -> None:
        self.account, self.binary = (
            prerequisites.account(self.net.shared.settings),
            prerequisites.dnsmasq(self.net.shared.settings),
        )

    def remember(self, promise: dict[str, Any]) -> None:
        self.net.save(**promise)

    def begin(self) -> None:
        self.server.begin(self.child)

    def spec(self) -> UnitSpec:
        return dnsmasq.spec(self.network, self.net.unit, self.binary, self.server.files, self.account)

    def know(self, identity: dict[str, Any]) -> None:
        self.net.save(**identity)

    async def come_up(self) -> None:
        """Wait until its sockets are open, or it has ended. Raises StartFailed."""
        child, name = self.child, self.net.name
        deadline = time.monotonic() + READY_LIMIT
        while child.alive():
            # The pump has it in the log within a tenth of a second, since somebody watches.
            if dnsmasq.READY in _read(self.net, self.words_from):
                return
            if time.monotonic() > deadline:
                raise errors.StartFailed(f"dnsmasq of network {name} isn't ready after {span(READY_LIMIT)}")
            await asyncio.sleep(LOOK)
        await child.drain()
        raise errors.StartFailed(f"dnsmasq of network {name} {how(await child.verdict())} at its start")

    async def failed(self, _why: BaseException) -> None:
        if self.remembered:
            await self.server.put_away()

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        words = _words(self.net, self.words_from)
        if not isinstance(exc, errors.StartFailed) or not words:
            return exc
        more, hint = _explained(words, self.account) or ("", f"See {self.server.files.config}.")
        return errors.StartFailed(f"dnsmasq of network {self.net.name} didn't start: {words}{more}", hint=hint)

    def trouble(self, text: str) -> None:
        self.net.problems["server"] = Problem(text)


def how(state: UnitState | None) -> str:
    """How it ended, in words."""
    if state is None:
        return "ended, nobody knows how"
    if state.exec_code == CLD_EXITED:
        return f"exited with status {state.exec_status}"
    return f"was killed by {signal_name(state.exec_status)}" if state.exec_code else "ended"


def _send(text: str, **fields: Any) -> None:
    """Into the journal, as what it mostly is: the daily business of a server."""
    journal.send(text, **fields | {"level": "warning" if "failed" in text or "error" in text else "info"})


def content(path: str) -> str | None:
    """A file's text, or None when it can't be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):
        return None


def _read(net: NetRecord, since: int) -> bytes:
    """What is in its log from an offset on, 64 KiB at most."""
    try:
        with open(net.shared.services.paths.stderr_log(DRIVER, net.name), "rb") as file:
            if os.fstat(file.fileno()).st_size < since:  # rotated meanwhile
                since = 0
            file.seek(since)
            return file.read(1 << 16)
    except OSError:
        return b""


def _explained(words: str, account: prerequisites.Account) -> tuple[str, str] | None:
    """Of what it says that isn't about its configuration: more about it, and a hint."""
    if "create inotify: Too many open files" not in words:
        return None
    from .. import inotify  # no start of the daemon needs it

    more = (
        f" (processes of {account.user} have {inotify.taken(account.uid)} inotify instances, and "
        f"fs.inotify.max_user_instances is {inotify.limit()})"
    )
    return more, f"{inotify.hint()} A network that is isolated, or has no DNS (dns = false), needs none."


def _words(net: NetRecord, since: int) -> str:
    """Its last words, without its name before each line."""
    lines = _read(net, since).decode(errors="replace").splitlines()
    return "; ".join(line.partition(": ")[2] or line for line in lines[-2:] if line)
