# SPDX-License-Identifier: LGPL-2.1-or-later
"""One D-Bus connection under asyncio: calls with descriptors, signals, names, and incoming calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from ... import errors
from ...text import span
from .link import Link, Way
from .message import DBUS, DBUS_PATH, DISCONNECTED, BusError, Codec, Descriptor, MethodCall, Table, Var
from .signals import Signals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .signals import Callback

__all__ = ["DBUS", "DBUS_PATH", "DISCONNECTED", "Bus", "BusError", "Descriptor", "MethodCall", "Table", "Var"]

log = logging.getLogger(__name__)

SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
PEER: Final = "org.freedesktop.DBus.Peer"

# Seconds until a call counts as unanswered. A bus can hang for the better part of a minute and then recover: when
# dbus-daemon reads its configuration, it looks up users, also in systemd-machined, which may itself be waiting for
# the bus (systemd's issue 40562), until both give up. virtdctl waits a little longer than this.
PATIENCE: Final = 100.0

# Flags and answers of org.freedesktop.DBus.RequestName. Neither "allow replacement" nor "queue": the owner keeps the
# name, and a second one gets an error at once.
DO_NOT_QUEUE: Final = 4
PRIMARY_OWNER: Final = 1
ALREADY_OWNER: Final = 4


class Bus:
    """A connection, for use on the asyncio loop that called `open`.

    A lost connection stays lost: `on_closed` callbacks run once, every call raises BusError, and the owner of the Bus
    opens a new one.
    """

    def __init__(self, address: str) -> None:
        self._link = Link(address, sort=self._sort, receive=self._receive, lost=self._was_lost)
        self._signals = Signals(self._ask_bus)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._lost: dict[str, Callable[[], None]] = {}
        self._on_closed: list[Callable[[], None]] = []
        self._handler: Callable[[MethodCall], None] | None = None
        self._gate: Callable[[Any], bool] | None = None

    @classmethod
    async def open(cls, address: str | None = None) -> Bus:
        """Connect to `address`, or to the system bus ($DBUS_SYSTEM_BUS_ADDRESS is honoured).

        Raises HostError if there is no bus, or if gi and pydbus are not installed.
        """
        bus = cls(address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS)
        try:
            await bus._link.open()
        except BaseException:
            await bus.close()
            raise
        return bus

    async def close(self) -> None:
        """Disconnect. Idempotent, also after the connection has been lost."""
        await self._link.close()
        self._fail_pending()
        self._on_closed.clear()
        self._signals.clear()
        self._lost.clear()
        self._handler = self._gate = None

    @property
    def unique_name(self) -> str:
        """Our unique name on the bus."""
        return self._link.unique_name

    @property
    def closed(self) -> bool:
        return self._link.closed

    @property
    def codec(self) -> Codec:
        """Converts values to bodies of messages and back."""
        return self._link.codec

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the connection is lost, but not for `close`."""
        self._on_closed.append(callback)

    def _was_lost(self) -> None:
        log.warning("The D-Bus connection to %s was closed", self._link.address)
        self._fail_pending()
        for callback in tuple(self._on_closed):
            callback()

    def _fail_pending(self) -> None:
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
        timeout: float = PATIENCE,
    ) -> tuple[Any, ...]:
        """Call a method; returns the reply's values.

        `signature` is that of the arguments, without the outer parentheses. A `v` takes a Var. An `h` takes an index
        into `fds`, which remain the caller's. The caller closes a descriptor in the reply (one that isn't inside an
        array or a struct). Raises BusError (an error reply, or no connection) or TimedOut.
        """
        return self.codec.unpack(
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
        """Send a call; returns the message that answers it. Raises BusError for an error."""
        message = self.codec.gio.DBusMessage.new_method_call(destination, path, interface, method)
        if signature:
            message.set_body(self.codec.pack_as_is(signature, args))
        self.codec.attach(message, fds)
        serial = self._link.send(message)
        # Replies are handled on this loop, so none can be handled before its future is in place.
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
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
        if reply.get_message_type() == self.codec.kinds.ERROR:
            values = self.codec.unpack(reply)
            raise BusError(reply.get_error_name(), str(values[0]) if values else "")
        return reply

    async def table(
        self, destination: str, path: str, interface: str, method: str, signature: str = "", args: Sequence[Any] = ()
    ) -> Table:
        """`call` for a method whose answer begins with an array of structs, and contains no descriptors."""
        reply = await self._roundtrip(destination, path, interface, method, signature, args, timeout=PATIENCE)
        return Table(reply.get_body().get_child_value(0))

    async def properties(
        self, destination: str, path: str, interface: str, names: Sequence[str], *, timeout: float = PATIENCE
    ) -> dict[str, Any]:
        """Some of an object's properties, in one call; BusError if it lacks one of them.

        The others aren't converted to Python values: a service unit has some 400, which would take milliseconds.
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
        """Broadcast a signal. Dropped if the connection is lost."""
        message = self.codec.gio.DBusMessage.new_signal(path, interface, member)
        message.set_body(self.codec.pack(signature, values))
        with contextlib.suppress(BusError):
            self._link.send(message)

    def send(self, message: Any) -> None:
        """Send a ready-made message, from any thread. Dropped if the connection is lost."""
        with contextlib.suppress(BusError):
            self._link.send(message)

    async def _ask_bus(self, method: str, signature: str, *arguments: Any) -> tuple[Any, ...]:
        return await self.call(DBUS, DBUS_PATH, DBUS, method, signature, arguments)

    # Messages in

    def _sort(self, message: Any) -> Way:
        """Runs in GDBus's worker thread."""
        kinds, kind = self.codec.kinds, message.get_message_type()
        if kind == kinds.SIGNAL:
            return Way.LOOP if self._signals.listens(message) else Way.NOWHERE
        if kind == kinds.METHOD_CALL:
            gate = self._gate
            if gate is not None and not gate(message):
                return Way.NOWHERE
            if message.get_interface() == PEER:
                return Way.GDBUS
        return Way.LOOP

    def _receive(self, message: Any) -> None:
        kinds = self.codec.kinds
        kind = message.get_message_type()
        if kind in (kinds.METHOD_RETURN, kinds.ERROR):
            future = self._pending.get(message.get_reply_serial())
            if future is not None and not future.done():
                future.set_result(message)
        elif kind == kinds.SIGNAL:
            if message.get_sender() == DBUS and message.get_member() == "NameLost":
                self._name_lost(*self.codec.unpack(message))
            self._signals.receive(message, self.codec.unpack)
        elif kind == kinds.METHOD_CALL:
            call = MethodCall(self, message)
            if self._handler is None:
                call.error("org.freedesktop.DBus.Error.UnknownMethod", "There are no objects here")
            else:
                self._handler(call)

    async def subscribe(
        self,
        sender: str | None,
        interface: str,
        member: str | None,
        path: str | None,
        callback: Callback,
        *,
        arg0: str | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """Have `callback(path, interface, member, args)` called for each such signal, as soon as this returns.

        With `arg0` the bus sends only those with this first argument; the callback may also get others that another
        subscription has requested.

        Signals of a well-known name count only if its owner sent them: everybody on a bus may send us anything. Call
        and await the result to end the subscription.
        """
        return await self._signals.subscribe(sender, interface, member, path, callback, arg0=arg0)

    # Being a service

    def serve(self, handler: Callable[[MethodCall], None] | None, gate: Callable[[Any], bool] | None = None) -> None:
        """Have `handler` called, on the loop, for every incoming call except those of org.freedesktop.DBus.Peer.

        `gate` is first called with each message, including Peer's, and False drops it. It runs in GDBus's worker
        thread; no other message gets through until it returns.
        """
        self._handler = handler
        self._gate = gate

    async def own_name(self, name: str, lost: Callable[[], None] | None = None) -> None:
        """Take a well-known name for good: nobody can take it from us, and `lost` runs if the bus does so
        nevertheless.

        Raises Exists if somebody has it, BusError if the bus's policy forbids it.
        """
        (answer,) = await self.call(DBUS, DBUS_PATH, DBUS, "RequestName", "su", (name, DO_NOT_QUEUE))
        if answer not in (PRIMARY_OWNER, ALREADY_OWNER):
            raise errors.Exists(f"the D-Bus name {name} is taken", hint=f"See: busctl status {name}")
        self._lost[name] = lost or (lambda: None)

    async def release_name(self, name: str, *, timeout: float = PATIENCE) -> None:
        """Release a name; `lost` isn't called. Everything sent to the name before has arrived when this returns."""
        self._lost.pop(name, None)
        await self.call(DBUS, DBUS_PATH, DBUS, "ReleaseName", "s", (name,), timeout=timeout)

    async def flush(self, *, timeout: float = PATIENCE) -> None:
        """Wait until the bus has received everything that was sent; `close` would discard the rest."""
        # Not Ping: the usual policy of a system bus forbids sending it to the bus itself, and logs each attempt.
        await self.call(DBUS, DBUS_PATH, DBUS, "GetId", timeout=timeout)

    def _name_lost(self, name: str) -> None:
        if lost := self._lost.pop(name, None):
            log.warning("The D-Bus name %s was lost", name)
            lost()
