# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus front end: org.virtd1, with an object for each domain under an ObjectManager.

    /org/virtd1                 org.virtd1.Manager
    /org/virtd1/domain/<name>   org.virtd1.Domain; the name is escaped as sd_bus_path_encode(3) does it

Reading is for everybody, changing for root. An error's name is org.virtd1.Error.<class of virtd.errors>.
"""

from __future__ import annotations

import asyncio
import logging
import pwd
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import __version__, errors
from ..bus import DBUS, DBUS_PATH, Bus, MethodCall, Var
from ..host import Caller
from ..units import escape_label, unescape_label, unit_name
from .introspection import (
    DOMAIN,
    INTERFACES,
    INTROSPECTABLE,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    document,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

log = logging.getLogger(__name__)

NAME: Final = "org.virtd1"
ROOT: Final = "/org/virtd1"
DOMAINS: Final = f"{ROOT}/domain"
ERROR: Final = "org.virtd1.Error"
FREEDESKTOP: Final = "org.freedesktop.DBus.Error"

STANDARD: Final = (INTROSPECTABLE, PEER, PROPERTIES)
RUNNING: Final = frozenset({"starting", "running", "paused", "stopping"})
MAX_CALLERS: Final = 256
GRACE: Final = 0.25  # seconds

Object = dict[str, Any]


class Host(Protocol):
    """What this front end needs of virtd.host.Host."""

    async def status(self) -> Object: ...
    async def listing(self) -> list[Object]: ...
    async def info(self, name: str) -> Object: ...
    async def dump(self, name: str) -> str: ...
    async def wait(self, name: str, states: list[str], timeout: float | None) -> Object: ...
    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> Object: ...
    async def undefine(self, name: str, *, by: Caller) -> Object: ...
    async def start(self, name: str, *, by: Caller) -> Object: ...
    async def shutdown(self, name: str, timeout: float | None, *, by: Caller) -> Object: ...
    async def stop(self, name: str, *, by: Caller) -> Object: ...
    async def kill(self, name: str, signum: int, *, by: Caller) -> Object: ...
    async def reboot(self, name: str, *, force: bool, timeout: float | None, by: Caller) -> Object: ...
    async def suspend(self, name: str, *, by: Caller) -> Object: ...
    async def resume(self, name: str, *, by: Caller) -> Object: ...
    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> Object: ...  # noqa: FBT001
    async def reload(self, *, by: Caller) -> Object: ...
    def subscribe(self, callback: Callable[[str, Object], None]) -> Callable[[], None]:
        """`callback(event, object)`, with event one of added, removed, changed, ended."""


class Refused(Exception):
    """A call that doesn't fit the interface; `name` follows org.freedesktop.DBus.Error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = f"{FREEDESKTOP}.{name}"


class Server:
    """Serves one Bus. When the Bus is lost, close it and make another one for the next."""

    def __init__(self, host: Host, bus: Bus) -> None:
        self._host = host
        self._bus = bus
        # The domains as the bus was last told of them: changes are sent as the difference to this.
        self._domains: dict[str, Object] = {}
        self._running = 0
        self._callers: dict[str, Caller] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] | None = None
        self._named = False

    async def start(self, lost: Callable[[], None] | None = None) -> None:
        """Serve, and take the name; `lost` is called if the bus takes it away. Raises Exists or HostError."""
        self._domains = {item["name"]: item for item in await self._host.listing()}
        self._running = self._count_running()
        self._unsubscribe = self._host.subscribe(self._event)
        self._bus.serve(self._receive)
        # Last, because the calls that activation has kept for us come with the name. The end may come while we wait.
        self._named = True
        await self._bus.own_name(NAME, lost)

    async def close(self) -> None:
        """Stop serving, with an answer for everybody. The Bus stays the owner's to close.

        A call that comes from here on waits with the bus, which has virtd started again for it. What has come before
        is answered: with its result if that takes a moment only, else with an error. All this takes GRACE at most,
        unless the bus hangs.
        """
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        try:
            if self._named and not self._bus.closed:
                self._named = False
                await self._bus.release_name(NAME, timeout=GRACE)
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=GRACE)
            self._bus.serve(None)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if not self._bus.closed:
                await self._bus.flush(timeout=GRACE)
        except errors.VirtdError as exc:
            log.debug("The end on D-Bus was not a clean one: %s", exc)

    # Calls

    def _receive(self, call: MethodCall) -> None:
        self._task(self._answer(call), call.member)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"dbus-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, call: MethodCall) -> None:
        try:
            interface = self._resolve(call)
            method = INTERFACES[interface].methods[call.member]
            result = await self._dispatch(interface, call)
            call.reply(method.gives.signature, *result)
        except Refused as refused:
            call.error(refused.name, str(refused))
        except errors.VirtdError as error:
            call.error(f"{ERROR}.{kind_of(error)}", f"{error}. {error.hint}" if error.hint else str(error))
        except asyncio.CancelledError:
            call.error(f"{ERROR}.Disconnected", "virtd is ending; the call may have had its effect all the same")
            raise
        except Exception:
            log.exception("A bug: %s.%s of %s failed", call.interface, call.member, call.path)
            call.error(f"{ERROR}.VirtdError", "virtd has a bug here; its journal tells more")

    def _resolve(self, call: MethodCall) -> str:
        """The interface that a call means: it may leave it out. Raises Refused when the call fits none."""
        interfaces = self._interfaces(call.path)
        if not interfaces:
            raise Refused("UnknownObject", f"There is no object {call.path}")
        if call.interface and call.interface not in interfaces:
            raise Refused("UnknownInterface", f"{call.path} has no interface {call.interface}")
        for interface in [call.interface] if call.interface else interfaces:
            if call.member in INTERFACES[interface].methods:
                takes = INTERFACES[interface].methods[call.member].takes.signature
                if call.signature != takes:
                    raise Refused("InvalidArgs", f"{call.member} takes ({takes}), not ({call.signature})")
                return interface
        raise Refused("UnknownMethod", f"{call.path} has no method {call.member}")

    async def _dispatch(self, interface: str, call: MethodCall) -> tuple[Any, ...]:
        match interface:
            case "org.virtd1.Manager":
                return await self._manager(call)
            case "org.virtd1.Domain":
                return await self._domain(self._name_at(call.path), call)
            case "org.freedesktop.DBus.Properties":
                return await self._properties(call)
            case "org.freedesktop.DBus.ObjectManager":
                infos = await asyncio.gather(*(self._host.info(name) for name in sorted(self._domains)))
                return ({path_of(info["name"]): {DOMAIN: domain_properties(info)} for info in infos},)
            case _:
                return (document(self._interfaces(call.path), self._children(call.path)),)

    async def _manager(self, call: MethodCall) -> tuple[Any, ...]:
        match call.member:
            case "List":
                rows = [
                    (d["name"], path_of(d["name"]), d["uuid"], d["state"], d["pid"] or 0, d["reason"] or "")
                    for d in await self._host.listing()
                ]
                return (rows,)
            case "Status":
                return (dictionary(await self._host.status()),)
        by = await self._authorised(call)
        if call.member == "Define":
            text, source, check = call.args
            done = await self._host.define(text, source, check=check, by=by)
            return done["name"], done["uuid"], done["created"], done["path"] or "", done["warnings"]
        done = await self._host.reload(by=by)
        return done["changed"], [dictionary(problem) for problem in done["problems"]]

    async def _domain(self, name: str, call: MethodCall) -> tuple[Any, ...]:
        host = self._host
        match call.member:
            case "Info":
                return (dictionary(await host.info(name)),)
            case "Dump":
                return (await host.dump(name),)
            case "Wait":
                states, timeout = call.args
                return ((await host.wait(name, states, limit(timeout)))["state"],)
        by = await self._authorised(call)
        done: Awaitable[Object]
        match call.member:
            case "Shutdown":
                done = host.shutdown(name, limit(call.args[0]), by=by)
            case "Kill":
                done = host.kill(name, call.args[0], by=by)
            case "Reboot":
                done = host.reboot(name, force=call.args[0], timeout=None, by=by)
            case "SetAutostart":
                done = host.set_autostart(name, call.args[0], by=by)
            case simple:
                # Start, Stop, Suspend, Resume, Undefine: the table has let nothing else through.
                done = getattr(host, simple.lower())(name, by=by)
        result = await done
        return (result["changed"],) if INTERFACES[DOMAIN].methods[call.member].gives.signature else ()

    async def _properties(self, call: MethodCall) -> tuple[Any, ...]:
        interface = call.args[0]
        # An empty name means whatever interface the object has of its own; there is never more than one.
        own = next((name for name in self._interfaces(call.path) if INTERFACES[name].properties), None)
        if interface not in ("", *self._interfaces(call.path)):
            raise Refused("UnknownInterface", f"{call.path} has no interface {interface}")
        if call.member == "Set":
            raise Refused("PropertyReadOnly", "Properties are changed by methods only")
        values: dict[str, Var] = {}
        if own is not None and interface in ("", own):
            values = self._manager_properties() if own == MANAGER else await self._read_domain(call.path)
        if call.member == "GetAll":
            return (values,)
        if call.args[1] not in values:
            raise Refused("UnknownProperty", f"{interface or call.path} has no property {call.args[1]}")
        return (values[call.args[1]],)

    async def _read_domain(self, path: str) -> dict[str, Var]:
        return domain_properties(await self._host.info(self._name_at(path)))

    async def _authorised(self, call: MethodCall) -> Caller:
        """Who calls, if they may change something; AccessDenied else."""
        by = self._callers.get(call.sender)
        if by is None:
            (about,) = await self._bus.call(
                DBUS, DBUS_PATH, DBUS, "GetConnectionCredentials", "s", (call.sender,), timeout=10.0
            )
            uid = about.get("UnixUserID", -1)
            by = Caller(uid=uid, pid=about.get("ProcessID", 0), name=user_name(uid))
            # A bus never gives a unique name out twice, so no entry goes stale; only their number is kept low.
            if len(self._callers) >= MAX_CALLERS:
                self._callers.pop(next(iter(self._callers)))
            self._callers[call.sender] = by
        if by.uid != 0:
            raise errors.AccessDenied(
                f"{by.name} may not call {call.member}", hint="Only root may change domains for now."
            )
        return by

    # The tree of objects

    def _interfaces(self, path: str) -> tuple[str, ...]:
        """The interfaces of the object at `path`; none when there is no such object."""
        if path == ROOT:
            return (MANAGER, OBJECT_MANAGER, *STANDARD)
        if path in ("/", "/org", DOMAINS):
            return (INTROSPECTABLE, PEER)
        try:
            self._name_at(path)
        except Refused:
            return ()
        return (DOMAIN, *STANDARD)

    def _children(self, path: str) -> Iterable[str]:
        if path == DOMAINS:
            return map(escape_label, sorted(self._domains))
        return {"/": ("org",), "/org": ("virtd1",), ROOT: ("domain",)}.get(path, ())

    def _name_at(self, path: str) -> str:
        """The domain whose object is at `path`."""
        parent, _, label = path.rpartition("/")
        try:
            name = unescape_label(label)
        except ValueError:
            name = ""
        if parent != DOMAINS or name not in self._domains:
            raise Refused("UnknownObject", f"There is no object {path}")
        return name

    def _manager_properties(self) -> dict[str, Var]:
        return {
            "Version": Var("s", __version__),
            "Domains": Var("u", len(self._domains)),
            "Running": Var("u", self._running),
        }

    def _count_running(self) -> int:
        return sum(item["state"] in RUNNING for item in self._domains.values())

    # Events

    def _event(self, event: str, item: Object) -> None:
        name = item["name"]
        path = path_of(name)
        before = self._manager_properties()
        if event == "removed":
            if self._domains.pop(name, None) is not None:
                self._bus.emit(ROOT, OBJECT_MANAGER, "InterfacesRemoved", "oas", path, [DOMAIN, *STANDARD])
        elif name not in self._domains:
            self._domains[name] = item
            everything = {DOMAIN: domain_properties(item) | {"Exit": Var("a{sv}", {})}}
            self._bus.emit(ROOT, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", path, everything)
        else:
            old, self._domains[name] = self._domains[name], item
            # Events come in the short form, without the last exit.
            stale = ["Exit"] if event == "ended" or old["since"] != item["since"] else []
            self._changed(path, DOMAIN, domain_properties(old), domain_properties(item), stale)
        if event == "ended":
            self._task(self._ended(name), "ended")
        self._running = self._count_running()
        self._changed(ROOT, MANAGER, before, self._manager_properties())

    def _changed(
        self, path: str, interface: str, old: dict[str, Var], new: dict[str, Var], stale: Sequence[str] = ()
    ) -> None:
        changed = {key: value for key, value in new.items() if old[key] != value}
        if changed or stale:
            self._bus.emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", interface, changed, list(stale))

    async def _ended(self, name: str) -> None:
        try:
            info = await self._host.info(name)
        except errors.VirtdError as exc:
            log.debug("%s ended, and is gone: %s", name, exc)
            return
        self._bus.emit(path_of(name), DOMAIN, "Ended", "a{sv}", dictionary(info["exit"] or {}))


def path_of(name: str) -> str:
    """The object path of a domain."""
    return f"{DOMAINS}/{escape_label(name)}"


def domain_properties(item: Object) -> dict[str, Var]:
    """org.virtd1.Domain's properties from what Host.info says; all but Exit from the short form."""
    number = item.get("id")
    return {
        "Name": Var("s", item["name"]),
        "Driver": Var("s", item["driver"]),
        "Uuid": Var("s", item["uuid"]),
        "Unit": Var("s", item.get("unit") or unit_name(item["driver"], item["name"])),
        "State": Var("s", str(item["state"])),
        "Reason": Var("s", item.get("reason") or ""),
        "Since": Var("s", item.get("since") or ""),
        "Pid": Var("u", item.get("pid") or 0),
        # What has no number isn't running: -1, as users of libvirt know it.
        "Id": Var("i", -1 if number is None else number),
        "Autostart": Var("b", bool(item.get("autostart"))),
    } | ({"Exit": Var("a{sv}", dictionary(item["exit"] or {}))} if "exit" in item else {})


def dictionary(value: Object) -> dict[str, Var]:
    """A JSON object as a{sv}. D-Bus has no null: those keys are left out."""
    return {key: variant(item) for key, item in value.items() if item is not None}


def variant(value: Any) -> Var:
    """A JSON value as the variant that comes closest."""
    match value:
        case bool():
            return Var("b", value)
        case int():
            return Var("x", value)
        case float():
            return Var("d", value)
        case dict():
            return Var("a{sv}", dictionary(value))
        case list() | tuple() if all(isinstance(item, str) for item in value):
            return Var("as", [str(item) for item in value])
        case list() | tuple():
            return Var("av", [variant(item) for item in value if item is not None])
        case _:
            return Var("s", str(value))


def limit(timeout: float) -> float | None:
    """A time limit as D-Bus has it, where 0 and less mean the one that virtd has by itself."""
    return timeout if timeout > 0 else None


def kind_of(error: errors.VirtdError) -> str:
    """The class of `error`, or the nearest one above it, that virtd.errors defines."""
    return next(cls.__name__ for cls in type(error).__mro__ if errors.KINDS.get(cls.__name__) is cls)


def user_name(uid: int) -> str:
    """A user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
