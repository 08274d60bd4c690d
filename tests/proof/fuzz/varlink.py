# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comes over the Varlink socket, from root and from others: messages of any kind, whose replies are read."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

from virtd.api.limits import Limits
from virtd.api.sharing import Sharing
from virtd.api.varlink import Connection
from virtd.host import Caller
from virtd.host.access import Access
from virtd.sparing import Sparing

SEEDS = (
    b'{"method":"org.virtd1.List"}\0{"method":"org.virtd1.Info","parameters":{"name":"web1"}}\0',
    b'{"method":"org.virtd1.Wait","parameters":{"name":"a","states":["running"],"timeout":1e400}}\0',
    b'{"method":"org.virtd1.Kill","parameters":{"name":"a","signal":99999999999999999999999}}\0',
    b'{"method":"org.virtd1.Check","oneway":true}\0{"method":"org.virtd1.Slots","more":true}\0',
    b'{"method":"org.virtd1.OpenConsole","parameters":{"name":"a","force":true},"more":true}\0',
    b'{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.virtd1"}}\0',
    b'{"method":"org.virtd1.Volume.Info","parameters":{"pool":"p","name":"\\ud800"}}\0',
    b'{"method":"org.virtd1.Info","parameters":' + b'{"a":' * 300,
    b"[" * 3000 + b"\0",
    # A name that is false: it once let the rest through unseen.
    b'{"method":"org.virtd1.Info","parameters":{"":"web1"}}\0',
)
WORDS = (
    b"\0", b'"method":', b'"parameters":', b'"more":true', b'"oneway":true', b'"org.virtd1.', b"org.varlink.service.",
    b'"name":', b'"states":[', b'"timeout":', b"1e400", b"-0", b"null", b"\\ud800", b"\\u0000", b"{", b"[", b"NaN",
    b"GetInfo", b"List", b"Info", b"Wait", b"Start", b"Define", b"Network.", b"Container.", b"Pool.", b"Volume.",
)  # fmt: skip
BRIEF = 400


class Echo:
    """A host, and all of its nouns, that answers with what it was asked."""

    access = Access()

    def __getattr__(self, name: str) -> Any:
        if name in ("domains", "networks", "containers", "pools", "volumes", "events"):
            return self

        async def answer(*values: Any, **options: Any) -> Any:
            return {"values": list(values), "options": {key: value for key, value in options.items() if key != "by"}}

        return answer

    async def subscribe(self, since: int | None) -> Any:
        yield {"event": "ended", "since": since}

    async def open_console(self, **options: Any) -> Any:
        yield {"event": "ended", "name": options["name"]}


class Telling(Sparing):
    """What the journal would be told of is a finding."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("fuzz"))
        self.found: BaseException | None = None

    def exception(self, text: str, *values: Any) -> None:
        import sys

        self.found = sys.exc_info()[1]


def target(data: bytes) -> None:
    asyncio.run(_asked(data, Caller.of(len(data) % 2 * 1000, 1)))


async def _asked(data: bytes, caller: Caller) -> None:
    ours, theirs = socket.socketpair()
    telling = Telling()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        theirs.setblocking(False)
        connection = Connection(Echo(), ours, caller, Limits(), Sharing(), telling)  # type: ignore[arg-type]
        serving = asyncio.ensure_future(connection.serve())
        replies = b""
        while True:
            chunk = await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)
            if not chunk:
                break
            replies += chunk
        await serving
    if telling.found is not None:
        raise telling.found
    assert not replies or replies.endswith(b"\0")
    for reply in replies.split(b"\0")[:-1]:
        assert isinstance(json.loads(reply), dict)
