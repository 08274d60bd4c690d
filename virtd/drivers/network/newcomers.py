# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services that began to listen on a port of the host that is already forwarded: nobody outside can reach them.

A start is refused if somebody listens, see holdings.py. The kernel doesn't announce sockets, so they are listed from
time to time. A UDP socket may be a client's, which uses any port for a moment, so it counts only after a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from ... import journal
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from . import listening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .listening import Served
    from .netrecord import NetRecord

LASTING = 5.0  # seconds until a UDP socket is assumed to be a server's
KEY = "served "  # prefix of these problems' keys
NOTED = "served"  # their key in the record
log = logging.getLogger(__name__)


class Newcomers:
    """The newcomers on all networks' forwarded ports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, float] = {}  # when each socket was first seen, by inode

    async def look(self, nets: Iterable[NetRecord]) -> None:
        """Look at these networks; what is found is reported as their problem for as long as it lasts."""
        for net in list(nets):
            network = net.running if net.state is Activity.ACTIVE else None
            if network is None:
                continue
            try:
                found = await asyncio.to_thread(listening.served, network.forward) if network.forward else []
            except OSError as exc:
                log.debug("Cannot list the ports that the host serves: %s", exc.strerror)
                continue
            if net.state is Activity.ACTIVE and net.running is network:
                said = _said(net)
                _tell(net, [_problem(one) for one in found if self._lasts(one) or _problem(one).text in said])

    def _lasts(self, one: Served) -> bool:
        now = self._clock()
        self._since = {inode: at for inode, at in self._since.items() if now - at < 3600.0}
        return one.protocol == "tcp" or now - self._since.setdefault(one.inode, now) >= LASTING


def recall(net: NetRecord) -> None:
    """Report what an earlier daemon found, until the next look."""
    net.problems |= _keyed([Problem(text, hint) for text, hint in _said(net).items()])


def _said(net: NetRecord) -> dict[str, str]:
    """The reports so far, an earlier daemon's included: texts with their hints."""
    said = net.data.get(NOTED)
    return {str(text): str(hint) for text, hint in said.items()} if isinstance(said, dict) else {}


def _keyed(found: list[Problem]) -> dict[str, Problem]:
    return {f"{KEY}{number}": problem for number, problem in enumerate(found)}


def _tell(net: NetRecord, found: list[Problem]) -> None:
    new = _keyed(found)
    old = {key: problem for key, problem in net.problems.items() if key.startswith(KEY)}
    said = _said(net)
    if new == old:
        return
    for key in old:
        del net.problems[key]
    net.problems |= new
    for problem in found:
        if problem.text not in said:
            journal.send(
                f"Network {net.name}: {problem.text}", message_id=Message.NETWORK_PORT_SERVED, level="warning",
                **net.fields(),
            )  # fmt: skip
    net.keep_data(**{NOTED: {problem.text: problem.hint for problem in found}})
    net.changed()


def _problem(one: Served) -> Problem:
    text = f"forward[{one.number}]: {one.text}, which nobody reaches from outside while the port is forwarded"
    return Problem(text, one.hint)
