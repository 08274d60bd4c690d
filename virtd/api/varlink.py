# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink front end (https://varlink.org): JSON objects, each ended by a NUL byte, on a unix socket.

virtctl speaks it, and so does varlinkctl(1). It serves before the D-Bus front end can, since it needs nothing but a
socket that systemd holds open while the daemon is away: a call made during a restart waits there and is answered.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import pwd
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from .. import __version__, errors
from ..host import Caller, Host, WithDescriptors
from ..text import plainly
from . import idl, interfaces

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

log = logging.getLogger(__name__)

SERVICE = "org.varlink.service"
ERRORS = "org.virtd1"  # all interfaces share its errors
LIMIT = 4 << 20  # bytes of one message; a definition has at most 1 MiB


class Refused(Exception):
    """A call that isn't one: an error of org.varlink.service."""

    def __init__(self, name: str, parameters: dict[str, str]) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


class Server:
    """Accepts connections on a listening socket until `close`."""

    def __init__(self, host: Host, listener: socket.socket) -> None:
        self._host = host
        self._listener = listener
        self._listener.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._accepting = asyncio.create_task(self._accept(), name="varlink-accept")

    async def close(self) -> None:
        """Ends every connection; the listening socket stays the owner's."""
        tasks = [*self._tasks, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as exc:
                # Out of descriptors, most likely. Who waits in the backlog is served when there are some again.
                log.warning("Cannot accept a client: %s", exc.strerror)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(Connection(self._host, connection).serve(), name="varlink-connection")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class Connection:
    """One client. Its calls are answered in order, one at a time, as Varlink has it."""

    def __init__(self, host: Host, connection: socket.socket) -> None:
        self._host = host
        self._socket = connection
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()

    async def serve(self) -> None:
        try:
            self._caller = caller_of(self._socket)
            while (message := await self._receive()) is not None:
                if not await self._answer(message):
                    break
        except (OSError, ValueError) as exc:
            log.debug("A client's connection ended: %s", exc)
        finally:
            self._socket.close()

    async def _receive(self) -> bytes | None:
        """The next message without its NUL; None at the end."""
        searched = 0
        while (end := self._buffer.find(0, searched)) < 0:
            searched = len(self._buffer)
            if searched > LIMIT:
                raise ValueError("a message is too long")
            chunk = await self._loop.sock_recv(self._socket, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return message

    async def _answer(self, message: bytes) -> bool:
        """Answer one call; False when the connection must end."""
        try:
            call = msgspec.json.decode(message)
            method, parameters = call["method"], call.get("parameters") or {}
            if not isinstance(method, str) or not isinstance(parameters, dict):
                return False
        except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
            return False
        fds: list[int] = []
        oneway, more = bool(call.get("oneway")), bool(call.get("more"))
        try:
            found = self._find(method, parameters)
            if found is not None and found.stream is not None:
                if not more:
                    raise Refused(f"{SERVICE}.ExpectedMore", {})
                await self._stream(found.stream(self._host, self._caller, parameters))
                return True
            result = await self._call(found, method, parameters)
        except Refused as refused:
            reply = {"error": refused.name, "parameters": refused.parameters}
        except errors.VirtdError as error:
            reply = {"error": f"{ERRORS}.{_kind(error)}", "parameters": error.fields()}
        except ConnectionError:
            raise
        except Exception as exc:
            # A bug of ours, or a file system that we didn't expect. Hanging up instead would look like a restart of
            # the daemon, after which clients repeat their call.
            log.exception("%s failed", method)
            failure = errors.HostError(
                f"{method.rpartition('.')[2]} failed: {exc}", hint="See: journalctl -u virtd.service"
            )
            reply = {"error": f"{ERRORS}.{_kind(failure)}", "parameters": failure.fields()}
        else:
            fds = result.fds if isinstance(result, WithDescriptors) else []
            reply = {"parameters": result.value if isinstance(result, WithDescriptors) else result}
        try:
            if not oneway:
                await self._send(reply, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _find(self, method: str, parameters: dict[str, Any]) -> interfaces.Method | None:
        """The method, if its caller may and its parameters fit; None for one of org.varlink.service."""
        interface, _, name = method.rpartition(".")
        if interface == SERVICE:
            return None
        if interface not in interfaces.MODULES:
            raise Refused(f"{SERVICE}.InterfaceNotFound", {"interface": interface})
        table = interfaces.methods(interface)
        if name not in table:
            raise Refused(f"{SERVICE}.MethodNotFound", {"method": method})
        if not table[name].reading and self._caller.uid != 0:
            raise errors.AccessDenied(
                f"{self._caller.name} may not call {name}",
                hint="Only root may change anything or read consoles.",
            )
        if wrong := idl.problem(interface, name, parameters):
            raise Refused(f"{SERVICE}.InvalidParameter", {"parameter": wrong})
        return table[name]

    async def _call(self, found: interfaces.Method | None, method: str, parameters: dict[str, Any]) -> Any:
        if found is None:
            return _service(method.rpartition(".")[2], parameters)
        assert found.answer is not None
        answer = found.answer(self._host, self._caller, parameters)
        return await (self._unless_gone(answer) if found.waiting else answer)

    async def _unless_gone(self, answer: Awaitable[Any]) -> Any:
        """What `answer` brings; for one that may take for ever it ends when the client hangs up."""
        task = asyncio.ensure_future(answer)

        def look() -> None:
            try:
                waiting = self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                waiting = b""
            # Either way there is nothing more to be learnt: a client that sent its next call is there.
            self._loop.remove_reader(self._socket)
            if not waiting:
                task.cancel()

        self._loop.add_reader(self._socket, look)
        try:
            return await task
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if ours is not None and ours.cancelling():
                raise
            raise ConnectionResetError("the client hung up") from None
        finally:
            self._loop.remove_reader(self._socket)

    async def _stream(self, replies: AsyncIterator[dict[str, Any] | WithDescriptors]) -> None:
        """Send what `replies` yields until it ends or the client hangs up.

        A message from the client would be out of turn, and counts as hanging up.
        """
        gone = asyncio.ensure_future(self._receive())
        iterator = aiter(replies)
        following: asyncio.Future[dict[str, Any] | WithDescriptors] | None = None
        try:
            while True:
                following = asyncio.ensure_future(anext(iterator))
                await asyncio.wait((gone, following), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                fds = item.fds if isinstance(item, WithDescriptors) else []
                value = item.value if isinstance(item, WithDescriptors) else item
                try:
                    await self._send({"parameters": value, "continues": "event" not in value}, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        finally:
            tasks: list[asyncio.Future[Any]] = [gone] if following is None else [gone, following]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if close := getattr(iterator, "aclose", None):
                await close()

    async def _send(self, reply: dict[str, Any], fds: list[int]) -> None:
        try:
            data = msgspec.json.encode(reply) + b"\0"
        except UnicodeEncodeError:  # the name of somebody's file, or of a network interface
            data = msgspec.json.encode(plainly(reply)) + b"\0"
        if fds:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = 0
            while not sent:
                try:
                    sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await self._writable()
            data = data[sent:]
        if data:
            await self._loop.sock_sendall(self._socket, data)

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._socket, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_writer(self._socket)


def caller_of(connection: socket.socket) -> Caller:
    """Who is at the other end, as the kernel knows it (unix(7), SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    name = "root" if uid == 0 else str(uid)
    if uid:
        with contextlib.suppress(KeyError):
            name = pwd.getpwuid(uid).pw_name
    return Caller(uid=uid, pid=pid, name=name)


def _kind(error: errors.VirtdError) -> str:
    """The error's class, or the nearest one above it that has a name on the wire."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.KINDS)


def _service(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """org.varlink.service: what every Varlink service answers about itself."""
    match method:
        case "GetInfo":
            return {
                "vendor": "virtd",
                "product": "virtd",
                "version": __version__,
                "url": "https://varlink.org",
                "interfaces": [SERVICE, *interfaces.MODULES],
            }
        case "GetInterfaceDescription":
            wanted = parameters.get("interface")
            if wanted in interfaces.MODULES:
                return {"description": idl.text(wanted)}
            if wanted == SERVICE:
                return {"description": _SERVICE_TEXT}
            raise Refused(f"{SERVICE}.InterfaceNotFound", {"interface": str(wanted)})
        case _:
            raise Refused(f"{SERVICE}.MethodNotFound", {"method": f"{SERVICE}.{method}"})


_SERVICE_TEXT = """interface org.varlink.service
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound(interface: string)
error MethodNotFound(method: string)
error MethodNotImplemented(method: string)
error InvalidParameter(parameter: string)
error PermissionDenied()
error ExpectedMore()
"""
