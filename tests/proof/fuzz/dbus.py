# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages that come over the bus, from root and from others, as bytes: past the door, to what they mean."""

from __future__ import annotations

import asyncio
import contextlib
import io
import warnings
from typing import Any

from tests.proof.fuzz.varlink import Echo, Telling
from virtd.api.dbus import Refused, Server
from virtd.host import Caller
from virtd.replies import Gone
from virtd.systemd.bus import Bus, MethodCall
from virtd.systemd.bus.link import Way
from virtd.systemd.bus.message import Codec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gi.repository import Gio, GLib

ROOT, OTHER = ":1.1", ":1.2"


class NoBus(Bus):
    """One that nobody is on: what is sent is made into bytes, and what comes in is given by hand."""

    def __init__(self) -> None:
        super().__init__("")
        self._link.codec = Codec(Gio, GLib)

    def send(self, message: Any) -> None:
        message.to_blob(Gio.DBusCapabilityFlags.NONE)


def _seed(sender: str, path: str, interface: str, member: str, body: Any = None) -> bytes:
    message = Gio.DBusMessage.new_method_call("org.virtd1", path, interface, member)
    message.set_sender(sender)
    message.set_serial(7)
    if body is not None:
        message.set_body(body)
    data: bytes = message.to_blob(Gio.DBusCapabilityFlags.NONE)
    return data


DOMAIN = "/org/virtd1/domain/web1"
SEEDS = (
    _seed(ROOT, "/org/virtd1", "org.virtd1.Manager", "List"),
    _seed(OTHER, "/org/virtd1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
    _seed(
        OTHER, DOMAIN, "org.freedesktop.DBus.Properties", "Get", GLib.Variant("(ss)", ("org.virtd1.Domain", "State"))
    ),
    _seed(ROOT, DOMAIN, "org.virtd1.Domain", "Kill", GLib.Variant("(i)", (-1,))),
    _seed(OTHER, DOMAIN, "org.virtd1.Domain", "Wait", GLib.Variant("(asd)", (["running"], float("nan")))),
    _seed(OTHER, "/org/virtd1/domain", "org.freedesktop.DBus.Introspectable", "Introspect"),
    _seed(ROOT, "/org/virtd1", "org.virtd1.Manager", "Define", GLib.Variant("(ssb)", ("x", "y", True))),
)
WORDS = (
    b"_3a",
    b"_",
    b"org.virtd1.",
    b"(asd)",
    b"av",
    b"v\0",
    b"\xff\xff\xff\xff",
    b"web1",
    b"/",
    b":1.1\0",
    b":1.2\0",
)
BRIEF = 400


def target(data: bytes) -> None:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # PyGObject tells of what it can't tell
            message = Gio.DBusMessage.new_from_blob(data, Gio.DBusCapabilityFlags.NONE)
    except (GLib.Error, TypeError, RuntimeError):
        return  # GDBus ends such a connection (and PyGObject can't read all of its errors)
    if message.get_serial():  # a bus lets no other through
        asyncio.run(_came(message))


async def _called(server: Server, call: MethodCall) -> None:
    if call.sender not in server._callers:
        return
    if call.member in ("Wait", "WaitJob"):
        with contextlib.suppress(Refused):
            server._resolve(call)  # what waits asks the bus for its caller first
        return
    await server._answer(call)


async def _came(message: Any) -> None:
    bus = NoBus()
    host: Any = Echo()
    server = Server(host, bus)
    server._sparing = telling = Telling()
    server._objects["domain"]["web1"] = Gone(name="web1", driver="qemu")
    server._callers |= {ROOT: Caller.of(0, 1), OTHER: Caller.of(1000, 1)}
    bus.serve(None, server._door.admits)
    if bus._sort(message) is Way.LOOP:
        if message.get_message_type() == Gio.DBusMessageType.METHOD_CALL:
            await _called(server, MethodCall(bus, message))
        else:
            bus._receive(message)
    # The echoing host's answers have none of the keys that a real one's have: only what is known of the call counts.
    if telling.found is not None and not isinstance(telling.found, (KeyError, TypeError, AttributeError, ValueError)):
        raise telling.found
