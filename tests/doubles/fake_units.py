# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1's transient units in memory, with real children: what virtd.systemd.units does over D-Bus, without systemd.

Like PID 1 it outlives the daemon: a test keeps one FakeUnits over any number of Hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from virtd import errors
from virtd.fdstore import StoredEntry
from virtd.systemd.dumps import StoreEntries
from virtd.systemd.state import CLD_EXITED, CLD_KILLED, Listed, UnitState
from virtd.systemd.transient import Stdio, UnitSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from tests.doubles.fake_pid1 import FakePid1

FAKE_QEMU = str(Path(__file__).with_name("fake_qemu.py"))
FAKE_SWTPM = str(Path(__file__).with_name("fake_swtpm.py"))
FAKE_DNSMASQ = str(Path(__file__).with_name("fake_dnsmasq.py"))


class Unit:
    """One unit and its process."""

    def __init__(self, spec: UnitSpec, process: subprocess.Popen[bytes]) -> None:
        self.spec = spec
        self.process = process
        self.invocation_id = uuid.uuid4().hex
        self.started_at = time.time()
        self.exited_at: float | None = None
        self.oom = False
        self.restarting = False  # by somebody, who will put another in its place

    def state(self) -> UnitState:
        status = self.process.poll()
        if status is not None and self.exited_at is None:
            self.exited_at = time.time()
        code = 0 if status is None else CLD_EXITED if status >= 0 else CLD_KILLED
        failed = status not in (None, 0)
        return UnitState(
            name=self.spec.name,
            load="loaded",
            active="deactivating" if self.restarting else "failed" if failed else "active",
            sub="running" if status is None else "failed" if failed else "exited",
            result="oom-kill" if self.oom else "success" if not failed else "exit-code" if code == 1 else "signal",
            main_pid=self.process.pid if status is None else 0,
            invocation_id=self.invocation_id,
            exec_code=code,
            exec_status=abs(status or 0),
            exited_at=self.exited_at,
            description=self.spec.description,
        )


class FakeUnits:
    """What virtd's core calls of virtd.systemd.units.Units. `old`: before systemd 254, which can't dump."""

    def __init__(self, pid1: FakePid1, *, old: bool = False) -> None:
        self.units: dict[str, Unit] = {}
        self.history: list[str] = []
        self.refuse: errors.VirtdError | None = None
        self.step: Callable[[str], None] = lambda _what: None  # told before each call takes effect
        self._pid1 = pid1
        self._old = old

    async def start(self, spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], *, timeout: float = 60.0) -> UnitState:
        self.step(f"start {spec.name}")
        self.history.append(f"start {spec.name}")
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        if spec.name in self.units:
            raise errors.Exists(f"there is a unit {spec.name} already")
        program = FAKE_DNSMASQ if spec.name.startswith("virtd-network-") else FAKE_QEMU
        program = FAKE_SWTPM if spec.name.endswith("@tpm.service") else program
        # A job of a storage pool is what it says, and so is what starts LXC; every other child is made up.
        real = spec.name.startswith(("virtd-storage-", "virtd-lxc-", "virtd-create-", "virtd-toy-"))
        with contextlib.ExitStack() as files:
            stdin, stdout, stderr = (
                one
                if isinstance(one, int)
                else files.enter_context(open(one if one.startswith("/") else os.devnull, mode, buffering=0))
                for one, mode in zip(stdio, ("rb", "wb", "wb"), strict=True)
            )
            process = subprocess.Popen(  # noqa: ASYNC220 (as blocking as fork is)
                spec.argv if real else [sys.executable, "-I", "-S", program, *spec.argv[1:]],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=dict(spec.environment),
            )
        self.units[spec.name] = Unit(spec, process)
        return self.units[spec.name].state()

    async def version(self) -> int:
        return 252 if self._old else 257

    async def preserves_stores(self) -> bool:
        return not self._old

    async def state(self, name: str) -> UnitState | None:
        self.step(f"state {name}")
        await asyncio.sleep(0)
        return self.units[name].state() if name in self.units else None

    async def list(self, pattern: str) -> list[Listed]:
        self.step(f"list {pattern}")
        await asyncio.sleep(0)
        found = [unit.state() for name, unit in sorted(self.units.items()) if fnmatch.fnmatchcase(name, pattern)]
        return [Listed(state.name, state.description, state.load, state.active, state.sub) for state in found]

    async def unit_property(self, _name: str, prop: str) -> str:
        """Of mount units, of which it has none."""
        assert prop == "LoadState"
        return "not-found"

    async def ended(self, name: str, invocation_id: str = "", *, timeout: float = 10.0) -> UnitState | None:
        self.step(f"ended {name}")
        if invocation_id and name in self.units and self.units[name].invocation_id != invocation_id:
            return self.units[name].state()
        await self._over(name)
        return self.units[name].state() if name in self.units else None

    async def _over(self, name: str) -> None:
        while name in self.units and self.units[name].state().running:  # noqa: ASYNC110 (a child has no event)
            await asyncio.sleep(0.002)

    async def kill(self, name: str, signum: int, *, whole: bool = False) -> None:
        self.step(f"kill {name} {int(signum)}")
        self.history.append(f"kill {name} {int(signum)}")
        await asyncio.sleep(0)
        if name not in self.units or not self.units[name].state().running:
            raise errors.NotFound(f"{name} has no process to signal")
        self.units[name].process.send_signal(signum)

    async def stop(self, name: str, *, timeout: float = 120.0) -> None:
        self.step(f"stop {name}")
        self.history.append(f"stop {name}")
        await asyncio.sleep(0)
        if name in self.units:
            self.units[name].process.terminate()
            # Whoever is killed meanwhile: the next one finds what has ended, not what is about to.
            await self._over(name)
            self.step(f"ended {name}")
            if self.units[name].process.returncode == 0:
                del self.units[name]

    async def collect(self, name: str, *, timeout: float = 10.0) -> None:
        self.step(f"collect {name}")
        await asyncio.sleep(0)
        if name in self.units:
            if self.units[name].state().running:
                raise errors.Busy(f"{name} is still running")
            self.history.append(f"collect {name}")
            del self.units[name]

    async def store_dump(self, unit: str, names: Container[str] | None = None) -> StoreEntries | None:
        assert unit == "virtd.service"
        self.step("store_dump")
        await asyncio.sleep(0)
        entries = [StoredEntry.from_dump(entry) for entry in self._pid1.dump()]
        if self._old:
            return None
        return [(entry.name, entry.dev, entry.ino) for entry in entries if names is None or entry.name in names]

    def process(self, name: str, driver: str = "qemu") -> subprocess.Popen[bytes]:
        return self.units[f"virtd-{driver}-{name}.service"].process

    def close(self) -> None:
        for unit in self.units.values():
            unit.process.kill()
            unit.process.wait()
