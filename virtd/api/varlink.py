# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink front end (https://varlink.org): JSON objects, each ended by a NUL byte, on a unix socket.

virtdctl speaks it, and so does varlinkctl(1). It is available before the D-Bus front end, since it needs only a
socket, which systemd holds open while the daemon is away: a call made during a restart waits there and is answered.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import msgspec

from .. import __version__, errors
from ..host import Caller, Host, WithDescriptors
from ..host.access import Right
from ..sparing import Sparing
from ..text import plain
from . import idl, interfaces, wire
from .clients import ERRORS, Clients, caller_of
from .limits import Limits, TooMuch, Turn
from .sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from ..replies import Reply

__all__ = ["Connection", "Server", "caller_of"]

log = logging.getLogger(__name__)

SERVICE = "org.varlink.service"
LIMIT = 4 << 20  # bytes of one message; a definition has at most 1 MiB
SMALL = 64 << 10  # for an unprivileged user
PATIENCE = 30.0  # seconds to finish sending a message, and to read a reply
LOOK = 1.0  # seconds between checks whether a client that can't be watched is still there


class Refused(Exception):
    """An invalid call: an error of org.varlink.service."""

    def __init__(self, name: str, parameters: dict[str, str]) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


class Server:
    """Serves listening sockets until `close`; they remain the owner's."""

    def __init__(self, host: Host, *listeners: socket.socket, limits: Limits | None = None) -> None:
        self._host = host
        self._listeners = listeners
        self._limits = limits or Limits()
        self._sharing = Sharing()
        self._sparing = Sparing(log)
        self.clients = Clients(self._limits, lambda connection: caller_of(connection), self._serve)

    def start(self) -> None:
        self.clients.listen(self._listeners)

    async def close(self) -> None:
        """Ends every connection."""
        await self.clients.close()
        await self._sharing.close()

    def _serve(self, connection: socket.socket, caller: Caller) -> Connection:
        return Connection(self._host, connection, caller, self._limits, self._sharing, self._sparing)


class Connection:
    """One client. Its calls are answered in order, one at a time, as Varlink requires."""

    def __init__(
        self,
        host: Host,
        connection: socket.socket,
        caller: Caller,
        limits: Limits,
        sharing: Sharing,
        sparing: Sparing,
    ) -> None:
        self._host = host
        self._socket = connection
        self._socket.setblocking(False)
        self.caller = caller
        self._limits = limits
        self._sharing = sharing
        self._sparing = sparing
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._most = LIMIT if caller.uid == 0 else SMALL
        self.since: float | None = self._loop.time()

    async def serve(self) -> None:
        try:
            while (message := await self._receive()) is not None:
                self.since = None
                if not await self._answer(message):
                    break
                self.since = self._loop.time()
        except (OSError, TooMuch, TimeoutError) as exc:
            log.debug("A client's connection ended: %r", exc)
        except Exception:
            # Nobody awaits this task, and asyncio would log each one.
            self._sparing.exception("A bug: a connection of %s broke", self.caller.name)
        finally:
            self._socket.close()

    def close(self) -> None:
        self._socket.close()

    async def _receive(self) -> bytes | None:
        """The next message without its NUL; None at the end."""
        searched = 0
        begun = None
        while (end := self._buffer.find(0, searched)) < 0:
            searched = len(self._buffer)
            if searched > self._most:
                await self._too_long()
                return None
            if self.caller.uid == 0:
                chunk = await self._loop.sock_recv(self._socket, 1 << 16)
            else:
                # A client must finish a message that it has begun: until then it occupies our memory.
                if begun is None and searched:
                    begun = self._loop.time()
                async with asyncio.timeout_at(None if begun is None else begun + PATIENCE):
                    chunk = await self._loop.sock_recv(self._socket, 1 << 14)
            if not chunk:
                return None
            self._buffer += chunk
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return message

    async def _too_long(self) -> None:
        self._buffer.clear()
        if self.caller.uid == 0:
            refusal: errors.VirtdError = errors.HostError(f"A message has more than {LIMIT >> 20} MiB")
        else:
            refusal = errors.AccessDenied(
                f"{self.caller.name} may not send more than {SMALL >> 10} KiB at a time",
                hint="Only root may change anything or read consoles.",
            )
        await self._send(wire.encode(_failure(refusal)) + b"\0", [])

    async def _answer(self, message: bytes) -> bool:
        """Answer one call; False when the connection must end."""
        turn = await self._limits.turn(self.caller.uid)
        size = 0
        fds: list[int] = []
        try:
            try:
                call = msgspec.json.decode(message)
                method, parameters = call["method"], call.get("parameters") or {}
                if not isinstance(method, str) or not isinstance(parameters, dict):
                    return False
                oneway, more = bool(call.get("oneway")), bool(call.get("more"))
            except (msgspec.MsgspecError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return False
            try:
                found = self._find(method, parameters)
                if found is not None and not self._host.access.allows(self.caller, method, found.right):
                    turn.leave()
                    await self._unless_gone(self._host.access.ask(self.caller, method, found.right))
                if found is not None and found.stream is not None:
                    if not more:
                        raise Refused(f"{SERVICE}.ExpectedMore", {})
                    if found.waiting:
                        turn.leave()
                    await self._stream(found.stream(self._host, self.caller, parameters))
                    return True
                result = await self._call(found, method, parameters, turn)
                if isinstance(result, WithDescriptors):
                    fds = result.fds
                    result = result.value
                data = result if isinstance(result, bytes) else wire.encode({"parameters": result})
            except Refused as refused:
                data = wire.encode({"error": refused.name, "parameters": refused.parameters})
            except errors.VirtdError as error:
                data = wire.encode(_failure(error))
            except ConnectionError:
                raise
            except Exception as exc:
                # A bug of ours, or a file system that behaves unexpectedly. Hanging up instead would look like a
                # restart of the daemon, after which clients repeat their call.
                self._sparing.exception("%s failed", plain(method[:100]))
                failure = errors.HostError(
                    f"{method.rpartition('.')[2]} failed: {exc}", hint="See: journalctl -u virtd.service"
                )
                data = wire.encode(_failure(failure))
            size = len(data)
            turn.leave(size)
            if not oneway:
                await self._send(data + b"\0", fds)
        finally:
            turn.leave(size)
            for fd in fds:
                os.close(fd)
        return True

    def _find(self, method: str, parameters: dict[str, Any]) -> interfaces.Method | None:
        """The method, if its parameters fit and its caller isn't known to lack the right; None for
        org.varlink.service.
        """
        interface, _, name = method.rpartition(".")
        if interface == SERVICE:
            return None
        if interface not in interfaces.MODULES:
            raise Refused(f"{SERVICE}.InterfaceNotFound", {"interface": interface})
        table = interfaces.methods(interface)
        if name not in table:
            raise Refused(f"{SERVICE}.MethodNotFound", {"method": method})
        self._host.access.allows(self.caller, method, table[name].right)  # before anything is said about parameters
        if (wrong := idl.problem(interface, name, parameters)) is not None:
            raise Refused(f"{SERVICE}.InvalidParameter", {"parameter": wrong})
        return table[name]

    async def _call(
        self, found: interfaces.Method | None, method: str, parameters: dict[str, Any], turn: Turn
    ) -> Any:
        """The answer; the whole reply as bytes, if others get the same."""
        if found is None:
            return _service(method.rpartition(".")[2], parameters)
        assert found.answer is not None
        answer = found.answer
        if found.shared and self.caller.uid != 0:
            key = (method, msgspec.json.encode(parameters, order="sorted"))

            async def find() -> bytes:
                return wire.encode({"parameters": await answer(self._host, self.caller, parameters)})

            return await self._unless_gone(self._sharing.get(key, find))
        if found.waiting:
            turn.leave()
        if found.waiting or found.right is Right.LOOK:
            return await self._unless_gone(answer(self._host, self.caller, parameters))
        return await answer(self._host, self.caller, parameters)

    async def _unless_gone(self, answer: Awaitable[Any]) -> Any:
        """The result of `answer`, which is cancelled when the client hangs up and so no longer wants it."""
        task = asyncio.ensure_future(answer)
        try:
            await asyncio.sleep(0)
            if not task.done():
                self._look(task)
            return await task
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if ours is not None and ours.cancelling():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise
            raise ConnectionResetError("the client hung up") from None
        finally:
            self._loop.remove_reader(self._socket)

    def _look(self, task: asyncio.Future[Any]) -> None:
        """Cancel `task` as soon as it can be seen that the client has hung up."""
        if task.done():
            return
        self._loop.remove_reader(self._socket)
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN | select.POLLRDHUP)
        events = waiting.poll(0)
        if not events:
            self._loop.add_reader(self._socket, self._look, task)
        elif events[0][1] & ~select.POLLIN:
            task.cancel()
        else:
            # The next call has already arrived; behind it, an end of file shows only by polling.
            self._loop.call_later(LOOK, self._look, task)

    async def _stream(self, replies: AsyncIterator[Reply | WithDescriptors]) -> None:
        """Send what `replies` yields until it ends or the client hangs up.

        A message from the client would be out of turn, and counts as hanging up.
        """
        gone = asyncio.ensure_future(self._receive())
        iterator = aiter(replies)
        following: asyncio.Future[Reply | WithDescriptors] | None = None
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
                    reply = {"parameters": value, "continues": value.get("event") is None}
                    await self._send(wire.encode(reply) + b"\0", fds)
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

    async def _send(self, data: bytes, fds: list[int]) -> None:
        """Raises TooMuch or TimeoutError for a client that doesn't read."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
        if sent == len(data):
            return
        uid, left = self.caller.uid, len(data) - sent
        self._limits.unsent(uid, left)
        try:
            async with asyncio.timeout(PATIENCE):
                while not sent:
                    await self._writable()
                    with contextlib.suppress(BlockingIOError):
                        sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
                await self._loop.sock_sendall(self._socket, memoryview(data)[sent:])
        finally:
            self._limits.unsent(uid, -left)

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._socket, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_writer(self._socket)


def _failure(error: errors.VirtdError) -> dict[str, Any]:
    """The reply for an error: its class, or the nearest one above it that has a name on the wire, and its fields."""
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.KINDS)
    return {"error": f"{ERRORS}.{kind}", "parameters": error.fields()}


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
                from . import types  # nothing else needs it

                return {"description": types.description(wanted)}
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
