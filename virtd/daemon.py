# SPDX-License-Identifier: LGPL-2.1-or-later
"""Wiring, signals and the order of a start.

    1. slots and records are taken over, pumps run     (no bus, no D-Bus libraries: no guest has to wait for them)
    2. the Varlink socket is served, READY=1
    3. in the background: D-Bus, each record compared with its unit, org.virtd1, the monitors
    4. autostart, once per boot

The end is short: everything that matters is in a record, a slot or a file at any time, so SIGTERM just exits.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

from . import later  # noqa: E402

with later.put_off():
    import asyncio

    import msgspec

import contextlib  # noqa: E402
import gc  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from . import __version__, errors, fdstore, files, journal, layout, process, signals  # noqa: E402
from .api import varlink  # noqa: E402
from .api.limits import Limits  # noqa: E402
from .children.child import Services  # noqa: E402
from .connections import Connections, give_way  # noqa: E402
from .drivers.loader import MODULES  # noqa: E402
from .host import Caller, Host, eventlog  # noqa: E402
from .logs.pump import Loss, Pump  # noqa: E402
from .messages import Message  # noqa: E402
from .model import settings as settings_model  # noqa: E402
from .objects import definitions  # noqa: E402
from .paths import Paths  # noqa: E402
from .systemd import storecheck  # noqa: E402
from .text import plain  # noqa: E402

if TYPE_CHECKING:
    from .systemd.units import Units

log = logging.getLogger("virtd")

CODE_ID = "/usr/share/virtd/code-id"
STORE_MAX = 4096  # FileDescriptorStoreMax= in virtd.service, which systemd < 254 doesn't pass on
UNIT = "virtd.service"
LISTENERS = ("varlink", "varlink-root")  # FileDescriptorName= in virtd.socket and virtd-root.socket
LAST_LOOK = 0.2  # seconds that the end waits for guests' latest output to be written to their logs
TIDY_EVERY = 2.0
LOOK_EVERY = 10.0  # seconds between checks of what guests depend on
WELL = 5.0  # seconds after which a crash counts as the first one again, see RestartSteps= in virtd.service
ITSELF = Caller(uid=0, pid=os.getpid(), name="virtd")


class Daemon:
    """One run of virtd."""

    def __init__(self, paths: Paths, store: fdstore.Store, *, knows_store: bool) -> None:
        self._paths = paths
        self._store = store
        self._knows_store = knows_store
        self._loop = asyncio.get_running_loop()
        self._connections = Connections(self._task)
        self._stopping = asyncio.Event()
        self._limits = Limits()
        self._status_due = False
        self._tasks: list[asyncio.Task[None]] = []
        settings, problem = load_settings(paths)
        self.pump = Pump(self._loop.call_soon_threadsafe, on_bytes=self._grown, on_drop=self._lost, on_death=give_way)
        services = Services(paths, store, self.pump, settings.log, self._connections.units)
        self.host = Host(services, settings)
        self._kept = storecheck.Watch(self.host.problems, self._look_at_store)
        if problem is not None:
            self._settings_problem(problem)

    async def run(self) -> None:
        """Until SIGTERM."""
        layout.ensure(self._paths)
        self.host.restore(STARTED)
        self.pump.start()
        signals.listen(
            self._loop,
            {
                signal.SIGTERM: self._stopping.set,
                signal.SIGINT: self._stopping.set,
                signal.SIGHUP: lambda: self._task(self._reload),
            },
        )
        server = varlink.Server(self.host, *self._listeners(), limits=self._limits)
        server.start()
        self._degraded()
        announce(self._paths)
        self._notify(f"READY=1\nSTATUS={self._status()}")
        self.host.events.begin()  # before anything can change
        # The garbage collector was off during the imports; nothing that they created will ever be garbage.
        gc.freeze()
        gc.enable()
        self.host.subscribe(lambda _event, _item: self._status_later())
        self._task(self._watchdog)
        self._task(self._keep_tidy)
        self._task(self._bring_up)
        self._task(self._look)
        await self._stopping.wait()
        self._notify("STOPPING=1")
        # Our successor would find it in the pipes, but when the host goes down there is no successor.
        if last := [asyncio.wrap_future(one) for one in self.pump.drain_all()]:
            await asyncio.wait(last, timeout=LAST_LOOK)
        # Only for callers: what has been sent to us is answered, and later calls wait for our successor.
        await self._connections.leave()

    # Start-up

    def _listeners(self) -> list[socket.socket]:
        """systemd's sockets, or one of our own when run by hand."""
        sockets = self._store.sockets()
        if inherited := [fd for name in LISTENERS for fd in sockets.get(name, [])]:
            return [socket.socket(fileno=os.dup(fd)) for fd in inherited]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._paths.socket)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._paths.socket)
        os.chmod(self._paths.socket, 0o666)
        listener.listen(128)
        return [listener]

    def _degraded(self) -> None:
        stray = [name for name in self._store.names() if name.partition("/")[0] not in MODULES]
        stray += [name for name in self._store.sockets() if name not in LISTENERS]
        if stray:
            # Perhaps those of a newer virtd, before a rollback. They are as safe as our own, and not ours to touch.
            self.host.degraded.append(f"the FD store holds what this version doesn't know: {', '.join(stray)}")
        if not self._store.persistent:
            self.host.degraded.append("not run by systemd: nothing is kept across a restart")
        elif not self._knows_store:
            self.host.degraded.append(
                "systemd is older than 254: it drops the FD store when virtd is stopped (a restart keeps it)"
            )

    async def _bring_up(self) -> None:
        await self._connections.keep(self.host, self._limits, self._connected)

    async def _connected(self, units: Units, first: bool) -> None:  # noqa: FBT001
        await units.on_reloaded(self._kept.due)
        if first:
            await self._recover()
            for work in (self.host.autostart, self._forget_crashes, self._kept.keep_looking):
                self._task(work)

    async def _recover(self) -> None:
        """Second step: compare every record with its unit. A failure affects only its object."""
        await self.host.reconcile()
        with contextlib.suppress(fdstore.NotifyFailed):
            await asyncio.to_thread(self._store.tidy)
        found = self.host.found()
        recovery = self.host.recovery
        if any(found.values()):
            parts = [
                f"{len(names)} {what}"
                for what, names in (
                    ("adopted", found["adopted"] + found["rebuilt"]),
                    ("ended meanwhile", found["ended"]),
                    ("rolled back", found["rolled_back"]),
                )
                if names
            ]
            journal.send(
                f"Recovered {recovery.what} in {recovery.ms:.1f} ms ({', '.join(parts)})",
                message_id=Message.RECOVERED,
                VIRTD_OBJECTS=str(recovery.objects),
                VIRTD_MS=f"{recovery.ms:.1f}",
            )
        self._status_later()

    async def _forget_crashes(self) -> None:
        """Reset systemd's count of crashes, so that it doesn't delay the start after the next one."""
        await asyncio.sleep(WELL)
        with contextlib.suppress(errors.VirtdError):
            await (await self._connections.units()).reset_failed(UNIT)

    async def _look_at_store(self) -> storecheck.Problems:
        return await storecheck.look(self._store, await self._connections.units(), UNIT)

    # While it runs

    async def _reload(self) -> None:
        with contextlib.suppress(fdstore.NotifyFailed):
            self._store.reloading()
        try:
            await self.host.reload(by=ITSELF)
        finally:
            self._notify(f"READY=1\nSTATUS={self._status()}")

    async def _keep_tidy(self) -> None:
        """Drop slots that couldn't be dropped in time."""
        while True:
            await asyncio.sleep(TIDY_EVERY)
            if self._store.untidy():
                with contextlib.suppress(fdstore.NotifyFailed):
                    await asyncio.to_thread(self._store.tidy)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self.host.look()

    async def _watchdog(self) -> None:
        """Tell systemd that the event loop runs, twice as often as required."""
        limit = os.environ.pop("WATCHDOG_USEC", "")
        os.environ.pop("WATCHDOG_PID", None)
        if not limit.isdecimal():
            return
        while True:
            self._notify("WATCHDOG=1")
            await asyncio.sleep(int(limit) / 2_000_000)

    def _grown(self, key: str) -> None:
        self.host.grown(key)

    def _lost(self, loss: Loss) -> None:
        """The pump can't write to a log, or can again."""
        self.host.refused(loss)
        if loss.over:
            log.warning("%s can be written again; %d bytes were dropped", loss.path, loss.dropped)
        else:
            log.warning("%s can't be written: %s; its guest's output is dropped from now on", loss.path, loss.reason)

    def _settings_problem(self, problem: errors.VirtdError) -> None:
        self.host.problems["settings"] = (problem.message, str(problem.hint) or "The defaults are used until then.")
        journal.send(
            problem.message, message_id=Message.DEFINITION_PROBLEM, level="error", VIRTD_FILE=self._paths.settings
        )

    def _status(self) -> str:
        recovery = self.host.recovery
        recovered = (
            f"recovered {recovery.objects} in {recovery.ms:.1f} ms" if recovery.objects else "nothing to recover"
        )
        return f"{self.host.summary()} running; {recovered} at the last start"

    def _status_later(self) -> None:
        """Send the new status to systemd, once for a burst of changes."""
        if not self._status_due:
            self._status_due = True
            self._loop.call_later(0.2, self._tell_status)

    def _tell_status(self) -> None:
        self._status_due = False
        self._notify(f"STATUS={self._status()}")

    def _notify(self, text: str) -> None:
        try:
            self._store.notify(plain(text))
        except fdstore.NotifyFailed as exc:
            log.warning("systemd doesn't accept %r: %s", text.partition("\n")[0], exc)

    def _task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work(), name=work.__name__.strip("_"))
        self._tasks.append(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s failed: %s", task.get_name(), exc, exc_info=exc)
            self.host.problems[task.get_name()] = (
                f"{task.get_name()} failed: {exc}",
                "This is a bug: see journalctl -u virtd.",
            )


def announce(paths: Paths) -> None:
    """Publish which code this daemon runs, for the package's scriptlet, and that it keeps a log of events."""
    try:
        with open(CODE_ID, encoding="ascii") as file:
            code = file.read().strip()
    except (OSError, ValueError):
        code = ""
    pid, path = os.getpid(), f"{paths.run}/daemon.json"
    eventlog.discard_unless(_published(path).get("events"), paths.events)
    content = {"version": __version__, "pid": pid, "start": process.start_time(pid), "code_id": code}
    content["events"] = eventlog.FORMAT
    try:
        files.write(path, msgspec.json.encode(content), mode=0o644)
    except errors.HostError as exc:
        log.warning("%s", exc)
        # What an earlier daemon left there is out of date.
        with contextlib.suppress(errors.HostError):
            files.remove(path)


def _published(path: str) -> dict[str, Any]:
    """What the previous daemon published about itself."""
    try:
        with open(path, "rb") as file:
            content = msgspec.json.decode(file.read(1 << 16))
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def load_settings(paths: Paths) -> tuple[settings_model.Settings, errors.VirtdError | None]:
    """virtd.toml, or the defaults and what is wrong with it: a bad file must not keep guests from their daemon."""
    path = paths.settings
    try:
        return settings_model.parse(definitions.read(path), path), None
    except FileNotFoundError:
        return settings_model.Settings(), None
    except errors.InvalidDefinition as exc:
        return settings_model.Settings(), exc
    except OSError as exc:
        return settings_model.Settings(), errors.InvalidDefinition(path, "", f"can't be read: {exc.strerror}")
    except ValueError as exc:
        return settings_model.Settings(), errors.InvalidDefinition(path, "", f"can't be read: {exc}")


async def _run(paths: Paths, store: fdstore.Store, *, knows_store: bool) -> None:
    await Daemon(paths, store, knows_store=knows_store).run()


def main() -> int:
    """virtd's entry point."""
    if sys.argv[1:] == ["--version"]:
        print(f"virtd {__version__}")
        return 0
    if sys.argv[1:]:
        print("usage: virtd [--version]\nvirtd is run by virtd.service; see virtd(8).", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, handlers=[journal.Handler()], format="%(message)s")
    knows_store = "FDSTORE" in os.environ
    headroom = storecheck.headroom(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    store = fdstore.Store.from_environment(fallback_max=STORE_MAX, headroom=headroom, reserve=True)
    loop = asyncio.new_event_loop()
    status = 1
    try:
        paths = Paths(os.environ.pop("VIRTD_ROOT", ""))
        loop.run_until_complete(_run(paths, store, knows_store=knows_store))
        status = 0
        with contextlib.suppress(OSError):
            os.unlink(paths.launched)
    except Exception:
        log.exception("virtd failed")
    # No clean-up: every task may be cut off at any instant anyway, and a restart waits for the last of them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
