# SPDX-License-Identifier: LGPL-2.1-or-later
"""One D-Bus connection under asyncio: calls with descriptors, signals, names, and incoming calls.

pydbus makes the connection (a private one, which never ends the process when the bus goes away). Its synchronous
proxies and its server half are left alone. Instead, one message filter hands every incoming message to the asyncio
loop, and all outgoing ones are sent from there. That is one hop for each message from GDBus's own worker thread, and
nothing else: no introspection before a call, no GLib main loop in the path, any number of calls in flight, and no
GDBusMethodInvocation, which most PyGObject versions leak (about 3 kB for each call that a service answers).

gi and pydbus cost 60 ms and several megabytes, so they are imported by `Bus.open()`, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from . import errors
from .busmessage import Descriptor, MethodCall, Table, Var, sendable
from .text import span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["Bus", "BusError", "Descriptor", "MethodCall", "Table", "Var"]

log = logging.getLogger(__name__)

SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
DBUS: Final = "org.freedesktop.DBus"
DBUS_PATH: Final = "/org/freedesktop/DBus"
PEER: Final = "org.freedesktop.DBus.Peer"

# Flags and answers of org.freedesktop.DBus.RequestName. Neither "allow replacement" nor "queue": whoever has the name
# keeps it, and whoever comes second is told at once.
DO_NOT_QUEUE: Final = 4
PRIMARY_OWNER: Final = 1
ALREADY_OWNER: Final = 4

# Seconds that a close waits for GDBus to let go of us.
LINGER: Final = 1.0

DISCONNECTED: Final = "org.freedesktop.DBus.Error.Disconnected"


class BusError(errors.HostError):
    """An error reply. `name` is its D-Bus name, as in org.freedesktop.systemd1.NoSuchUnit."""

    def __init__(self, name: str, message: str, *, hint: str = "") -> None:
        super().__init__(message or name, hint=hint)
        self.name = name


class Signal(NamedTuple):
    """A subscription; None matches anything."""

    sender: str | None
    interface: str
    member: str | None
    path: str | None
    callback: Callable[[str, str, str, tuple[Any, ...]], None]


class Bus:
    """A connection, for use on the asyncio loop that called `open`.

    `unique_name` is ours on the bus. A connection that was lost stays lost: `on_closed` callbacks run once, every
    call raises BusError, and whoever owns the Bus opens a new one.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.unique_name = ""
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._gio: Any = None
        self._glib: Any = None
        self._kinds: Any = None
        self._connection: Any = None
        self._holder: Any = None
        self._context: Any = None
        self._stopping = False
        self._told = False
        self._filter_freed = threading.Event()
        self._finished = asyncio.Event()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._signals: list[Signal] = []
        self._matches: dict[str, int] = {}
        self._owners: dict[str, str] = {}
        self._lost: dict[str, Callable[[], None]] = {}
        self._on_closed: list[Callable[[], None]] = []
        self._handler: Callable[[MethodCall], None] | None = None
        self._gate: Callable[[Any], bool] | None = None
        self._speakers: set[str | None] = {DBUS}  # whose signals are listened to; the worker thread reads it
        self._thread: threading.Thread | None = None

    # Opening and closing

    @classmethod
    async def open(cls, address: str | None = None) -> Bus:
        """Connect to `address`, or to the system bus ($DBUS_SYSTEM_BUS_ADDRESS is honoured).

        Raises HostError when there is no bus, or gi and pydbus are not installed.
        """
        bus = cls(address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS)
        ready: asyncio.Future[None] = bus._loop.create_future()
        bus._thread = threading.Thread(target=bus._run, args=(ready,), name="virtd-bus", daemon=True)
        bus._thread.start()
        try:
            await ready
        except BaseException:
            await bus.close()
            raise
        return bus

    async def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after the connection was lost."""
        self._stopping = True
        if self._context is not None:
            self._context.wakeup()
        await self._finished.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._fail_pending()
        self._on_closed.clear()
        self._signals.clear()
        self._lost.clear()
        self._handler = self._gate = None
        if self._connection is None:
            return
        # The worker thread may be the last to hold the connection, whose end frees descriptors.
        freed = asyncio.Event()
        self._connection.weak_ref(self._post, freed.set)
        self._connection = self._context = None
        self._holder = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await freed.wait()

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the connection is lost (not by `close`)."""
        self._on_closed.append(callback)

    def _run(self, ready: asyncio.Future[None]) -> None:
        """The thread: imports, connects, and waits for the connection's end, which only a GLib loop is told of."""
        try:
            self._connect()
            self._post(_settle, ready, None)
            while not self._stopping:
                self._context.iteration(may_block=True)
            self._disconnect()
            self._context.pop_thread_default()
        except BaseException as exc:
            self._post(_settle, ready, exc)
        finally:
            # Whatever happened: `close` waits for it.
            self._post(self._finished.set)

    def _connect(self) -> None:
        try:
            import pydbus
            from gi.repository import Gio, GLib
        except ImportError as exc:
            raise errors.HostError(
                f"the D-Bus libraries are missing: {exc}",
                hint="Install pydbus and PyGObject (python3-pydbus, python3-gi)",
            ) from exc
        self._gio, self._glib = Gio, GLib
        self._kinds = Gio.DBusMessageType
        # A context of our own: the connection's signals must not wait for the default one, which nobody runs.
        context = GLib.MainContext()
        context.push_thread_default()
        try:
            wrapper = pydbus.connect(self.address)
        except GLib.Error as exc:
            context.pop_thread_default()
            raise errors.HostError(
                f"no D-Bus at {self.address}: {exc.message}", hint="See: systemctl status dbus.service"
            ) from exc
        connection = wrapper.con
        # The two refer to each other, and a cycle with a GObject in it is collected late or never.
        wrapper.con = None
        connection.set_exit_on_close(False)
        self._closed_handler = connection.connect("closed", self._on_closed_signal)
        # An object of its own, so that it can be seen when GDBus has let go of it.
        listener = functools.partial(self._filter_message)
        self._filter = connection.add_filter(listener)
        weakref.finalize(listener, self._filter_freed.set).atexit = False
        self.unique_name = connection.get_unique_name()
        # pydbus has set an attribute of it, so PyGObject drops its reference with the GIL held. Were that the last,
        # its end would wait for a lock under which the worker thread takes a reference and waits for the GIL: for
        # ever (GLib 2.74). This object has a reference too, does nothing with it, and drops it without the GIL.
        self._holder = Gio.DBusActionGroup.get(connection, DBUS, DBUS_PATH)
        self._connection = connection
        self._context = context

    def _disconnect(self) -> None:
        with contextlib.suppress(self._glib.Error):
            self._connection.close_sync(None)
        # The closing is told by a source of this context, which holds the connection, which holds the context: unless
        # it runs, none of them is ever freed.
        while not self._told:
            self._context.iteration(may_block=True)
        self._connection.disconnect(self._closed_handler)
        self._connection.remove_filter(self._filter)
        # Another source frees the filter. It comes when the worker thread has returned from it, perhaps later.
        deadline = time.monotonic() + LINGER
        while not self._filter_freed.is_set() and time.monotonic() < deadline:
            if not self._context.iteration(may_block=False):
                time.sleep(0.0005)
        # GDBus leaves the socket of a connection that was lost open until its last reference has gone.
        with contextlib.suppress(self._glib.Error):
            self._connection.get_stream().close(None)

    def _on_closed_signal(self, *_: Any) -> None:
        self._told = True
        self._post(self._closed)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        # The loop may have been closed without us; then there is nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _closed(self) -> None:
        if self._stopping or self.closed:
            return
        self.closed = True
        log.warning("The D-Bus connection to %s was closed", self.address)
        self._fail_pending()
        for callback in tuple(self._on_closed):
            callback()

    def _fail_pending(self) -> None:
        self.closed = True
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(BusError(DISCONNECTED, "the D-Bus connection was closed"))

    # Messages out

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        method: str,
        signature: str = "",
        args: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout: float = 25.0,
    ) -> tuple[Any, ...]:
        """Call a method; the reply's values.

        `signature` is of the arguments, without the outer parentheses. A `v` takes a Var. An `h` takes an index into
        `fds`, which stay the caller's. A descriptor in the reply (one that isn't inside an array or a struct) is the
        caller's to close. Raises BusError (an error reply, or no connection) or TimedOut.
        """
        return self.unpack(
            await self._roundtrip(destination, path, interface, method, signature, args, fds=fds, timeout=timeout)
        )

    async def _roundtrip(
        self,
        destination: str,
        path: str,
        interface: str,
        method: str,
        signature: str,
        args: Sequence[Any],
        *,
        fds: Sequence[int] = (),
        timeout: float,
    ) -> Any:
        """Send a call; the message that answers it, which isn't an error."""
        message = self._gio.DBusMessage.new_method_call(destination, path, interface, method)
        if signature:
            message.set_body(self._pack(signature, args))
        self.attach(message, fds)
        serial = self._send(message)
        # Replies are looked up on this very loop, so none can come before its future is in place.
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending[serial] = future
        try:
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError as exc:
            raise errors.TimedOut(
                f"{destination} did not answer {interface}.{method} within {span(timeout)}"
            ) from exc
        finally:
            self._pending.pop(serial, None)
        if reply.get_message_type() == self._gio.DBusMessageType.ERROR:
            values = self.unpack(reply)
            raise BusError(reply.get_error_name(), str(values[0]) if values else "")
        return reply

    async def table(
        self, destination: str, path: str, interface: str, method: str, signature: str = "", args: Sequence[Any] = ()
    ) -> Table:
        """`call` for a method whose answer begins with an array of structs, and holds no descriptors."""
        reply = await self._roundtrip(destination, path, interface, method, signature, args, timeout=25.0)
        return Table(reply.get_body().get_child_value(0))

    async def properties(
        self, destination: str, path: str, interface: str, names: Sequence[str], *, timeout: float = 25.0
    ) -> dict[str, Any]:
        """Some of an object's properties, in one call; BusError when it lacks one of them.

        The others aren't turned into Python values: a service unit has some 400, which would take milliseconds.
        """
        reply = await self._roundtrip(
            destination, path, "org.freedesktop.DBus.Properties", "GetAll", "s", (interface,), timeout=timeout
        )
        every = reply.get_body().get_child_value(0)
        found = {}
        for name in names:
            value = every.lookup_value(name, None)
            if value is None:
                raise BusError("org.freedesktop.DBus.Error.UnknownProperty", f"{path} has no property {name}")
            found[name] = value.unpack()
        return found

    def emit(self, path: str, interface: str, member: str, signature: str = "", *values: Any) -> None:
        """Send a signal to everybody. Dropped when the connection is gone."""
        message = self._gio.DBusMessage.new_signal(path, interface, member)
        message.set_body(self.pack(signature, values))
        with contextlib.suppress(BusError):
            self._send(message)

    def attach(self, message: Any, fds: Sequence[int]) -> None:
        """Have duplicates of these go with a message, whose `h` are indices into them."""
        if fds:
            handles = self._gio.UnixFDList.new()
            for fd in fds:
                handles.append(fd)
            message.set_unix_fd_list(handles)

    def _send(self, message: Any) -> int:
        if self.closed or self._connection is None:
            raise BusError(DISCONNECTED, "the D-Bus connection is closed")
        try:
            self._connection.send_message(message, self._gio.DBusSendMessageFlags.NONE)
        except self._glib.Error as exc:
            raise BusError(DISCONNECTED, f"the D-Bus connection is closed: {exc.message}") from exc
        serial: int = message.get_serial()
        return serial

    def pack(self, signature: str, values: Sequence[Any]) -> Any:
        """A body for what we tell others, which is always sent: see `sendable`."""
        try:
            return self._pack(signature, values)
        except (UnicodeEncodeError, OverflowError):
            return self._pack(signature, sendable(tuple(values)))

    def _pack(self, signature: str, values: Sequence[Any]) -> Any:
        return self._glib.Variant(f"({signature})", tuple(self._wrap(value) for value in values))

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, Var):
            return self._glib.Variant(value.signature, self._wrap(value.value))
        if isinstance(value, tuple):
            return tuple(self._wrap(item) for item in value)
        if isinstance(value, list):
            return [self._wrap(item) for item in value]
        if isinstance(value, dict):
            return {key: self._wrap(item) for key, item in value.items()}
        return value

    # Messages in

    def _filter_message(self, _connection: Any, message: Any, incoming: bool, *_: Any) -> Any:  # noqa: FBT001
        """Runs in GDBus's worker thread. What it returns goes on to GDBus, which answers Peer's calls for us.

        Everybody on a bus may send us as much as they like, and what is handed on waits for the loop without any
        bound: so what nobody has asked for ends here.
        """
        if not incoming:
            return message
        kind = message.get_message_type()
        if kind == self._kinds.SIGNAL:
            if not self._listens(message):
                return None
        elif kind == self._kinds.METHOD_CALL:
            gate = self._gate
            if gate is not None and not gate(message):
                return None
            if message.get_interface() == PEER:
                return message
        self._post(self._receive, message)
        return None

    def _listens(self, message: Any) -> bool:
        sender = message.get_sender()
        if sender == DBUS and message.get_member() == "NameOwnerChanged":
            # Known before the loop has it, for the new owner may go on at once.
            name, _, owner = message.get_body().unpack()
            if owner and name in self._owners:
                self._speakers.add(owner)
        return sender in self._speakers or None in self._speakers

    def _receive(self, message: Any) -> None:
        kinds = self._kinds
        kind = message.get_message_type()
        if kind in (kinds.METHOD_RETURN, kinds.ERROR):
            future = self._pending.get(message.get_reply_serial())
            if future is not None and not future.done():
                future.set_result(message)
        elif kind == kinds.SIGNAL:
            self._receive_signal(message)
        elif kind == kinds.METHOD_CALL:
            call = MethodCall(self, message)
            if self._handler is None:
                call.error("org.freedesktop.DBus.Error.UnknownMethod", "There are no objects here")
            else:
                self._handler(call)

    def unpack(self, message: Any) -> tuple[Any, ...]:
        """The values of a message; descriptors in it are the caller's to close."""
        body = message.get_body()
        if body is None:
            return ()
        values: tuple[Any, ...] = body.unpack()
        if message.get_num_unix_fds() == 0:
            return values
        fds = list(message.get_unix_fd_list().steal_fds())
        unclaimed = set(fds)
        result = []
        for number, value in enumerate(values):
            if body.get_child_value(number).get_type_string() == "h":
                unclaimed.discard(fds[value])
                result.append(fds[value])
            else:
                result.append(value)
        for fd in unclaimed:
            os.close(fd)
        return tuple(result)

    # Signals

    async def subscribe(
        self,
        sender: str | None,
        interface: str,
        member: str | None,
        path: str | None,
        callback: Callable[[str, str, str, tuple[Any, ...]], None],
        *,
        arg0: str | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """Have `callback(path, interface, member, args)` called for each such signal, from when this returns.

        With `arg0` the bus sends only those whose first argument is that; the callback may get others that somebody
        else has asked for.

        Signals of a well-known name count only when its owner sent them: everybody on a bus may send us anything. The
        result, awaited, ends the subscription.
        """
        signal = Signal(sender, interface, member, path, callback)
        if sender is None or sender.startswith(":"):
            self._speakers.add(sender)
        if sender and not sender.startswith(":") and sender != DBUS:
            await self._watch_owner(sender)
        rule = _match(type="signal", sender=sender, interface=interface, member=member, path=path, arg0=arg0)
        await self._add_match(rule)
        self._signals.append(signal)

        async def unsubscribe() -> None:
            if signal in self._signals:
                self._signals.remove(signal)
                self._matches[rule] -= 1
                if self._matches[rule] == 0 and not self.closed:
                    del self._matches[rule]
                    with contextlib.suppress(BusError):
                        await self.call(DBUS, DBUS_PATH, DBUS, "RemoveMatch", "s", (rule,))

        return unsubscribe

    async def _add_match(self, rule: str) -> None:
        self._matches[rule] = self._matches.get(rule, 0) + 1
        if self._matches[rule] == 1:
            await self.call(DBUS, DBUS_PATH, DBUS, "AddMatch", "s", (rule,))

    async def _watch_owner(self, name: str) -> None:
        if name in self._owners:
            return
        self._owners[name] = ""
        rule = _match(type="signal", sender=DBUS, interface=DBUS, member="NameOwnerChanged", path=DBUS_PATH)
        await self._add_match(f"{rule},arg0='{name}'")
        # A name without an owner yet is one that will be activated; NameOwnerChanged tells.
        with contextlib.suppress(BusError):
            (owner,) = await self.call(DBUS, DBUS_PATH, DBUS, "GetNameOwner", "s", (name,))
            self._owners[name] = owner
            self._speakers.add(owner)

    def _receive_signal(self, message: Any) -> None:
        sender, path = message.get_sender(), message.get_path()
        interface, member = message.get_interface(), message.get_member()
        args: tuple[Any, ...] | None = None
        if sender == DBUS and interface == DBUS:
            args = self.unpack(message)
            if member == "NameOwnerChanged" and args[0] in self._owners:
                self._owners[args[0]] = args[2]
            elif member == "NameLost" and (lost := self._lost.pop(args[0], None)):
                log.warning("The D-Bus name %s was lost", args[0])
                lost()
        for signal in tuple(self._signals):
            if (
                signal.interface == interface
                and signal.member in (None, member)
                and signal.path in (None, path)
                and (signal.sender is None or sender in (signal.sender, self._owners.get(signal.sender)))
            ):
                if args is None:
                    args = self.unpack(message)
                signal.callback(path, interface, member, args)

    # Being a service

    def serve(self, handler: Callable[[MethodCall], None] | None, gate: Callable[[Any], bool] | None = None) -> None:
        """Have `handler` called, on the loop, for every call that comes in, but for org.freedesktop.DBus.Peer's.

        `gate` is asked about each message first, Peer's as well, and False drops it. It runs in GDBus's worker
        thread; until it returns no other message gets through.
        """
        self._handler = handler
        self._gate = gate

    def send(self, message: Any) -> None:
        """Send a message that somebody else has made, from any thread. Dropped when the connection is gone."""
        with contextlib.suppress(BusError):
            self._send(message)

    async def own_name(self, name: str, lost: Callable[[], None] | None = None) -> None:
        """Take a well-known name, for good: nobody can take it from us, and `lost` runs if the bus does all the same.

        Raises Exists when somebody has it, BusError when the bus's policy says no.
        """
        (answer,) = await self.call(DBUS, DBUS_PATH, DBUS, "RequestName", "su", (name, DO_NOT_QUEUE))
        if answer not in (PRIMARY_OWNER, ALREADY_OWNER):
            raise errors.Exists(f"the D-Bus name {name} is taken", hint=f"See: busctl status {name}")
        self._lost[name] = lost or (lambda: None)

    async def release_name(self, name: str, *, timeout: float = 25.0) -> None:
        """Give a name back; `lost` isn't called. Whatever was sent to the name before is here when this returns."""
        self._lost.pop(name, None)
        await self.call(DBUS, DBUS_PATH, DBUS, "ReleaseName", "s", (name,), timeout=timeout)

    async def flush(self, *, timeout: float = 25.0) -> None:
        """Returns when the bus has taken everything that was sent; `close` would throw the rest away."""
        # Not Ping: the usual policy of a system bus lets nobody send that to the bus itself, and logs each try.
        await self.call(DBUS, DBUS_PATH, DBUS, "GetId", timeout=timeout)


def _match(**keys: str | None) -> str:
    return ",".join(f"{key}='{value}'" for key, value in keys.items() if value is not None)


def _settle(future: asyncio.Future[None], exc: BaseException | None) -> None:
    if future.done():
        return
    if exc is None:
        future.set_result(None)
    else:
        future.set_exception(exc)
