# SPDX-License-Identifier: LGPL-2.1-or-later
"""GDBus's connection, the thread that waits for its end, and the one way from GDBus to the asyncio loop.

pydbus makes the connection (a private one, which never ends the process when the bus goes away). Its synchronous
proxies and its server half aren't used. Instead, one message filter hands every incoming message to the asyncio loop,
and all outgoing ones are sent from there. That is one hop for each message from GDBus's own worker thread, and
nothing else: no introspection before a call, no GLib main loop in the path, any number of calls in flight, and no
GDBusMethodInvocation, which most PyGObject versions leak (about 3 kB for each call that a service answers).

gi and pydbus cost 60 ms and several megabytes, so they are imported by `Link.open()`, in its thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from ... import errors
from .message import DBUS, DBUS_PATH, DISCONNECTED, BusError, Codec

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds that a close waits for GDBus to release us.
LINGER: Final = 1.0


class Way(enum.Enum):
    """The destination of an incoming message."""

    LOOP = enum.auto()
    GDBUS = enum.auto()  # it answers org.freedesktop.DBus.Peer for us
    NOWHERE = enum.auto()


class Link:
    """A connection, from `open` on, for use on the asyncio loop that made it.

    `sort` decides, in GDBus's worker thread, where each incoming message goes. `receive` gets it on the loop. `lost`
    runs on the loop, once, when the connection is lost (but not for `close`). A lost connection stays lost.
    """

    def __init__(
        self,
        address: str,
        *,
        sort: Callable[[Any], Way],
        receive: Callable[[Any], None],
        lost: Callable[[], None],
    ) -> None:
        self.address = address
        self.unique_name = ""
        self.closed = False
        self.codec: Codec
        self._sort = sort
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._gio: Any = None
        self._glib: Any = None
        self._connection: Any = None
        self._holder: Any = None
        self._context: Any = None
        self._stopping = False
        self._told = False
        self._filter_freed = threading.Event()
        self._finished = asyncio.Event()
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        """Raises HostError if there is no bus, or if gi and pydbus are not installed."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="virtd-bus", daemon=True)
        self._thread.start()
        await ready

    async def close(self) -> None:
        """Disconnect and end the thread. Idempotent, also after the connection has been lost."""
        self._stopping = True
        if self._context is not None:
            self._context.wakeup()
        await self._finished.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.closed = True
        if self._connection is None:
            return
        # The worker thread may hold the last reference to the connection, whose release frees descriptors.
        freed = asyncio.Event()
        self._connection.weak_ref(self._post, freed.set)
        self._connection = self._context = None
        self._holder = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await freed.wait()

    def send(self, message: Any) -> int:
        """Send a message from any thread; returns its serial. Raises BusError if the connection is lost."""
        if self.closed or self._connection is None:
            raise BusError(DISCONNECTED, "the D-Bus connection is closed")
        try:
            self._connection.send_message(message, self._gio.DBusSendMessageFlags.NONE)
        except self._glib.Error as exc:
            raise BusError(DISCONNECTED, f"the D-Bus connection is closed: {exc.message}") from exc
        serial: int = message.get_serial()
        return serial

    # The thread

    def _run(self, ready: asyncio.Future[None]) -> None:
        """The thread: imports, connects, and waits for the connection's end, which only a GLib loop notices."""
        try:
            self._connect()
            self._post(_resolve, ready, None)
            while not self._stopping:
                self._context.iteration(may_block=True)
            self._disconnect()
            self._context.pop_thread_default()
        except BaseException as exc:
            self._post(_resolve, ready, exc)
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
        self.codec = Codec(Gio, GLib)
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
        # An object of its own, so that it can be seen when GDBus has released it.
        listener = functools.partial(self._filter)
        self._filter_number = connection.add_filter(listener)
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
        # A source of this context reports the closing. It holds the connection, which holds the context: unless it
        # runs, none of them is ever freed.
        while not self._told:
            self._context.iteration(may_block=True)
        self._connection.disconnect(self._closed_handler)
        self._connection.remove_filter(self._filter_number)
        # Another source frees the filter. It is dispatched when the worker thread has returned from the filter,
        # perhaps later.
        deadline = time.monotonic() + LINGER
        while not self._filter_freed.is_set() and time.monotonic() < deadline:
            if not self._context.iteration(may_block=False):
                time.sleep(0.0005)
        # GDBus leaves the socket of a connection that was lost open until its last reference is dropped.
        with contextlib.suppress(self._glib.Error):
            self._connection.get_stream().close(None)

    def _on_closed_signal(self, *_: Any) -> None:
        self._told = True
        self._post(self._closed)

    def _filter(self, _connection: Any, message: Any, incoming: bool, *_: Any) -> Any:  # noqa: FBT001
        """Runs in GDBus's worker thread. GDBus handles the message that it returns.

        Everybody on a bus may send us as much as they like, and an unlimited number of messages can wait for the
        loop: so those that nobody has subscribed to end here.
        """
        if not incoming:
            return message
        way = self._sort(message)
        if way is Way.LOOP:
            self._post(self._receive, message)
        return message if way is Way.GDBUS else None

    # The loop

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        # The loop may have been closed meanwhile; then there is nobody left to notify.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _closed(self) -> None:
        if self._stopping or self.closed:
            return
        self.closed = True
        self._lost()


def _resolve(future: asyncio.Future[None], exc: BaseException | None) -> None:
    if future.done():
        return
    if exc is None:
        future.set_result(None)
    else:
        future.set_exception(exc)
