# SPDX-License-Identifier: LGPL-2.1-or-later
"""qemu.qmp's client, for a QEMU whose guest may have taken it over.

qemu.qmp by itself keeps each event for ever (in its own listener, and in the history of each other one), takes
messages of 10 MiB, and writes whole messages out with indentation for its log and its errors: 256 KiB of brackets
become hundreds of MB. Here an event is delivered and forgotten, a message is limited in size and checked before
qemu.qmp gets it, and no error contains a byte of it. The module is imported for the first guest only: that takes 40
ms.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec
from qemu.qmp import QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import AsyncProtocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

MESSAGE_LIMIT = 128 << 10
"""Bytes of one message. The longest answers have some KiB; asyncio buffers up to four times this."""
TURN = 32
"""Messages after which other tasks get their turn on the loop."""
EAGER = 1000
"""Events before the answer to the handshake: there should be none."""

Event = dict[str, Any]


class Garbled(QMPError):
    """What was received isn't QMP, or is too large. The text is virtd's own, and short."""


class Flood(QMPError):
    """Events came faster than they are taken, and no command was waiting, so the connection was closed."""


class Client(QMPClient):
    """`on_event(event)` gets each, {"event": name, "data": {...}, "timestamp": anything}, and returns whether it took
    it.

    If it doesn't take one, the connection ends with `flooded` set as soon as no command is under way and `busy()` is
    false.
    """

    def __init__(self, on_event: Callable[[Event], bool], busy: Callable[[], bool]) -> None:
        super().__init__(readbuflen=MESSAGE_LIMIT)  # without a name, since each name leaves a logger behind for ever
        self._on_event = on_event
        self._busy = busy
        self._received = 0
        self.flooded = False

    async def reach(self, connection: socket.socket) -> None:
        """Take over a connection, and shake hands. Raises ConnectError.

        Like `connect`, which in addition asserts in the end that nothing has failed since.
        """
        async with self._session_guard("it can't be connected to"):
            await self._do_connect(connection)
        async with self._session_guard("it can't be talked to"):
            await self._establish_session()

    async def _establish_session(self) -> None:
        """The handshake, without out-of-band commands, which virtd doesn't use."""
        self._pending = {}
        # What the previous client didn't read comes first, and may begin in the middle of a line.
        while not (line := await self._line()).startswith(b'{"QMP"'):
            if not line.endswith(b"\n"):
                raise Garbled("it hung up without a greeting")
        await self._send(Message({"execute": "qmp_capabilities"}))
        for _ in range(EAGER):
            if "event" not in (reply := await self._recv()):
                break
        if "return" not in reply:
            raise Garbled("it refused the handshake")
        await AsyncProtocol._establish_session(self)  # QMPClient's own would do it once more

    async def _line(self) -> bytes:
        self._received += 1
        if self._received % TURN == 0:
            await asyncio.sleep(0)
        try:
            return await self._readline()
        except ValueError:  # StreamReader.readline()
            raise Garbled(f"it sent more than {MESSAGE_LIMIT} bytes in one message") from None

    async def _do_recv(self) -> Message:
        line = await self._line()
        try:
            found = msgspec.json.decode(line)
        except msgspec.DecodeError:
            raise Garbled("it sent something that is no JSON") from None
        except RecursionError:
            raise Garbled("it sent a message nested too deeply") from None
        if not isinstance(found, dict) or not isinstance(found.get("id", ""), str):
            raise Garbled("it sent a message that isn't QMP's")
        return Message(found, eager=False)

    async def _on_message(self, msg: Message) -> None:
        if "event" in msg:
            name, data = msg["event"], msg.get("data", {})
            if isinstance(name, str) and isinstance(data, dict):
                event = {"event": name, "data": data, "timestamp": msg.get("timestamp")}
                self.flooded = not self._on_event(event) or self.flooded
        elif (waiting := self._pending.get(cast("str | None", msg.get("id")))) is not None and waiting.empty():
            waiting.put_nowait(msg)
        # An answer that nobody waits for any more is dropped, as QMP's specification has it.
        if self.flooded and not self._pending and not self._busy():
            raise Flood("more events than are taken")

    def _cb_inbound(self, msg: Message) -> Message:
        return msg  # and not into the log, for which its whole text would be formatted

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


def words(exc: BaseException) -> str:
    """An error in words, without anything that QEMU sent, which may be anything and of any size."""
    cause = getattr(exc, "exc", exc)  # a ConnectError's own
    if isinstance(cause, Garbled | Flood):
        return str(cause)
    if isinstance(cause, EOFError):
        return "it hung up"
    if isinstance(cause, OSError):
        return cause.strerror or type(cause).__name__
    return type(cause).__name__
