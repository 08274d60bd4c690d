# SPDX-License-Identifier: LGPL-2.1-or-later
"""One child: a process in a transient unit of its own, its pipes and logs in slots. The only place that starts one.

The order, and what a crash of the daemon leaves at each point, is told in children/launch.py and children/ending.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .. import errors, fdstore, process
from ..logs.logfile import LogFile
from ..systemd import aliases
from ..systemd.names import unit_name
from . import fifos

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ..logs.pump import Pump
    from ..model.settings import Log
    from ..paths import Paths
    from ..records import Record
    from ..systemd.state import UnitState
    from ..systemd.transient import UnitSpec
    from ..systemd.units import Units

log = logging.getLogger(__name__)

STDIN, STDOUT, STDERR, CONSOLE_LOG, STDERR_LOG = SLOTS = ("stdin", "stdout", "stderr", "console.log", "log")
REAPED = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # seconds until PID 1 may have waited for a process that has ended
RENEW_EVERY = 1.0  # seconds between two renewals of one log's slot
PIPE_SIZE = 1 << 20  # pipe(7): the most that an unprivileged process gets; what a guest may say while we are away


class Services(NamedTuple):
    """What the drivers work with. `units` waits for the connection to systemd, which comes up after the adoption."""

    paths: Paths
    store: fdstore.Store
    pump: Pump
    log_limits: Log
    units: Callable[[], Awaitable[Units]]
    unit: str = "virtd.service"  # the daemon's own unit, which holds the slots


Stdio = tuple[int | str, int | str, int | str]  # of units.Stdio, whose import would cost something


class Ends(msgspec.Struct):
    """The child's ends of its pipes, ours until it has opened them by the paths in `stdio`.

    With a terminal, `stdout` is its other end, which can be read as well, `stdin` is none (systemd would make a
    terminal on standard input the child's controlling one), and `tty` is its name, "/dev/pts/3". `held`: the unit has
    the master end, too, as standard error, and what is to be that as standard input; the child turns them round.
    """

    stdin: int
    stdout: int
    stderr: int
    stdio: Stdio
    tty: str = ""
    held: bool = False

    def close(self) -> None:
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = -1


class Child(msgspec.Struct):
    """A child of the driver's object `name`. `lost`: the slots that a record promised and the store didn't have."""

    services: Services
    driver: str
    name: str
    pid: int = 0
    start: int = 0
    invocation_id: str = ""
    console: LogFile | None = None
    stderr: LogFile | None = None
    lost: list[str] = []
    seen: process.Seen | None = None  # of its end
    _feeder: Any = None  # a Feeder, for a child with a terminal; not imported unless there is one
    _loop: asyncio.AbstractEventLoop = msgspec.field(default_factory=asyncio.get_running_loop)
    _fresh: dict[str, int] = {}  # new log files whose slots don't have them yet
    _renewals: dict[str, asyncio.Task[None]] = {}

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.name}"

    @property
    def pipes(self) -> str:
        return self.services.paths.fifos(self.driver, self.name)

    @property
    def aliases(self) -> str:
        return self.services.paths.aliases(self.driver, self.name)

    @property
    def unit(self) -> str:
        return unit_name(self.driver, self.name)

    def slot(self, name: str) -> str:
        return f"{self.key}/{name}"

    def slot_names(self) -> list[str]:
        return [self.slot(name) for name in SLOTS]

    # Making one

    def prepare(self, *, terminal: bool = False, forgets: bool = False) -> tuple[Ends, dict[str, int]]:
        """Open the logs and make the pipes: the child's ends, and what belongs into the slots. Raises HostError.

        With `terminal` the child has a terminal in place of standard input and output: its master end is in the slot
        of stdin, and what comes out of it goes through a pipe of our own, whose read end is in the slot of stdout.
        `forgets`: systemd drops the slots when virtd is stopped. So that this hangs nothing up, the unit is given the
        master end as well, which PID 1 has open for as long as the unit is there.
        """
        self.console = self._log(CONSOLE_LOG)
        try:
            self.stderr = self._log(STDERR_LOG)
        except BaseException:
            self.console.close()
            raise
        opened: list[int] = []
        try:
            if terminal:
                opened += [-1, *os.openpty()[::-1], *os.pipe2(os.O_CLOEXEC)]
            opened += fifos.make(self.pipes, (STDERR,) if terminal else fifos.NAMES)
            tty = os.ttyname(opened[1]) if terminal else ""
        except OSError as exc:
            for fd in opened:
                if fd >= 0:
                    os.close(fd)
            self.console.close()
            self.stderr.close()
            raise errors.HostError(f"Cannot make pipes for {self.name}: {exc.strerror}") from exc
        if terminal:
            slave = opened.pop(1)
        in_read, in_write, out_read, out_write, err_read, err_write = opened
        # Only the console's: QEMU says little on stderr, and where root hasn't CAP_SYS_RESOURCE (in a container) all
        # its large pipes come out of one allowance of 64 MiB.
        try:
            fcntl.fcntl(out_read, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError as exc:
            # Past fs.pipe-user-pages-soft. It works, but not for long without us.
            size = fcntl.fcntl(out_read, fcntl.F_GETPIPE_SZ)
            log.warning(
                "%s gets a pipe of %d bytes only (%s): while virtd is away, its output may be lost past that. "
                "Raise fs.pipe-user-pages-soft (sysctl)", self.name, size, exc.strerror,
            )  # fmt: skip
        ours = {
            STDIN: in_write,
            STDOUT: out_read,
            STDERR: err_read,
            CONSOLE_LOG: self.console.fd,
            STDERR_LOG: self.stderr.fd,
        }
        if terminal:
            os.close(out_write)  # the feeder opens it again whenever there is one
            out_write = slave
        stdin, stdout, stderr = (f"{self.pipes}/{name}" for name in fifos.NAMES)
        stdio: Stdio = (os.devnull, slave, stderr) if terminal else (stdin, stdout, stderr)
        held = terminal and forgets
        if held:
            in_read = os.dup(in_write)
            stdio = (err_write, slave, in_read)
        return Ends(in_read, out_write, err_write, stdio, tty, held), {
            self.slot(name): fd for name, fd in ours.items()
        }

    async def keep(self, descriptors: dict[str, int]) -> None:
        """Put `descriptors` into their slots and see that PID 1 has them. Raises HostError, with none left there."""
        store = self.services.store
        try:
            store.put_all(descriptors)
            await self._verify(list(descriptors))
        except fdstore.StoreError as exc:
            self._drop_slots()
            raise errors.HostError(f"Cannot keep the descriptors of {self.name}: {exc}", hint=exc.hint) from exc
        except BaseException:
            self._drop_slots()
            raise
        finally:
            self.discard(descriptors)

    def discard(self, descriptors: dict[str, int]) -> None:
        """Close what `prepare` has given for the slots, but for the logs, which go on to be used. Idempotent."""
        for name in (STDIN, STDOUT, STDERR):
            if (fd := descriptors.pop(self.slot(name), -1)) >= 0:
                os.close(fd)

    async def _verify(self, wanted: list[str]) -> None:
        """See what PID 1 holds: that a message was sent says nothing, and sd_notify(3) not that the store is full."""
        units = await self.services.units()
        store = self.services.store
        boxed = any(store.kept_as(name) != name for name in wanted)
        missing: set[str] = set()
        for _ in range(3):
            dump = await units.store_dump(self.services.unit, None if boxed else wanted)
            if dump is None:  # systemd < 254 can't tell
                return
            difference = store.verify(dump)
            missing = set(wanted) & {*difference.missing, *difference.mismatched}
            if not missing:
                return
            await asyncio.sleep(0.02)
        if boxed:
            # Others' slots are in that box as well: PID 1 is to have them, whatever became of ours.
            await asyncio.to_thread(store.send_again)
        raise errors.HostError(
            f"systemd didn't keep {', '.join(sorted(missing))} in its FD store",
            hint="Raise FileDescriptorStoreMax= of virtd.service. See: journalctl -b _PID=1 -g FileDescriptorStore",
        )

    async def spawn(self, spec: UnitSpec, ends: Ends) -> UnitState:
        """Start the unit; the child's ends are closed here, whatever happens. Raises StartFailed."""
        units = await self.services.units()
        try:
            self._pump()
            state = await units.start(msgspec.structs.replace(spec, aliases=self.aliases), ends.stdio)
        finally:
            ends.close()
        self.identify(state)
        return state

    def identify(self, state: UnitState) -> None:
        """Take from the unit's state which process it is."""
        if state.active != "activating":  # by which time it has opened what it was given
            fifos.retire(self.pipes)
        self.pid = state.main_pid
        self.start = process.start_time(self.pid)
        self.invocation_id = state.invocation_id
        self.seen = None

    # Taking one back

    @classmethod
    def adopt(cls, services: Services, record: Record) -> Child:
        """The child that `record` tells of, its pumps running.

        A pipe that is missing from the store is in `lost`; logs are opened again.
        """
        child = cls(services, record.driver, record.name, record.main_pid, record.main_start, record.invocation_id)
        doubles = services.store.duplicates()
        for name, identity in record.slots.items():
            if name.endswith("log"):
                # Opened by its path if need be: one that was just being rotated may well be missing.
                if name in doubles:
                    services.store.drop(name)
                continue
            dev, _, ino = identity.partition(":")
            try:
                services.store.resolve(name, int(dev or 0), int(ino or 0))
            except (fdstore.MissingSlot, ValueError):
                child.lost.append(name)
                services.store.drop(name)  # what there is isn't ours, whatever it is: nothing is read from it
        held = [slot for slot in (CONSOLE_LOG, STDERR_LOG) if child.slot(slot) in services.store]
        child.console = child._log(CONSOLE_LOG, held=CONSOLE_LOG in held)
        child.stderr = child._log(STDERR_LOG, held=STDERR_LOG in held)
        for slot_name, file in ((CONSOLE_LOG, child.console), (STDERR_LOG, child.stderr)):
            if slot_name not in held:
                child._rotated(child.slot(slot_name), file.fd)
        child._pump()
        return child

    def alive(self) -> bool:
        return process.alive(self.pid, self.start)

    # While it runs

    async def ended(self) -> None:
        """Wait until the process has ended; `seen` says how, as far as that can be seen."""
        if (seen := await ended(self.pid, self.start)) is not None:
            self.seen = seen

    async def verdict(self) -> UnitState | None:
        """How the process ended, from its unit or else from the journal; None when nobody knows.

        A state that runs: somebody has started the unit again. Raises HostError or TimedOut.
        """
        from . import witness  # no start of the daemon needs it before there is a bus

        units = await self.services.units()
        return await witness.ended(units, self.unit, self.invocation_id, self.seen)

    def stdin(self) -> int:
        """The write end of its standard input; stays the store's. Raises MissingSlot."""
        return self.services.store.get(self.slot(STDIN))

    async def move_words(self) -> None:
        """Have in the log what it has said on stderr until now."""
        if self.slot(STDERR) in self.services.store:
            await asyncio.wrap_future(self.services.pump.drain(self.slot(STDERR)))

    # The end

    async def drain(self) -> None:
        """Move what is left in the pipes to the logs. For a child that has ended."""
        pump = self.services.pump
        if self._feeder is not None:
            await self._feeder.drain(lambda: asyncio.wrap_future(pump.drain(self.slot(STDOUT))))
        await asyncio.gather(*(asyncio.wrap_future(pump.drain(self.slot(name))) for name in (STDOUT, STDERR)))

    async def release(self) -> None:
        """Stop the pumps, drop the slots, close the logs. Idempotent.

        Slots that PID 1 can't be told of now are dropped later: with the store's next change, or by the daemon's next
        try (`Store.untidy`), or by the next daemon, for which they are nobody's.
        """
        await self.close()
        await asyncio.to_thread(self._drop_slots)
        fifos.remove(self.pipes)
        aliases.remove(self.aliases)

    async def close(self) -> None:
        """Let go of the logs and pipes; the slots stay with PID 1."""
        pump = self.services.pump
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None
        await asyncio.gather(*(asyncio.wrap_future(pump.remove(self.slot(name))) for name in (STDOUT, STDERR)))
        for file in (self.console, self.stderr):
            if file is not None:
                file.close()
        self.console = self.stderr = None
        for task in list(self._renewals.values()):
            task.cancel()
        await asyncio.gather(*self._renewals.values(), return_exceptions=True)

    def _drop_slots(self) -> None:
        try:
            self.services.store.drop_prefix(f"{self.key}/")
        except fdstore.NotifyFailed as exc:
            log.warning("The slots of %s are dropped later: %s", self.key, exc)

    def _rotated(self, name: str, fd: int) -> None:
        """A log goes on in another file: have its slot follow. In the pump's thread, which mustn't wait for PID 1."""
        self._loop.call_soon_threadsafe(self._renew, name, os.dup(fd))

    def _renew(self, name: str, fd: int) -> None:
        """On the loop: the newest file wins, and a log that rotates all the time bothers PID 1 once a second."""
        if (older := self._fresh.pop(name, None)) is not None:
            os.close(older)
        self._fresh[name] = fd
        if name not in self._renewals:
            self._renewals[name] = asyncio.create_task(self._renew_slot(name), name=f"renew-{name}")

    async def _renew_slot(self, name: str) -> None:
        try:
            while (fd := self._fresh.pop(name, None)) is not None:
                putting = asyncio.ensure_future(asyncio.to_thread(self.services.store.put, name, fd))
                try:
                    await asyncio.shield(putting)
                except asyncio.CancelledError:
                    # The thread goes on: what it puts must be there before anybody drops it, and the descriptor open.
                    await asyncio.wait([putting])
                    raise
                except fdstore.StoreError as exc:  # the log is found by its path all the same
                    log.warning("Slot %s still holds the log before its rotation: %s", name, exc)
                finally:
                    os.close(fd)
                await asyncio.sleep(RENEW_EVERY)
        finally:
            if (fd := self._fresh.pop(name, None)) is not None:
                os.close(fd)
            del self._renewals[name]

    def _log(self, slot: str, *, held: bool = False) -> LogFile:
        services = self.services
        of = services.paths.console_log if slot == CONSOLE_LOG else services.paths.stderr_log
        name = self.slot(slot)
        limits = services.log_limits
        return LogFile(
            of(self.driver, self.name),
            limit=limits.max_bytes,
            backups=limits.backups,
            on_rotate=lambda fd: self._rotated(name, fd),
            # A duplicate: the store may have to send its own to PID 1 once more.
            fd=os.dup(services.store.get(name)) if held else None,
        )

    def _pump(self) -> None:
        held = self.services.store
        if self._feeder is None and self.slot(STDIN) in held and self.slot(STDOUT) in held:
            stdin = self.services.store.get(self.slot(STDIN))
            if os.isatty(stdin):
                from ..logs.feeder import Feeder

                # Before the pump, for which a pipe without a writer has ended.
                self._feeder = Feeder(stdin, self.services.store.get(self.slot(STDOUT)))
        for name, file in ((STDOUT, self.console), (STDERR, self.stderr)):
            if file is not None and self.slot(name) in held:
                fd, size = self.services.store.get(self.slot(name)), PIPE_SIZE if name == STDOUT else 1
                self.services.pump.add(self.slot(name), fd, file, size=size)
                if name == STDERR:
                    self.services.pump.watch(self.slot(name))  # the journal is to have it soon


def sweep(services: Services) -> None:
    """Remove the FIFOs of starts that were cut off before they had a slot, and aliases of what has no FIFOs. Before
    this daemon starts anything."""
    for driver, name in fifos.owners(services.paths.fifos()):
        child = Child(services, driver, name)
        if fifos.fresh(child.pipes) and not any(slot in services.store for slot in child.slot_names()):
            fifos.remove(child.pipes)
    for driver, name in fifos.owners(services.paths.aliases()):
        if not os.path.lexists(services.paths.fifos(driver, name)):
            aliases.remove(services.paths.aliases(driver, name))


def identities(descriptors: Mapping[str, int]) -> dict[str, str]:
    """What a record says of slots: "device:inode" of what is in each."""
    found = {}
    for name, fd in descriptors.items():
        status = os.fstat(fd)
        found[name] = f"{status.st_dev}:{status.st_ino}"
    return found


async def ended(pid: int, start: int) -> process.Seen | None:
    """Wait until the process that was `pid` at `start` has ended: what was seen of that, None if it had before."""
    pidfd = process.open_pidfd(pid, start)
    if pidfd is None:
        return None
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
        return process.Seen(time.time(), await _status(pidfd))
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def _status(pidfd: int) -> int | None:
    """How a process has ended that PID 1 is about to wait for."""
    with contextlib.suppress(OSError):
        for pause in REAPED:
            if (status := process.exit_status(pidfd)) is not None:
                return status
            await asyncio.sleep(pause)
        return process.exit_status(pidfd)
    return None
