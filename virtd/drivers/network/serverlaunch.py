# SPDX-License-Identifier: LGPL-2.1-or-later
"""The start of one network's dnsmasq, and its error messages if that fails."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from ... import errors
from ...children.child import Child
from ...children.launch import Launch
from ...objects.protocol import Problem
from ...systemd.state import CLD_EXITED, UnitState, signal_name
from ...text import span
from . import dnsmasq, prerequisites
from .netrecord import DRIVER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...model.network import Network
    from ...records import Process
    from ...systemd.transient import UnitSpec
    from .netrecord import NetRecord

READY_LIMIT = 10.0  # seconds from its start until its sockets are open
LOOK = 0.01  # seconds between two checks for that


class ServerLaunch(Launch):
    """One attempt. `begun` receives the child once it is recorded; `put_away` clears away a failed one."""

    def __init__(
        self,
        net: NetRecord,
        network: Network,
        begun: Callable[[Child], None],
        put_away: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(
            Child(net.shared.services, DRIVER, net.name),
            f"Cannot start network {net.name}",
            f"Network {net.name}: dnsmasq",
            net.fields(),
        )
        self.net = net
        self.network = network
        self.begun = begun
        self.put_away = put_away
        self.files = dnsmasq.files_in(net.runtime, net.state_directory)

    def require(self) -> None:
        settings = self.net.shared.settings
        self.account = prerequisites.account(settings, self.services.facts)
        self.binary = prerequisites.dnsmasq(settings)

    def remember(self, promise: Process) -> None:
        self.net.save(**promise)

    def begin(self) -> None:
        self.begun(self.child)

    def spec(self) -> UnitSpec:
        return dnsmasq.spec(self.network, self.net.unit, self.binary, self.files, self.account)

    def know(self, identity: Process) -> None:
        self.net.save(**identity)

    async def come_up(self) -> None:
        """Wait until its sockets are open, or it has ended. Raises StartFailed."""
        child, name = self.child, self.net.name
        deadline = time.monotonic() + READY_LIMIT
        while child.alive():
            # The pump writes it to the log within a tenth of a second, because the log is watched.
            if dnsmasq.READY in _read(self.net, self.words_from):
                return
            if time.monotonic() > deadline:
                raise errors.StartFailed(f"dnsmasq of network {name} isn't ready after {span(READY_LIMIT)}")
            await asyncio.sleep(LOOK)
        await child.drain()
        raise errors.StartFailed(f"dnsmasq of network {name} {how(await child.verdict())} at its start")

    async def failed(self, _why: BaseException) -> None:
        if self.remembered:
            await self.put_away()

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        words = _words(self.net, self.words_from)
        if not isinstance(exc, errors.StartFailed) or not words:
            return exc
        more, hint = _explained(words, self.account) or ("", f"See {self.files.config}.")
        return errors.StartFailed(f"dnsmasq of network {self.net.name} didn't start: {words}{more}", hint=hint)

    def trouble(self, text: str) -> None:
        self.net.problems["server"] = Problem(text)


def how(state: UnitState | None) -> str:
    """How dnsmasq ended, in words."""
    if state is None:
        return "ended, nobody knows how"
    if state.exec_code == CLD_EXITED:
        return f"exited with status {state.exec_status}"
    return f"was killed by {signal_name(state.exec_status)}" if state.exec_code else "ended"


def _read(net: NetRecord, since: int) -> bytes:
    """At most 64 KiB of its log, from the offset `since`."""
    try:
        with open(net.shared.services.paths.stderr_log(DRIVER, net.name), "rb") as file:
            if os.fstat(file.fileno()).st_size < since:  # rotated meanwhile
                since = 0
            file.seek(since)
            return file.read(1 << 16)
    except OSError:
        return b""


def _explained(words: str, account: prerequisites.Account) -> tuple[str, str] | None:
    """An explanation and a hint, for an error that isn't about the configuration; None for others."""
    if "create inotify: Too many open files" not in words:
        return None
    from .. import inotify  # imported late: the daemon can start without it

    more = (
        f" (processes of {account.user} have {inotify.taken(account.uid)} inotify instances, and "
        f"fs.inotify.max_user_instances is {inotify.limit()})"
    )
    return more, f"{inotify.hint()} A network that is isolated, or has no DNS (dns = false), needs none."


def _words(net: NetRecord, since: int) -> str:
    """Its last lines, without its name before each."""
    lines = _read(net, since).decode(errors="replace").splitlines()
    return "; ".join(line.partition(": ")[2] or line for line in lines[-2:] if line)
