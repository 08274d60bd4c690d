# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transient service units over systemd's D-Bus interface, org.freedesktop.systemd1(5), of systemd 252 and later.

Each child is such a unit, so PID 1 is its parent: it outlives this process, and its exit status stays readable until
`collect`, however late that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from typing import TYPE_CHECKING, Any

from .. import errors
from . import aliases
from .bus import PATIENCE, BusError, Var
from .dumps import Dumps
from .jobs import JobSignals, Patience
from .names import MANAGER, MANAGER_PATH, PROPERTIES, SERVICE, SYSTEMD, UNIT, object_path
from .repeating import repeated
from .state import SERVICE_PROPERTIES, UNIT_PROPERTIES, Listed, StartFailed, UnitState, failure, parse_state
from .transient import Stdio, UnitSpec, transient_properties

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from .bus import Bus
    from .dumps import StoreEntries

STORE_SINCE = 254  # an FD store that is kept while its service is stopped, and that can be inspected


class Units:
    """Starts, watches, stops and collects transient units over one Bus. A new Bus needs a new one."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._jobs = JobSignals(bus)
        self._dumps = Dumps(bus)
        self._version = 0

    async def version(self) -> int:
        """systemd's: 257."""
        if not self._version:
            text = await self._property(MANAGER_PATH, MANAGER, "Version")
            # "257.13-1~deb13u1", "v258" or, built from git, "257-rc3-12-gabcdef".
            match = re.match(r"v?(\d+)", str(text))
            self._version = int(match[1]) if match else 0
        return self._version

    async def preserves_stores(self) -> bool:
        """Whether an FD store can outlive a stop of its service, and can be inspected."""
        return await self.version() >= STORE_SINCE

    @property
    def bus(self) -> Bus:
        """The connection, for other uses."""
        return self._bus

    async def start(self, spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], *, timeout: float = 60.0) -> UnitState:
        """Start a unit with `stdio`, which the caller still owns, as standard input, output and error; await the
        exec.

        It is not an error if the child ends at once after its start: the returned state says so.

        Raises Exists (there is a unit of that name, perhaps only its remains), StartFailed, TimedOut, or HostError if
        systemd refuses a property.
        """
        wanted, odd = aliases.harmless(transient_properties(spec, stdio, await self.version()), spec.aliases)
        if odd:
            aliases.make(spec.aliases, odd)
        properties = [(key, Var(signature, value)) for key, signature, value in wanted]
        try:
            async with self._jobs.of(spec.name) as jobs:
                asked = _once(spec.name, properties) if spec.once else (spec.name, "fail", properties, [])
                (job,) = await self._start(asked, tuple(one for one in stdio if isinstance(one, int)))
                result = await jobs.wait(None if spec.once else job, timeout)
        except BusError as exc:
            if exc.name == f"{SYSTEMD}.UnitExists":
                raise errors.Exists(
                    f"there is a unit {spec.name} already", hint=f"See: systemctl status {spec.name}"
                ) from exc
            raise errors.HostError(f"systemd refused to start {spec.name}: {exc.message}") from exc
        state = await self.state(spec.name)
        if result != "done":
            raise StartFailed(
                failure(spec.argv[0], result, state), hint=f"See: journalctl -u {spec.name}", state=state
            )
        if state is None:
            raise StartFailed(f"{spec.name} vanished right after its start")
        return state

    async def start_other(
        self, name: str, properties: tuple[tuple[str, str, Any], ...], *, timeout: float = 60.0
    ) -> str:
        """Start a transient unit that isn't a service. Returns the result of its job, "done" for success. Raises
        BusError."""
        async with self._jobs.of(name) as jobs:
            values = [(key, Var(signature, value)) for key, signature, value in properties]
            (job,) = await self._start((name, "fail", values, []))
            return await jobs.wait(job, timeout)

    async def state(self, name: str) -> UnitState | None:
        """The unit's state, or None if systemd has no such unit loaded."""
        path = object_path(name)
        while True:
            # Both at once: one round trip. PID 1 answers one and then the other, so the unit can end between the two.
            unit, service = await asyncio.gather(
                repeated(lambda: self._bus.properties(SYSTEMD, path, UNIT, UNIT_PROPERTIES)),
                repeated(lambda: self._bus.properties(SYSTEMD, path, SERVICE, SERVICE_PROPERTIES)),
            )
            if unit["SubState"] != "running" or service["MainPID"] != 0:
                break
        # Asking for a unit by its path makes systemd try to load it, so there is always an answer.
        if unit["LoadState"] == "not-found" and unit["ActiveState"] == "inactive":
            return None
        return parse_state(name, unit | service)

    async def list(self, pattern: str) -> list[Listed]:
        """The loaded units whose names match a glob, in one call."""
        (units,) = await repeated(lambda: self._call("ListUnitsByPatterns", "asas", ([], [pattern])))
        return [Listed(*unit[:5]) for unit in units]

    async def ended(self, name: str, invocation_id: str = "", *, timeout: float = 10.0) -> UnitState | None:
        """The state after the main process has ended. None: the unit is gone, and with it all information.

        For use when the end is already known, from a pidfd or an EOF: PID 1 learns of it at the same time as we do.
        With `invocation_id` only this run counts; the returned state is running if somebody has started the unit
        again.
        """
        patience = Patience(timeout, f"systemd did not notice the end of {name}")
        while (state := await self.state(name)) is not None and state.running:
            if invocation_id and state.invocation_id != invocation_id:
                break
            await patience.pause()
        return state

    async def stop(self, name: str, *, timeout: float = 120.0) -> None:
        """Stop the unit according to its KillMode= and timeouts, and wait for it. A unit that doesn't exist counts as
        stopped."""
        async with self._jobs.of(name) as jobs:
            try:
                (job,) = await repeated(lambda: self._call("StopUnit", "ss", (name, "replace")))
            except BusError as exc:
                if exc.name == f"{SYSTEMD}.NoSuchUnit":
                    return
                raise
            result = await jobs.wait(job, timeout)
        if result not in ("done", "canceled"):
            raise errors.HostError(f"systemd could not stop {name}: {result}", hint=f"See: systemctl status {name}")

    async def kill(self, name: str, signum: int, *, whole: bool = False) -> None:
        """Send a signal to the main process, or to all of the unit's processes. Raises NotFound if there is none."""
        try:
            asked = (name, "all" if whole else "main", signum)
            await repeated(lambda: self._call("KillUnit", "ssi", asked), twice=False)
        except BusError as exc:
            if exc.name in (f"{SYSTEMD}.NoSuchUnit", f"{SYSTEMD}.NoSuchProcess"):
                raise errors.NotFound(f"{name} has no process to signal") from exc
            raise

    async def collect(self, name: str, *, timeout: float = 10.0) -> None:
        """Make systemd forget a unit whose process has ended, together with its exit status.

        Raises Busy if the process is running.
        """
        patience = Patience(timeout, f"systemd did not unload {name}")
        while units := await self.list(name):
            active, sub = units[0].active, units[0].sub
            if active == "failed":
                with contextlib.suppress(BusError):
                    await self.reset_failed(name)
            elif sub == "exited":
                await self.stop(name)
            elif active in ("active", "activating", "reloading"):
                raise errors.Busy(f"{name} is still running", hint=f"See: systemctl status {name}")
            # A unit that is deactivating, or dead but not unloaded yet, only takes a moment.
            await patience.pause()

    async def reset_failed(self, name: str) -> None:
        """Make systemd forget the unit's past failures, and how often it was restarted because of them."""
        await repeated(lambda: self._call("ResetFailedUnit", "s", (name,)))

    async def store_dump(self, unit: str, names: Container[str] | None = None) -> StoreEntries | None:
        """The entries of a unit's FD store in PID 1, or only those of `names`: (name, device, inode) each.

        None: systemd is older than 254. Concurrent callers share an answer, see dumps.py.
        """
        return await self._dumps.get(unit, names)

    async def on_reloaded(self, call: Callable[[], object]) -> None:
        """Have `call()` called whenever systemd has reloaded its units, by a daemon-reload or a daemon-reexec."""

        def reloading(_path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
            if not args[0]:
                call()

        await self._jobs.subscribe()
        await self._bus.subscribe(SYSTEMD, MANAGER, "Reloading", MANAGER_PATH, reloading)

    async def store_count(self, unit: str) -> int:
        """How many descriptors are in a unit's FD store; systemd 252 and 253 can tell no more."""
        return int(await self.service_property(unit, "NFileDescriptorStore"))

    async def service_property(self, unit: str, name: str) -> Any:
        """One property of org.freedesktop.systemd1.Service."""
        return await self._property(object_path(unit), SERVICE, name)

    async def unit_property(self, unit: str, name: str) -> Any:
        """One property of org.freedesktop.systemd1.Unit, which every kind of unit has."""
        return await self._property(object_path(unit), UNIT, name)

    async def close(self) -> None:
        """End the subscription; the Bus stays open."""
        await self._jobs.close()

    async def _start(self, asked: tuple[Any, ...], fds: tuple[int, ...] = ()) -> tuple[Any, ...]:
        return await repeated(
            lambda: self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", asked, fds=fds), twice=False
        )

    async def _property(self, path: str, interface: str, name: str) -> Any:
        (value,) = await repeated(lambda: self._bus.call(SYSTEMD, path, PROPERTIES, "Get", "ss", (interface, name)))
        return value

    async def _call(
        self,
        method: str,
        signature: str,
        args: tuple[Any, ...],
        *,
        fds: tuple[int, ...] = (),
        timeout: float = PATIENCE,
    ) -> tuple[Any, ...]:
        return await self._bus.call(SYSTEMD, MANAGER_PATH, MANAGER, method, signature, args, fds=fds, timeout=timeout)


def _once(name: str, properties: list[tuple[str, Var]]) -> tuple[Any, ...]:
    """The arguments that start a service which nobody can start or restart by hand, which StartTransientUnit can't do
    either.

    So it is started as a dependency of a slice, the cheapest kind of unit, which goes away at once.
    """
    starter = [
        ("Requires", Var("as", [name])),
        ("DefaultDependencies", Var("b", False)),
        ("StopWhenUnneeded", Var("b", True)),
        ("CollectMode", Var("s", "inactive-or-failed")),
    ]
    service = [*properties, ("RefuseManualStart", Var("b", True))]
    return (f"virtd_start_{uuid.uuid4().hex}.slice", "fail", starter, [(name, service)])
