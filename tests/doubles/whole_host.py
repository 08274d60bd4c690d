# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole host in a directory: real store, records, pump and pipes, with stand-ins for PID 1 and QEMU.

`World` is what outlives the daemon; `async with world.daemon() as host` is one run of it, which ends without a word
as the real one does. With `world.crash_at` set, the run is cut off before its n-th step that others could see (a
file, a message to PID 1, a call of a unit), and whatever it tries after that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from tests.doubles.fake_pid1 import FakePid1
from tests.doubles.fake_units import FakeUnits
from virtd import files, records
from virtd.children import fifos
from virtd.children.child import Services
from virtd.children.facts import Facts
from virtd.drivers.qemu import userdb
from virtd.drivers.qemu.monitor import Monitor
from virtd.fdstore import Store
from virtd.fdstore.notify import connect
from virtd.host import Caller, Host
from virtd.logs.pump import Pump
from virtd.logs.stderrlog import StderrLog
from virtd.model.settings import Log, Lxc, Qemu, Settings
from virtd.paths import Paths
from virtd.replies import Defined

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

    import pytest

    from virtd.guests.driver import GuestDriver

ROOT = Caller(uid=0, pid=os.getpid(), name="root")
P = ParamSpec("P")
VISIBLE = frozenset({"link", "unlink", "mkdir", "makedirs", "ftruncate", "fchown", "chown", "fsync", "rename"})
SLOTS = [f"qemu/web1/{slot}" for slot in ("console.log", "log", "stderr", "stdin", "stdout")]


def on_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Killed(BaseException):
    """The daemon's SIGKILL; a BaseException, so that no handler for errors mistakes it for one."""


class World:
    """PID 1, the file system and the clock, as one run of the daemon leaves them to the next."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, *, store_max: int = 1000, old: bool = False
    ) -> None:
        self.paths = Paths(str(root))
        for directory in (
            f"{self.paths.etc}/qemu",
            f"{self.paths.run}/qemu",
            f"{self.paths.log}/qemu",
            self.paths.lib,
        ):
            os.makedirs(directory)
        (root / "kernel").touch()
        self.kernel = str(root / "kernel")
        self.pid1 = FakePid1(root, store_max)
        self.units = FakeUnits(self.pid1, old=old)
        self.settings = Qemu(binary=os.path.realpath("/bin/true"), start_timeout=20, shutdown_timeout=20)
        self.lxc = Lxc(directory=f"{root}/containers", start_timeout=20, shutdown_timeout=20)
        self.limits = Log()
        self.messages: list[dict[str, str]] = []
        self.journal: dict[str, list[Any]] = {}  # by unit: what PID 1 has said of it, as witness.entries() has it
        self.dead = False
        self.crash_at = 0
        self.steps: list[str] = []
        self.host: Host | None = None
        self._sending = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Whoever runs the tests stands for every account, and nobody has KVM.
        self.facts = Facts(ids=lambda *_asked: (os.getuid(), os.getgid()), has_kvm=lambda: False)
        monkeypatch.setattr("virtd.drivers.qemu.users.known_as", self._known_as)
        monkeypatch.setattr("virtd.drivers.qemu.fsck.known_as", self._known_as)
        if os.geteuid() != 0:  # who can't give files to guests' users
            monkeypatch.setattr(os, "chown", lambda *_args: None)
            monkeypatch.setattr(os, "fchown", lambda *_args: None)
        monkeypatch.setattr("virtd.journal.send", self._journal)
        monkeypatch.setattr("virtd.children.witness.entries", lambda unit, _invocation: self.journal.get(unit, []))
        monkeypatch.setattr("virtd.children.witness.LOOKS", (0.0,))
        defaults = StderrLog.__init__.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "send", self._journal)
        self.units.step = self.step
        real = Monitor.execute

        async def execute(monitor: Monitor, command: str, *args: Any, **kwargs: Any) -> Any:
            self.step(f"qmp {command}")
            return await real(monitor, command, *args, **kwargs)

        monkeypatch.setattr(Monitor, "execute", execute)
        for module, name in ((files, "write"), (files, "remove"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self._stepping(name, getattr(module, name)))

    def step(self, what: str) -> None:
        """Called before everything that somebody outside could see."""
        if self.dead:
            raise Killed
        if self.host is None:
            return
        self.steps.append(what)
        if len(self.steps) == self.crash_at:
            self.dead = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._crashed.set)
            raise Killed

    async def unless_crashed(self, work: Awaitable[Any]) -> None:
        """Do `work`; Killed as soon as the run is cut off, wherever that was."""
        before = asyncio.all_tasks()
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._crashed.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.dead:
            # What several tasks did at once was cut off in one of them; a process that is killed ends all of them.
            others = asyncio.all_tasks() - before
            for task in others:
                # The kernel would close this connection; who cancels its closing leaves it open for ever.
                if not getattr(task.get_coro(), "__qualname__", "").endswith("._bh_disconnect"):
                    task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            raise Killed
        await tasks[0]

    def _stepping(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(self.paths.root):
                self.step(f"{what} {os.path.basename(path)}")
            return function(path, *args, **kwargs)

        return call

    def _journal(self, text: str, *, message_id: str = "", level: str = "info", **fields: str) -> None:
        self.messages.append({"text": text, "id": message_id, "level": level} | fields)

    def _known_as(self, uid: int) -> str | None:
        """What NSS says, which goes by the records."""
        with contextlib.suppress(OSError):
            return os.readlink(f"{self.paths.userdb}/{uid}.user").removesuffix(".user")
        return None

    def told(self, message_id: str) -> list[dict[str, str]]:
        return [message for message in self.messages if message["id"] == message_id]

    def close(self) -> None:
        self.units.close()
        self.pid1.close()

    # What a person does

    def text(self, name: str, cmdline: str = "", more: str = "") -> str:
        """A definition; `cmdline` steers the fake QEMU, `more` is TOML for the top of the file."""
        return (
            f'name = "{name}"\nmemory = "64M"\n{more}\n[boot]\nkernel = "{self.kernel}"\ncmdline = "fake {cmdline}"\n'
        )

    async def define(self, name: str, cmdline: str = "", more: str = "") -> Defined:
        assert self.host is not None
        return await self.host.domains.define(self.text(name, cmdline, more), "test", check=False, by=ROOT)

    async def run(self, name: str, cmdline: str = "", more: str = "") -> int:
        """Define and start; the guest's PID."""
        assert self.host is not None
        await self.define(name, cmdline, more)
        return int((await self.host.domains.start(name, by=ROOT))["pid"])

    def type(self, name: str, line: str, driver: str = "qemu") -> None:
        """Type a line on a guest's console."""
        assert self.host is not None
        child = self.guests(driver).machines[name].child
        assert child is not None
        os.write(child.stdin(), f"{line}\n".encode())

    def guests(self, driver: str) -> GuestDriver[Any, Any]:
        assert self.host is not None
        return cast("GuestDriver[Any, Any]", self.host.use(driver))

    # One run of the daemon

    @contextlib.asynccontextmanager
    async def daemon(self, *, reconcile: bool = True) -> AsyncIterator[Host]:
        self.dead = False
        self.steps = []
        self._crashed = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        transport = connect(self.pid1.path)

        def send(text: str, fds: Sequence[int] = ()) -> None:
            self.step(text.replace("\n", " "))
            with self._sending:  # the pump's thread sends, too
                transport(text, fds)
                self.pid1.read()

        store = Store.from_environment(
            {"FDSTORE": str(self.pid1.store_max)}, inherited=self.pid1.hand_over(), notify=send
        )

        def grown(key: str) -> None:
            with contextlib.suppress(Killed):  # the run is cut off all the same, see `step`
                host.grown(key)

        pump = Pump(loop.call_soon_threadsafe, on_bytes=grown)
        settings = Settings(qemu=self.settings, lxc=self.lxc)
        services = Services(self.paths, store, pump, self.limits, self._get_units, facts=self.facts)
        host = Host(services, settings)
        self.host = host
        try:
            host.restore(time.monotonic())
            pump.start()
            if reconcile:
                await host.reconcile()
            yield host
        except Killed:
            pass
        finally:
            self.dead = True
            await host.close()
            # A thread of its own that got no turn before would act for the dead in the next daemon's time.
            for thread in threading.enumerate():
                if thread.name == "storage":
                    thread.join(5)
            pump.close()
            store.close()
            self.host = None
            self.crash_at = 0

    async def _get_units(self) -> Any:
        return self.units

    # What is left

    def slots(self) -> list[str]:
        return self.pid1.names()

    def record(self, name: str, driver: str = "qemu") -> records.Record:
        with open(self.paths.record(driver, name), "rb") as file:
            return records.decode(file.read())

    def console(self, name: str, driver: str = "qemu") -> str:
        with open(self.paths.console_log(driver, name), encoding="utf-8") as file:
            return file.read()

    def runtime_left(self, name: str, driver: str = "qemu") -> bool:
        return os.path.exists(self.paths.runtime(driver, name))


async def until(condition: Any, what: str = "it") -> None:
    """Wait for what must come; the run's own time limit ends a test in which it doesn't."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what is waited for is in other processes)
            await asyncio.sleep(0.005)


class SteppingOs:
    """The os module of one that changes the host: each change that others could see is a step of the world's."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name == "open":
            return self._open
        if name not in VISIBLE:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self._world.step(f"{name} {args[0]}")
            return function(*args, **kwargs)

        return call

    def _open(self, path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            self._world.step(f"create {path}")
        return os.open(path, flags, *args, **kwargs)


def nothing_left(world: World, name: str = "web1", driver: str = "qemu") -> None:
    """What an ended guest must leave: its record and its logs, and nothing else."""
    assert [slot for slot in world.slots() if slot.startswith(f"{driver}/{name}/")] == []
    assert f"virtd-{driver}-{name}.service" not in world.units.units
    assert not world.runtime_left(name, driver)
    for directory in (world.paths.fifos(), world.paths.aliases()):
        assert (driver, name) not in fifos.owners(directory)
    assert driver != "qemu" or f"vm-{name}.user" not in userdb.listing(world.paths.userdb)
    record = world.record(name, driver)
    assert (record.unit, record.slots, record.main_pid, record.data) == ("", {}, 0, {})
