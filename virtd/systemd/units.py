# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transient service units over systemd's D-Bus interface, org.freedesktop.systemd1(5), of systemd 252 and later.

Each child is one such unit, so PID 1 is its parent: it outlives this process, and its exit status stays readable,
however long nobody asks, until `collect`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from .. import errors
from . import aliases
from .bus import BusError, Var
from .jobs import Jobs, Patience

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator

    from ..hints import Hint
    from .bus import Bus, Table

SYSTEMD: Final = "org.freedesktop.systemd1"
MANAGER_PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
UNIT: Final = "org.freedesktop.systemd1.Unit"
SERVICE: Final = "org.freedesktop.systemd1.Service"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

# What waitid(2) calls the ways to end, as ExecMainCode has them.
CLD_EXITED: Final = 1
CLD_KILLED: Final = 2
CLD_DUMPED: Final = 3

MAX_UNIT_NAME: Final = 255

# The ends of a host that are a child's end as well. Not shutdown.target, what every service is stopped by otherwise:
# a soft reboot comes by there too, and children live through that.
FINAL_TARGETS: Final = ("poweroff.target", "reboot.target", "halt.target", "kexec.target")
# When the host goes down, all that is Before= this target stays until the children have ended: virtd itself,
# networks, mounts. See units/virtd-guests-pre.target.
GROUND: Final = "virtd-guests-pre.target"
STORE_SINCE: Final = 254  # an FD store that is kept while its service is stopped, and can be looked into
SURVIVAL_SINCE: Final = 255  # SurviveFinalKillSignal=; soft reboots themselves are of 254

# What a child's standard input, output or error is to be: a descriptor, or a path that systemd opens. PID 1 keeps a
# descriptor until the unit ends (see fifos.py), so a path is better for what lives long.
Stdio: TypeAlias = int | str

# Name, device and inode of each descriptor in an FD store.
StoreEntries: TypeAlias = list[tuple[str, int, int]]

EXIT_GROUP: Final = 216
EXIT_USER: Final = 217
# systemd's exit statuses for what goes wrong between fork and exec, systemd.exec(5). {path} is the program.
EXEC_STATUS: Final = {
    200: ("CHDIR", "cannot change to the working directory"),
    202: ("FDS", "cannot set up the file descriptors"),
    203: ("EXEC", "cannot execute {path}: the program is missing or not executable"),
    205: ("LIMITS", "cannot set the resource limits"),
    208: ("STDIN", "cannot set up standard input"),
    209: ("STDOUT", "cannot set up standard output"),
    EXIT_GROUP: ("GROUP", "cannot change to the group"),
    EXIT_USER: ("USER", "cannot change to the user: does it exist?"),
    218: ("CAPABILITIES", "cannot drop capabilities"),
    219: ("CGROUP", "cannot set up the control group"),
    222: ("STDERR", "cannot set up standard error"),
    225: ("NETWORK", "cannot set up the network namespace"),
    226: ("NAMESPACE", "cannot set up the mount namespace: does every path it is to see exist?"),
    227: ("NO_NEW_PRIVILEGES", "cannot disable new privileges"),
    228: ("SECCOMP", "cannot apply the system call filter"),
    229: ("SELINUX_CONTEXT", "cannot set the SELinux context"),
    231: ("APPARMOR_PROFILE", "cannot change to the AppArmor profile"),
    233: ("RUNTIME_DIRECTORY", "cannot set up the runtime directory"),
    238: ("STATE_DIRECTORY", "cannot set up the state directory"),
    240: ("LOGS_DIRECTORY", "cannot set up the log directory"),
    243: ("CREDENTIALS", "cannot set up the credentials"),
}


class UnitSpec(msgspec.Struct, frozen=True):
    """What a child's unit shall be. `environment` is all that the child gets, besides what systemd itself sets.

    `properties` are more of them, for the sandbox and limits: (D-Bus name, signature, value). `after`: units, mounts
    for example, that stay until the child has ended when the host goes down; they need not exist. `ground`: other
    children stand on this one, and it stays until the last of them has ended. None of them names it: systemd keeps a
    unit loaded that a loaded unit names, so it couldn't be collected, nor started again, while one of them runs.
    `once`: nobody else can start it again, or restart it. `aliases`: the directory for those of odd paths in
    `properties`, of this unit alone; it is to be there until the unit has ended.
    """

    name: str
    description: str
    slice: str
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    user: str = ""
    group: str = ""
    supplementary_groups: tuple[str, ...] = ()
    properties: tuple[tuple[str, str, Any], ...] = ()
    after: tuple[str, ...] = ()
    ground: bool = False
    once: bool = False
    aliases: str = ""


class UnitState(msgspec.Struct, frozen=True):
    """A unit as PID 1 sees it.

    `load`, `active`, `sub` and `result` are systemd's words. `main_pid` is 0 when no process runs. `exec_code` is one
    of CLD_EXITED, CLD_KILLED, CLD_DUMPED, or 0 while the main process runs, and `exec_status` the exit status or the
    signal. Times are seconds since the epoch. `invocation_id` is 32 hex digits, or empty before the first start.
    """

    name: str
    load: str
    active: str
    sub: str
    result: str
    main_pid: int
    invocation_id: str
    exec_code: int
    exec_status: int
    started_at: float | None
    exited_at: float | None
    description: str
    job: int = 0  # of one that is queued for it

    @property
    def running(self) -> bool:
        """Whether the main process is there; a unit that is being stopped counts while it is."""
        return self.main_pid > 0

    @property
    def unknown(self) -> bool:
        """Whether it has failed, and nothing is known of how its main process ended."""
        return self.exec_code == 0 and self.result not in ("", "success")


class Listed(NamedTuple):
    """One line of `list`: what a single call tells about many units."""

    name: str
    description: str
    load: str
    active: str
    sub: str


class StartFailed(errors.StartFailed):
    """systemd could not start the unit; `state` is what is left of it, to be collected (None: nothing is)."""

    def __init__(self, message: str, *, hint: Hint = "", state: UnitState | None = None) -> None:
        super().__init__(message, hint=hint)
        self.state = state


# Names


def unit_name(driver: str, name: str) -> str:
    """The unit of an object. Names of objects (letters, digits, `.`, `_`, `-`) need no escaping in a unit's name."""
    unit = f"virtd-{driver}-{name}.service"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or len(unit) > MAX_UNIT_NAME:
        raise ValueError(f"{name!r} can't be part of a unit's name")
    return unit


def object_name(driver: str, unit: str) -> str | None:
    """The inverse of `unit_name`; None for a unit that isn't of this driver."""
    match = re.fullmatch(rf"virtd-{re.escape(driver)}-([A-Za-z0-9._-]+)\.service", unit)
    return match[1] if match else None


def object_path(unit: str) -> str:
    """The unit's D-Bus path, escaped as sd_bus_path_encode(3) does it."""
    return f"{MANAGER_PATH}/unit/{escape_label(unit)}"


def escape_label(text: str) -> str:
    """One element of a D-Bus path: `_` and two hex digits for each byte but letters and, later than first, digits."""
    return "_" if not text else re.sub(rb"[^A-Za-z0-9]|^[0-9]", lambda m: b"_%02x" % m[0][0], text.encode()).decode()


def mount_units(path: str) -> list[str]:
    """The mount units that `path` may be on, if they exist: one for each directory above it, systemd.mount(5)."""
    parts = path.strip("/").split("/")[:-1]
    return [mount_unit("/".join(parts[:count])) for count in range(1, len(parts) + 1)]


def mount_unit(path: str) -> str:
    """The unit of a mount point, systemd.unit(5): "/" becomes "-", and what would be ambiguous \\xNN."""
    escaped = re.sub(rb"[^A-Za-z0-9:_./]|^\.", lambda match: b"\\x%02x" % match[0][0], os.fsencode(path.strip("/")))
    return f"{escaped.replace(b'/', b'-').decode() or '-'}.mount"


def unescape_label(label: str) -> str:
    """The inverse of `escape_label`; ValueError for what it can't have made."""
    text = (
        ""
        if label == "_"
        else re.sub(rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), label.encode()).decode(errors="replace")
    )
    if escape_label(text) != label:
        raise ValueError(f"{label!r} is not an escaped name")
    return text


class Units:
    """Starts, watches, stops and collects transient units over one Bus. Make a new one for a new Bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._watchers: dict[str, list[Jobs]] = {}
        self._subscribing: asyncio.Future[None] | None = None
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None
        self._next_dump: dict[str, asyncio.Future[Table | None]] = {}
        self._dumping = asyncio.Lock()
        self._version = 0

    async def version(self) -> int:
        """systemd's: 257."""
        if not self._version:
            (text,) = await self._bus.call(SYSTEMD, MANAGER_PATH, PROPERTIES, "Get", "ss", (MANAGER, "Version"))
            # "257.13-1~deb13u1", "v258" or, built from git, "257-rc3-12-gabcdef".
            match = re.match(r"v?(\d+)", str(text))
            self._version = int(match[1]) if match else 0
        return self._version

    @property
    def bus(self) -> Bus:
        """The connection, for what else there is on it."""
        return self._bus

    async def start(self, spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], *, timeout: float = 60.0) -> UnitState:
        """Start a unit whose standard input, output and error are `stdio`, which stay the caller's; await the exec.

        A child that was started and ended at once is no error here: the returned state says so.

        Raises Exists (a unit of that name is there, perhaps only its remains), StartFailed, TimedOut, or HostError
        when systemd refuses a property.
        """
        wanted, odd = aliases.harmless(transient_properties(spec, stdio, await self.version()), spec.aliases)
        if odd:
            aliases.make(spec.aliases, odd)
        properties = [(key, Var(signature, value)) for key, signature, value in wanted]
        try:
            with self._watch(spec.name) as jobs:
                await self._subscribed()
                (job,) = await self._call(
                    "StartTransientUnit",
                    "ssa(sv)a(sa(sv))",
                    _for_once(spec.name, properties) if spec.once else (spec.name, "fail", properties, []),
                    fds=tuple(one for one in stdio if isinstance(one, int)),
                    timeout=timeout,
                )
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
        """Start a transient unit that isn't a service: how its job ended, "done" if well. Raises BusError."""
        with self._watch(name) as jobs:
            await self._subscribed()
            values = [(key, Var(signature, value)) for key, signature, value in properties]
            (job,) = await self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", values, []))
            return await jobs.wait(job, timeout)

    async def state(self, name: str) -> UnitState | None:
        """The unit's state, or None when systemd has no such unit loaded."""
        path = object_path(name)
        while True:
            # Both at once: one round trip. PID 1 answers one and then the other, so an end can fall between the two.
            unit, service = await asyncio.gather(
                self._bus.properties(SYSTEMD, path, UNIT, UNIT_PROPERTIES),
                self._bus.properties(SYSTEMD, path, SERVICE, SERVICE_PROPERTIES),
            )
            if unit["SubState"] != "running" or service["MainPID"] != 0:
                break
        # To ask for a unit by its path makes systemd try to load it, so there is always an answer.
        if unit["LoadState"] == "not-found" and unit["ActiveState"] == "inactive":
            return None
        return parse_state(name, unit | service)

    async def list(self, pattern: str) -> list[Listed]:
        """The loaded units whose names match a glob, in one call."""
        (units,) = await self._call("ListUnitsByPatterns", "asas", ([], [pattern]))
        return [Listed(*unit[:5]) for unit in units]

    async def ended(self, name: str, invocation_id: str = "", *, timeout: float = 10.0) -> UnitState | None:
        """The state after the main process has ended. None: the unit is gone, and with it whatever it could tell.

        For when the end is known already, from a pidfd or an EOF: PID 1 learns of it at the same time as we do. With
        `invocation_id` that of this run is meant; what comes back runs if somebody has started the unit again.
        """
        patience = Patience(timeout, f"systemd did not notice the end of {name}")
        while (state := await self.state(name)) is not None and state.running:
            if invocation_id and state.invocation_id != invocation_id:
                break
            await patience.pause()
        return state

    async def stop(self, name: str, *, timeout: float = 120.0) -> None:
        """Stop the unit by its KillMode= and timeouts, and wait for it. One that isn't there counts as stopped."""
        with self._watch(name) as jobs:
            await self._subscribed()
            try:
                (job,) = await self._call("StopUnit", "ss", (name, "replace"))
            except BusError as exc:
                if exc.name == f"{SYSTEMD}.NoSuchUnit":
                    return
                raise
            result = await jobs.wait(job, timeout)
        if result not in ("done", "canceled"):
            raise errors.HostError(f"systemd could not stop {name}: {result}", hint=f"See: systemctl status {name}")

    async def kill(self, name: str, signum: int, *, whole: bool = False) -> None:
        """Send a signal to the main process, or to all of the unit's. Raises NotFound when there is none."""
        try:
            await self._call("KillUnit", "ssi", (name, "all" if whole else "main", signum))
        except BusError as exc:
            if exc.name in (f"{SYSTEMD}.NoSuchUnit", f"{SYSTEMD}.NoSuchProcess"):
                raise errors.NotFound(f"{name} has no process to signal") from exc
            raise

    async def collect(self, name: str, *, timeout: float = 10.0) -> None:
        """Have systemd forget a unit whose process has ended; its exit status is gone afterwards.

        Raises Busy when the process runs.
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
            # What is deactivating, or dead but not unloaded yet, only takes a moment.
            await patience.pause()

    async def reset_failed(self, name: str) -> None:
        """Have systemd forget its past failures, and how often it was restarted because of them."""
        await self._call("ResetFailedUnit", "s", (name,))

    async def store_dump(self, unit: str, names: Container[str] | None = None) -> StoreEntries | None:
        """What PID 1 holds in a unit's FD store, or what it holds there of `names`: (name, device, inode) each.

        None: systemd is older than 254. When many ask at once (guests being started) they share an answer, which is
        asked for after the last of them came: it has an entry for every slot of every guest.
        """
        dump = self._next_dump.get(unit)
        if dump is None:
            dump = self._next_dump[unit] = asyncio.ensure_future(self._dump(unit))
        table = await asyncio.shield(dump)
        if table is None:
            return None
        # Of (name, mode, major, minor, inode, ...).
        found = table.rows((0, 2, 3, 4), names)
        return [(name, os.makedev(major, minor), inode) for name, major, minor, inode in found]

    async def _dump(self, unit: str) -> Table | None:
        async with self._dumping:
            del self._next_dump[unit]  # whoever comes from here on needs a later one
            return await self._ask_for_dump(unit)

    async def _ask_for_dump(self, unit: str) -> Table | None:
        try:
            return await self._bus.table(SYSTEMD, MANAGER_PATH, MANAGER, "DumpUnitFileDescriptorStore", "s", (unit,))
        except BusError as exc:
            if exc.name in ("org.freedesktop.DBus.Error.UnknownMethod", f"{SYSTEMD}.NoSuchUnit"):
                return None
            raise

    async def on_reloaded(self, call: Callable[[], object]) -> None:
        """Have `call()` called whenever systemd has read its units again, by a daemon-reload or a daemon-reexec."""

        def reloading(_path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
            if not args[0]:
                call()

        await self._subscribed()
        await self._bus.subscribe(SYSTEMD, MANAGER, "Reloading", MANAGER_PATH, reloading)

    async def store_count(self, unit: str) -> int:
        """How many descriptors are in a unit's FD store; all that systemd 252 and 253 can tell."""
        return int(await self.service_property(unit, "NFileDescriptorStore"))

    async def service_property(self, unit: str, name: str) -> Any:
        """One property of org.freedesktop.systemd1.Service."""
        (value,) = await self._bus.call(SYSTEMD, object_path(unit), PROPERTIES, "Get", "ss", (SERVICE, name))
        return value

    async def unit_property(self, unit: str, name: str) -> Any:
        """One property of org.freedesktop.systemd1.Unit, which every kind of unit has."""
        (value,) = await self._bus.call(SYSTEMD, object_path(unit), PROPERTIES, "Get", "ss", (UNIT, name))
        return value

    async def close(self) -> None:
        """End the subscription; the Bus stays open."""
        if self._unsubscribe is not None:
            await self._unsubscribe()
            self._unsubscribe = None

    async def _call(
        self,
        method: str,
        signature: str,
        args: tuple[Any, ...],
        *,
        fds: tuple[int, ...] = (),
        timeout: float = 25.0,
    ) -> tuple[Any, ...]:
        return await self._bus.call(SYSTEMD, MANAGER_PATH, MANAGER, method, signature, args, fds=fds, timeout=timeout)

    # Jobs

    async def _subscribed(self) -> None:
        """Ask for the signals once, however many starts come at the same time."""
        if self._subscribing is None or (self._subscribing.done() and self._subscribing.exception() is not None):
            self._subscribing = asyncio.ensure_future(self._subscribe())
        # Shielded: the first caller may be cancelled while others wait for the same thing.
        await asyncio.shield(self._subscribing)

    async def _subscribe(self) -> None:
        self._unsubscribe = await self._bus.subscribe(SYSTEMD, MANAGER, "JobRemoved", MANAGER_PATH, self._job_removed)
        with contextlib.suppress(BusError):  # AlreadySubscribed
            await self._call("Subscribe", "", ())

    def _job_removed(self, _path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
        _number, job, unit, result = args
        for jobs in self._watchers.get(unit, ()):
            jobs.removed(job, result)

    @contextlib.contextmanager
    def _watch(self, unit: str) -> Iterator[Jobs]:
        """Note what becomes of a unit's jobs from now on: the signal can be here before we know the job's path."""
        jobs = Jobs(unit)
        watchers = self._watchers.setdefault(unit, [])
        watchers.append(jobs)
        try:
            yield jobs
        finally:
            watchers.remove(jobs)
            if not watchers:
                self._watchers.pop(unit, None)


# Properties

UNIT_PROPERTIES: Final = ("LoadState", "ActiveState", "SubState", "InvocationID", "Description", "Job")
SERVICE_PROPERTIES: Final = (
    "MainPID",
    "Result",
    "ExecMainCode",
    "ExecMainStatus",
    "ExecMainStartTimestamp",
    "ExecMainExitTimestamp",
)


def transient_properties(spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], version: int) -> list[aliases.Property]:
    """The properties for StartTransientUnit of that systemd; its message has the descriptors of `stdio`, in order."""
    found: list[aliases.Property] = [
        ("Description", "s", spec.description),
        ("Slice", "s", spec.slice),
        # "exec": the job is done when the program runs, and fails when it can't.
        ("Type", "s", "exec"),
        # systemd.service(5), "Command lines": a "$" is doubled, or what follows it is taken for a variable's name.
        ("ExecStart", "a(sasb)", [(spec.argv[0], [word.replace("$", "$$") for word in spec.argv], False)]),
        # An exit status stays readable until collected: a success by this, a failure by CollectMode=inactive.
        ("RemainAfterExit", "b", True),
        ("KillMode", "s", "mixed"),
        ("Environment", "as", [f"{key}={value}" for key, value in spec.environment]),
        # A soft reboot ends all but what says this; a real end of the host ends the child first of all.
        ("DefaultDependencies", "b", False),
        ("IgnoreOnIsolate", "b", True),
        ("Conflicts", "as", list(FINAL_TARGETS)),
        ("Before", "as", [*FINAL_TARGETS, GROUND] if spec.ground else list(FINAL_TARGETS)),
        ("After", "as", list(spec.after) if spec.ground else [GROUND, *spec.after]),
    ]
    if version >= SURVIVAL_SINCE:
        found.append(("SurviveFinalKillSignal", "b", True))
    if spec.user:
        found.append(("User", "s", spec.user))
    if spec.group:
        found.append(("Group", "s", spec.group))
    if spec.supplementary_groups:
        found.append(("SupplementaryGroups", "as", list(spec.supplementary_groups)))
    found += spec.properties
    number = 0
    for which, one in zip(("Input", "Output", "Error"), stdio, strict=True):
        if isinstance(one, str):
            found.append((f"Standard{which}File", "s", one))
        else:
            found.append((f"Standard{which}FileDescriptor", "h", number))
            number += 1
    return found


def _for_once(name: str, properties: list[tuple[str, Var]]) -> tuple[Any, ...]:
    """The arguments that start a service which nobody can start by hand, nor restart: StartTransientUnit neither.

    So it is a dependency of a slice, the cheapest kind of unit, which goes away in the same instant.
    """
    starter = [
        ("Requires", Var("as", [name])),
        ("DefaultDependencies", Var("b", False)),
        ("StopWhenUnneeded", Var("b", True)),
        ("CollectMode", Var("s", "inactive-or-failed")),
    ]
    service = [*properties, ("RefuseManualStart", Var("b", True))]
    return (f"virtd_start_{uuid.uuid4().hex}.slice", "fail", starter, [(name, service)])


def parse_state(name: str, properties: dict[str, Any]) -> UnitState:
    """A UnitState from the properties of both interfaces."""
    return UnitState(
        name=name,
        load=properties["LoadState"],
        active=properties["ActiveState"],
        sub=properties["SubState"],
        result=properties["Result"],
        main_pid=properties["MainPID"],
        invocation_id=bytes(properties["InvocationID"]).hex(),
        exec_code=properties["ExecMainCode"],
        exec_status=properties["ExecMainStatus"],
        started_at=_seconds(properties["ExecMainStartTimestamp"]),
        exited_at=_seconds(properties["ExecMainExitTimestamp"]),
        description=properties["Description"],
        job=properties["Job"][0],
    )


def _seconds(microseconds: int) -> float | None:
    return microseconds / 1e6 if microseconds else None


def failure(program: str, job: str, state: UnitState | None) -> str:
    """Why a start failed, in words, from the job's result and what is left of the unit."""
    if state is None:
        return f"systemd could not start the unit: {job}"
    if state.exec_code == CLD_EXITED and state.exec_status in EXEC_STATUS:
        word, text = EXEC_STATUS[state.exec_status]
        return f"{text.format(path=program)} (status {state.exec_status}/{word})"
    if state.exec_code == CLD_EXITED and state.exec_status:
        return f"{program} exited with status {state.exec_status}"
    if state.exec_code in (CLD_KILLED, CLD_DUMPED):
        return f"{program} was killed by {signal_name(state.exec_status)}"
    return f"systemd could not start the unit: {job}, {state.result}"


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 99" for one that Python doesn't know."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
