# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether systemd still keeps virtd's descriptors, and could start virtd with them.

A daemon-reload may change virtd.service under a running daemon, and drop descriptors or make the next start
impossible. As long as this process runs it has all descriptors; only the next one would miss them. So the problem is
reported now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from .. import errors, fdstore, journal
from ..messages import Message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .units import Units

log = logging.getLogger(__name__)

AGAIN, AGAIN_AT_MOST = 1.0, 64.0  # seconds until a failed check is repeated, doubled each time
LOOKS = 4  # at systemd's entries, before one counts as dropped
BEFORE = "before virtd is stopped or restarted"

Problems = dict[str, tuple[str, str]]  # by key: text and hint


class Watch:
    """Checks when requested (once for all requests during a check), and again after a check that failed.

    The findings of `look` go into `problems`, and new ones into the journal.
    """

    def __init__(self, problems: Problems, look: Callable[[], Awaitable[Problems]]) -> None:
        self._problems = problems
        self._look = look
        self._due = asyncio.Event()
        self._due.set()
        self._failed = 0  # times in a row

    def due(self) -> None:
        """To be called when systemd has reloaded its units, or has just been connected to."""
        self._due.set()

    async def keep_looking(self) -> None:
        while True:
            pause = min(AGAIN * 2 ** (self._failed - 1), AGAIN_AT_MOST) if self._failed else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._due.wait()
            self._due.clear()
            try:
                found = await self._look()
            except (errors.VirtdError, fdstore.StoreError) as exc:
                self._failed += 1
                if self._failed == 1:
                    log.warning("Cannot check whether systemd still has all descriptors: %s", exc)
                continue
            if self._failed:
                log.info("systemd's descriptors can be checked again, after %d failed attempts", self._failed)
                self._failed = 0
            before = {key: self._problems.pop(key) for key in KEYS if key in self._problems}
            self._problems |= found
            tell(before, found)


def headroom(soft: int) -> int:
    """Half of the open files are for slots: besides its five slots each guest has two logs, a pidfd, a monitor,
    clients."""
    return max(fdstore.HEADROOM, soft // 2)


async def dropped(
    store: fdstore.Store, count: Callable[[], Awaitable[int]], *, give: bool = True, looks: int = LOOKS
) -> tuple[int, int]:
    """How many of the store's entries systemd doesn't keep although they were sent again, and the total.

    `count` returns how many it has. Children start and end meanwhile, so several looks have to agree that one is
    missing. `give` false: systemd would refuse all, and log each of them.
    """
    wanted = kept = 0
    for look in range(looks):
        if look == 1 and give:
            await asyncio.to_thread(store.send_again)
        if look:
            await asyncio.to_thread(store.barrier)
        wanted = store.budget().entries
        kept = await count()
        wanted = min(wanted, store.budget().entries)
        if kept >= wanted:
            return 0, wanted
    return wanted - kept, wanted


async def look(store: fdstore.Store, units: Units, unit: str) -> Problems:
    """Compare with systemd, and send it again what it has dropped. Returns the remaining problems.

    Raises VirtdError or StoreError.
    """
    unit_max = int(await units.service_property(unit, "FileDescriptorStoreMax"))
    soft = int(await units.service_property(unit, "LimitNOFILESoft"))
    store.resize(unit_max, *files(soft))
    found: Problems = {}
    load = str(await units.unit_property(unit, "LoadState"))
    loaded = load in ("loaded", "")
    missing, wanted = await dropped(
        store,
        lambda: units.store_count(unit),
        give=loaded and store.budget().entries <= unit_max,
        looks=LOOKS if loaded else 1,  # further looks would only send messages that are lost
    )
    if missing:
        text = f"systemd has dropped {missing} of {wanted} entries of the FD store, which guests need"
        found["store"] = (text, f"Raise FileDescriptorStoreMax= of {unit} (now {unit_max}) {BEFORE}.")
    if load == "masked":
        text = f"{unit} is masked: systemd has dropped what it kept for guests" if missing else f"{unit} is masked"
        found["store"] = (text, f"systemctl unmask {unit} {BEFORE}, or their consoles are lost.")
    elif not loaded:
        what = "is gone" if load == "not-found" else f"can't be used ({load})"
        found["store"] = (
            f"The file of {unit} {what}, and virtd could not be started again",
            f"See: systemctl status {unit}. Correct it, then systemctl daemon-reload, {BEFORE}.",
        )
    if load == "loaded" and await keeps(units, unit) is False:
        found["preserve"] = (
            f"FileDescriptorStorePreserve= of {unit} isn't yes: when virtd is stopped, guests' consoles are lost",
            "See: systemctl cat virtd.service. Remove the setting that changes it, then systemctl daemon-reload.",
        )
    budget = store.budget()
    if budget.files_max is not None and budget.used > budget.files_max:
        found["files"] = (
            f"LimitNOFILE= of {unit} is {soft}: too little for the {budget.used} descriptors kept for guests",
            f"Raise it to {2 * budget.used + 1024} or more, then systemctl daemon-reload, {BEFORE}.",
        )
    return found


def files(soft: int) -> tuple[int | None, int]:
    """RLIMIT_NOFILE for the store, and the headroom; `soft` is systemd's value, 2^64 - 1 for none."""
    limit = soft if soft < 1 << 63 else None
    return limit, headroom(limit or 0)


async def keeps(units: Units, unit: str) -> bool | None:
    """Whether the store outlives a stop; None if this systemd can't do that anyway, or doesn't say."""
    try:
        return bool(await units.service_property(unit, "FileDescriptorStorePreserve") == "yes")
    except errors.VirtdError:
        return None


KEYS = ("store", "preserve", "files")


def tell(before: Problems, found: Problems) -> None:
    """Report in the journal which problems are new, and which are over."""
    for key in KEYS:
        if key in found and found[key] != before.get(key):
            text, hint = found[key]
            journal.send(f"{text}. {hint}", message_id=Message.STORE_AT_RISK, level="error")
        elif key in before and key not in found:
            log.info("systemd keeps virtd's descriptors as it should again: %s", key)
