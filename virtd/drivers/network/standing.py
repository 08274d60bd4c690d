# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a network's bridge and ports are as virtd made them, and the problem reported if they aren't."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from ... import errors, journal
from ...hints import do, joined
from ...messages import Message
from ...model.state import Activity
from ...objects.protocol import Problem
from . import wanted
from .bridgedrift import bridge_key

if TYPE_CHECKING:
    from ...model.network import Network
    from ...records import Record
    from .drift import Drift
    from .ports import Ground
    from .wanted import Mended

PROBLEM = "bridge"
NOTED = "drift"  # in the record's data: the problem, for the next daemon


class Stood(Protocol):
    """A network, as Standing sees it."""

    name: str
    problems: dict[str, Problem]
    record: Record | None

    @property
    def state(self) -> Activity: ...
    @property
    def current(self) -> Network: ...
    @property
    def tended(self) -> Ground:
        """What is compared while it is active: all except ports that are still being made."""

    async def make(self, network: Network) -> None:
        """Make whichever of its pieces are missing. Raises a VirtdError."""

    def refuse(self, interfaces: set[str]) -> None:
        """Record and report that these ports stay out of the bridge."""

    def keep_data(self, **data: Any) -> None: ...
    def fields(self) -> dict[str, str]: ...
    def changed(self) -> None: ...


class Standing:
    """Compares one network, and reports the remaining differences."""

    def __init__(self, net: Stood) -> None:
        self.net = net
        self.said = 0  # number of reports made, empty ones included

    @property
    def wrong(self) -> bool:
        """Whether a difference is reported."""
        return PROBLEM in self.net.problems

    async def differences(self) -> list[Drift]:
        """All differences except interfaces that have just vanished, whose guests may be ending. Raises HostError."""
        told = self.net.problems.get(PROBLEM)
        return [one for one in await self._compare() if not one.gone or (told is not None and one.text in told.text)]

    async def ensure(self) -> None:
        """Repair everything, for a start. Raises HostError if something that guests need can't be repaired."""
        net = self.net
        mended = await self._mend(frozenset())
        left = [one for one in mended.left if not one.gone]
        if net.state is not Activity.ACTIVE and (needed := [one for one in left if one.vital]):
            texts = "; ".join(one.text for one in needed)
            raise errors.HostError(f"Cannot make network {net.name}: {texts}", hint=needed[0].hint)
        self.say(left)

    async def put_back(self, spared: frozenset[str]) -> Mended:
        """Restore what somebody changed, except these keys. The caller holds the network's lock, and it is active.

        Raises a VirtdError.
        """
        network = self.net.current
        key = bridge_key(network)
        lost = [one for one in await self._compare() if one.key == key and one.mend is not None]
        if not lost or key in spared:
            return await self._mend(spared)
        try:
            await self.net.make(network)  # dnsmasq too: it has lost its addresses
        except errors.VirtdError as exc:
            # Somebody else may have made a bridge first; then that is the difference to report.
            left = await self._compare()
            if not any(one.key == key for one in left):
                raise
            return wanted.Mended([], [_because(one, exc) if one.key == key and one.mend else one for one in left])
        # make() has reported already; something may have changed since.
        mended = await self._mend(spared)
        return wanted.Mended([one for one in lost if one not in mended.left] + mended.done, mended.left)

    async def _compare(self) -> list[Drift]:
        compared = await asyncio.to_thread(wanted.compare, [self.net.tended])
        return compared.drifts[0]

    async def _mend(self, spared: frozenset[str]) -> Mended:
        """Repair differences. Strays are recorded as refused before they are put out, for the next daemon."""
        mended = await asyncio.to_thread(wanted.put_back, self.net.tended, spared)
        strays = {one.stray for one in mended.left if one.stray}
        if not strays:
            return mended
        self.net.refuse(strays)
        again = await asyncio.to_thread(wanted.put_back, self.net.tended, spared)
        return wanted.Mended(mended.done + again.done, again.left)

    def recall(self) -> None:
        """Report what an earlier daemon couldn't repair, until the next comparison."""
        record = self.net.record
        match record.data.get(NOTED) if record is not None else None:
            case [str(text), str(hint)]:
                self.net.problems[PROBLEM] = Problem(text, hint)
            case _:
                pass

    def say(self, left: list[Drift]) -> None:
        """Report the remaining differences, or that there are none."""
        net = self.net
        self.said += 1
        before = net.problems.get(PROBLEM)
        if not left:
            if net.problems.pop(PROBLEM, None) is not None:
                net.keep_data(**{NOTED: None})
                net.changed()
            return
        text = f"It isn't as virtd made it: {'; '.join(one.text for one in left)}"
        again = do("start", "network", net.name) + " tries it again."
        problem = Problem(text, joined(" ", dict.fromkeys(one.hint or again for one in left)))
        if problem == before:
            return
        net.problems[PROBLEM] = problem
        net.keep_data(**{NOTED: [problem.text, str(problem.hint)]})
        journal.send(
            f"Network {net.name}: {text}", message_id=Message.NETWORK_BRIDGE_LOST, level="error", **net.fields()
        )
        net.changed()


def _because(one: Drift, exc: errors.VirtdError) -> Drift:
    return one._replace(text=f"{one.text} ({exc.message})", hint=exc.hint or one.hint)
