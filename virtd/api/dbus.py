# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus front end: org.virtd1, with an object for each domain, network and so on, under an ObjectManager.

    /org/virtd1                 org.virtd1.Manager
    /org/virtd1/domain/<name>   org.virtd1.Domain; the name is escaped as by sd_bus_path_encode(3)
    ...                         the other kinds of kinds.py

Everybody may read, only root may change. An error's name is org.virtd1.Error.<class of virtd.errors>.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from .. import __version__, errors
from ..host import Caller
from ..host.access import Right
from ..sparing import Sparing
from ..systemd.bus import DBUS, DBUS_PATH, Bus, BusError, MethodCall, Var
from ..systemd.names import escape_label, unescape_label
from . import interfaces, kinds, members
from .door import KNOWN, LIMITS_EXCEEDED, Door
from .introspection import (
    INTROSPECTABLE,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    Method,
    document,
)
from .limits import Limits, Turn
from .sharing import Sharing
from .variants import Object, dictionary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

    from ..host import Host
    from .kinds import Kind

log = logging.getLogger(__name__)

NAME: Final = "org.virtd1"
ROOT: Final = "/org/virtd1"
ERROR: Final = "org.virtd1.Error"
FREEDESKTOP: Final = "org.freedesktop.DBus.Error"

STANDARD: Final = (INTROSPECTABLE, PEER, PROPERTIES)
RUNNING: Final = frozenset({"starting", "running", "paused", "stopping"})
NO_USER: Final = (1 << 32) - 1
COST: Final = 2.0  # of a call, relative to one on Varlink
GRACE: Final = 0.25  # seconds


class Refused(Exception):
    """A call that doesn't fit the interface; `name` follows org.freedesktop.DBus.Error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = f"{FREEDESKTOP}.{name}"


class Server:
    """Serves one Bus. When the Bus is lost, close it and make another one for the next."""

    def __init__(self, host: Host, bus: Bus, limits: Limits | None = None) -> None:
        self._host = host
        self._bus = bus
        self._limits = limits or Limits()
        self._sharing = Sharing()
        self._sparing = Sparing(log)
        self._door = Door(self._refuse)
        self._kinds = kinds.load()
        self._members = kinds.members(self._kinds.values())
        # The objects of each kind as last announced on the bus: changes are sent as the difference from this.
        self._objects: dict[str, dict[str, Object]] = {segment: {} for segment in self._kinds}
        self._running = 0
        self._callers: dict[str, Caller] = {}
        self._lookups: dict[str, asyncio.Task[Caller | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] | None = None
        self._named = False

    async def start(self, lost: Callable[[], None] | None = None) -> None:
        """Serve, and take the name; `lost` is called if the bus takes it away. Raises Exists or HostError."""
        for kind in self._kinds.values():
            self._objects[kind.segment] = {item["name"]: item for item in await kind.listing(self._host)}
        self._running = self._count_running()
        self._unsubscribe = self._host.subscribe(self._event)
        self._bus.serve(self._receive, self._door.admits)
        # Last, because the calls that activation has kept for us come with the name. The end may come while we wait.
        self._named = True
        await self._bus.own_name(NAME, lost)

    async def close(self) -> None:
        """Stop serving, after answering everybody. Closing the Bus is up to its owner.

        A call that arrives from here on waits in the bus, which has virtd started again for it. Earlier calls are
        answered: with their result if that takes only a moment, otherwise with an error. All this takes at most
        GRACE, unless the bus hangs.
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
            await self._sharing.close()
            if not self._bus.closed:
                await self._bus.flush(timeout=GRACE)
        except errors.VirtdError as exc:
            log.debug("Leaving D-Bus failed: %s", exc)

    # Calls

    def _receive(self, call: MethodCall) -> None:
        self._task(self._answer(call), call.member)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"dbus-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse(self, message: Any) -> None:
        """In GDBus's thread."""
        text = "Unprivileged users have too many calls under way, or this one is too large"
        self._bus.send(message.new_method_error_literal(LIMITS_EXCEEDED, text))

    async def _answer(self, call: MethodCall) -> None:
        turn = Turn()
        size = 0
        try:
            by = await self._caller_of(call.sender)
            if by is None:
                return  # gone, with nobody left to answer to
            turn = await self._limits.turn(by.uid, COST)
            interface = self._resolve(call)
            method = self._members[interface].methods[call.member]
            asked = method.operation, _right(method), call.member
            if not self._host.access.allows(by, *asked):
                turn.leave()
                async with self._while_there(call.sender):
                    await self._host.access.ask(by, *asked)
            size = await self._reply(call, interface, method, by, turn)
        except Refused as refused:
            call.error(refused.name, str(refused))
        except errors.VirtdError as error:
            call.error(f"{ERROR}.{kind_of(error)}", f"{error}. {error.hint}" if error.hint else str(error))
        except asyncio.CancelledError:
            call.error(f"{ERROR}.Disconnected", "virtd is shutting down; the call may have taken effect nevertheless")
            raise
        except Exception:
            self._sparing.exception("A bug: %s.%s of %s failed", call.interface, call.member, call.path)
            call.error(f"{ERROR}.VirtdError", "This is a bug in virtd; see its journal")
        finally:
            turn.leave(size)
            self._door.leaves(call.sender)

    async def _reply(self, call: MethodCall, interface: str, method: Method, by: Caller, turn: Turn) -> int:
        """Answer the call; returns the answer's size in bytes."""
        signature = method.gives.signature
        waiting, shared = _costs(method)
        if waiting:
            turn.leave()
            async with self._while_there(call.sender):
                result = await self._dispatch(interface, call, by)
        elif by.uid == 0:
            call.reply(signature, *await self._dispatch(interface, call, by))
            return 0
        elif shared:

            async def find() -> Any:
                return self._bus.codec.pack(signature, await self._dispatch(interface, call, by))

            return call.answer(await self._sharing.get((call.path, interface, call.member, call.args), find))
        else:
            result = await self._dispatch(interface, call, by)
        return call.answer(self._bus.codec.pack(signature, result))

    async def _caller_of(self, sender: str) -> Caller | None:
        """The owner of the connection; None if it has left the bus."""
        by = self._callers.get(sender)
        if by is None:
            if (lookup := self._lookups.get(sender)) is None:
                lookup = self._lookups[sender] = asyncio.create_task(self._look_up(sender), name="dbus-caller")
            by = await asyncio.shield(lookup)
        if by is not None:
            self._door.learns(sender, by.uid)
        return by

    async def _look_up(self, sender: str) -> Caller | None:
        try:
            (about,) = await self._bus.call(
                DBUS, DBUS_PATH, DBUS, "GetConnectionCredentials", "s", (sender,), timeout=10.0
            )
        except BusError:
            return None
        finally:
            del self._lookups[sender]
        by = Caller.of(about.get("UnixUserID", NO_USER), about.get("ProcessID", 0))
        # A bus never assigns a unique name twice, so no entry goes stale; only their number is limited.
        while len(self._callers) >= KNOWN:
            del self._callers[next(iter(self._callers))]
        self._callers[sender] = by
        return by

    @contextlib.asynccontextmanager
    async def _while_there(self, sender: str) -> AsyncIterator[None]:
        """Cancel the body when the caller leaves the bus."""
        ours = asyncio.current_task()
        gone = False

        def changed(_path: str, _interface: str, _member: str, args: tuple[Any, ...]) -> None:
            nonlocal gone
            if args[0] == sender and not args[2] and ours is not None and not gone:
                gone = True
                ours.cancel()

        unsubscribe = await self._bus.subscribe(DBUS, DBUS, "NameOwnerChanged", DBUS_PATH, changed, arg0=sender)
        try:
            # It may have left before anybody listened.
            await self._bus.call(DBUS, DBUS_PATH, DBUS, "GetNameOwner", "s", (sender,))
            yield
        except asyncio.CancelledError:
            if not gone or ours is None or ours.uncancel():
                raise
            raise errors.Disconnected(f"{sender} has left the bus") from None
        finally:
            await unsubscribe()

    def _resolve(self, call: MethodCall) -> str:
        """The interface that a call is for, as the call may omit it. Raises Refused if the call fits none."""
        own = self._interfaces(call.path)
        if not own:
            raise Refused("UnknownObject", f"There is no object {call.path}")
        if call.interface and call.interface not in own:
            raise Refused("UnknownInterface", f"{call.path} has no interface {call.interface}")
        for interface in [call.interface] if call.interface else own:
            if call.member in self._members[interface].methods:
                takes = self._members[interface].methods[call.member].takes.signature
                if call.signature != takes:
                    raise Refused("InvalidArgs", f"{call.member} takes ({takes}), not ({call.signature})")
                return interface
        raise Refused("UnknownMethod", f"{call.path} has no method {call.member}")

    async def _dispatch(self, interface: str, call: MethodCall, caller: Caller) -> tuple[Any, ...]:
        match interface:
            case "org.freedesktop.DBus.Properties":
                return await self._properties(call)
            case "org.freedesktop.DBus.ObjectManager":
                return (await self._managed(),)
            case "org.freedesktop.DBus.Introspectable":
                return (
                    document(
                        {name: self._members[name] for name in self._interfaces(call.path)}, self._children(call.path)
                    ),
                )
        if interface == MANAGER and call.member == "List":
            return (await self._domains(),)
        name = None if call.path == ROOT else self._at(call.path)[1]
        method = self._members[interface].methods[call.member]
        return await members.answer(self._host, method, name, call.args, caller)

    async def _domains(self) -> list[tuple[Any, ...]]:
        return [
            (d["name"], path_of(d["name"]), d["uuid"], d["state"], d["pid"] or 0, d["reason"] or "")
            for d in await self._host.domains.listing()
        ]

    async def _managed(self) -> dict[str, dict[str, dict[str, Var]]]:
        """All objects with their properties, except those that have disappeared before they were asked for."""
        found = {}
        for kind in self._kinds.values():
            names = sorted(self._objects[kind.segment])
            infos = await asyncio.gather(*(kind.info(self._host, name) for name in names), return_exceptions=True)
            for name, info in zip(names, infos, strict=True):
                try:
                    if isinstance(info, BaseException):
                        raise info
                    found[path_of(name, kind.segment)] = {kind.interface: kind.properties(info)}
                except errors.NotFound:
                    pass
                except Exception:
                    # An object that others have damaged is missing here; no other object is affected.
                    self._sparing.exception("%s %s can't be shown on D-Bus", kind.segment, name)
        return found

    async def _properties(self, call: MethodCall) -> tuple[Any, ...]:
        interface = call.args[0]
        # An empty name means the object's own interface, of which there is never more than one.
        own = next((name for name in self._interfaces(call.path) if self._members[name].properties), None)
        if interface not in ("", *self._interfaces(call.path)):
            raise Refused("UnknownInterface", f"{call.path} has no interface {interface}")
        if call.member == "Set":
            raise Refused("PropertyReadOnly", "Properties are changed by methods only")
        values: dict[str, Var] = {}
        if own is not None and interface in ("", own):
            values = self._manager_properties() if own == MANAGER else await self._read(call.path)
        if call.member == "GetAll":
            return (values,)
        if call.args[1] not in values:
            raise Refused("UnknownProperty", f"{interface or call.path} has no property {call.args[1]}")
        return (values[call.args[1]],)

    async def _read(self, path: str) -> dict[str, Var]:
        kind, name = self._at(path)
        assert name is not None
        return kind.properties(await kind.info(self._host, name))

    # The tree of objects

    def _interfaces(self, path: str) -> tuple[str, ...]:
        """The interfaces of the object at `path`; none if there is no such object."""
        if path == ROOT:
            return (MANAGER, OBJECT_MANAGER, *STANDARD)
        if path in ("/", "/org"):
            return (INTROSPECTABLE, PEER)
        try:
            kind, name = self._at(path)
        except Refused:
            return ()
        if name is not None:
            return (kind.interface, *STANDARD)
        return (*([kind.manager] if kind.manager else []), INTROSPECTABLE, PEER)

    def _children(self, path: str) -> Iterable[str]:
        fixed = {"/": ["org"], "/org": ["virtd1"], ROOT: list(self._kinds)}
        if path in fixed:
            return fixed[path]
        kind, name = self._at(path)
        return map(escape_label, sorted(self._objects[kind.segment])) if name is None else ()

    def _at(self, path: str) -> tuple[Kind, str | None]:
        """The kind and name of the object at `path`; no name for the path above a kind's objects."""
        segment, _, label = path.removeprefix(f"{ROOT}/").partition("/")
        if path.startswith(f"{ROOT}/") and (kind := self._kinds.get(segment)) is not None:
            if not label and not path.endswith("/"):
                return kind, None
            try:
                name = unescape_label(label)
            except ValueError:
                name = ""
            if name in self._objects[segment]:
                return kind, name
        raise Refused("UnknownObject", f"There is no object {path}")

    def _manager_properties(self) -> dict[str, Var]:
        return {
            "Version": Var("s", __version__),
            "Domains": Var("u", len(self._objects["domain"])),
            "Running": Var("u", self._running),
        }

    def _count_running(self) -> int:
        return sum(item["state"] in RUNNING for item in self._objects["domain"].values())

    # Events

    def _event(self, event: str, item: Object) -> None:
        kind = next((kind for kind in self._kinds.values() if kind.driver == item["driver"]), None)
        if kind is None:
            return
        known, name = self._objects[kind.segment], item["name"]
        path = path_of(name, kind.segment)
        before = self._manager_properties()
        if event == "removed":
            if known.pop(name, None) is not None:
                self._bus.emit(ROOT, OBJECT_MANAGER, "InterfacesRemoved", "oas", path, [kind.interface, *STANDARD])
        elif name not in known:
            known[name] = item
            everything = {kind.interface: kind.properties(item) | dict(kind.late)}
            self._bus.emit(ROOT, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", path, everything)
        else:
            old, known[name] = known[name], item
            # Events have the short form, without the fields of the long one.
            stale = list(kind.late) if event == "ended" or old.get("since") != item.get("since") else []
            self._changed(path, kind.interface, kind.properties(old), kind.properties(item), stale)
        if event == "ended" and kind.ended:
            self._task(self._ended(kind, name), "ended")
        self._running = self._count_running()
        self._changed(ROOT, MANAGER, before, self._manager_properties())

    def _changed(
        self, path: str, interface: str, old: dict[str, Var], new: dict[str, Var], stale: Sequence[str] = ()
    ) -> None:
        changed = {key: value for key, value in new.items() if old[key] != value}
        if changed or stale:
            self._bus.emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", interface, changed, list(stale))

    async def _ended(self, kind: Kind, name: str) -> None:
        try:
            info = await kind.info(self._host, name)
        except errors.VirtdError as exc:
            log.debug("%s ended, and is gone: %s", name, exc)
            return
        ending = dictionary(info["exit"] or {})
        self._bus.emit(path_of(name, kind.segment), kind.interface, "Ended", "a{sv}", ending)


def _right(method: Method) -> Right:
    """D-Bus's own methods only look: no property can be set, and Set refuses."""
    if method.operation.startswith("org.freedesktop."):
        return Right.LOOK
    return interfaces.operation(method.operation).right


def _costs(method: Method) -> tuple[bool, bool]:
    """Whether it may wait for something to happen, and whether it is expensive: see virtd.api.interfaces.Method."""
    if method.operation.startswith("org.freedesktop."):
        return False, method.operation in (f"{INTROSPECTABLE}.Introspect", f"{OBJECT_MANAGER}.GetManagedObjects")
    operation = interfaces.operation(method.operation)
    return operation.waiting, operation.shared


def path_of(name: str, segment: str = "domain") -> str:
    """The object path of a domain, or of another object."""
    return f"{ROOT}/{segment}/{escape_label(name)}"


def kind_of(error: errors.VirtdError) -> str:
    """The class of `error`, or the nearest one above it, that virtd.errors defines."""
    return next(cls.__name__ for cls in type(error).__mro__ if errors.KINDS.get(cls.__name__) is cls)
