# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many slots a unit can have, which is not only what FileDescriptorStoreMax= says.

Three limits apply, and the nearest one counts:

- FileDescriptorStoreMax=: past it PID 1 closes what it was sent and tells only its own log.
- LimitNOFILE= (the soft limit): systemd applies it to the new process *before* it lays out the descriptors, so with
  too many of them the daemon fails to start (202/FDS), for good.
- The kernel's limit of 128 KiB on one string of the environment, which $LISTEN_FDNAMES is: past it the daemon fails
  to start as well (203/EXEC).

The first loses one descriptor; the other two lose all of them, at some later start, which is why a slot that would
cross one of them must be refused while the daemon still runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

# MAX_ARG_STRLEN is 32 pages (of 4 KiB, or larger on some machines) and counts the NUL at the end.
NAMES_BYTES = 32 * 4096 - 1
_PREFIX = len("LISTEN_FDNAMES=")
_FIRST_FD = 3


class Limit(StrEnum):
    """What bounds the number of slots."""

    STORE = "FileDescriptorStoreMax"
    FILES = "LimitNOFILE"
    NAMES = "LISTEN_FDNAMES"


HINTS = {
    Limit.STORE: "set a higher FileDescriptorStoreMax= in the unit",
    Limit.FILES: "set a higher LimitNOFILE= in the unit",
    Limit.NAMES: "use shorter slot names, or fewer slots: the kernel's limit can't be raised",
}


class Budget(NamedTuple):
    """Where the store stands: `used` slots of `max`.

    `limited_by` is the limit that will be met first, if the names to come are as long as those there are. The limits
    one by one: `store_max` and `files_max` in slots (None: there is none), `names_bytes` of `names_bytes_max`.
    """

    used: int
    max: int
    limited_by: Limit
    store_max: int | None
    files_max: int | None
    names_bytes: int
    names_bytes_max: int = NAMES_BYTES

    @property
    def left(self) -> int:
        """How many more slots fit."""
        return max(0, self.max - self.used)


def names_bytes(names: Sequence[str]) -> int:
    """The length of LISTEN_FDNAMES= with these names, in bytes, without its NUL."""
    return _PREFIX + sum(map(len, names)) + max(0, len(names) - 1)


def measure(slots: Sequence[str], sockets: Sequence[str], store_max: int | None, files: int | None) -> Budget:
    """The budget of a store that holds `slots`, beside which the daemon is given `sockets` (names, not distinct).

    `store_max` is FileDescriptorStoreMax=; `files` is how many descriptors in all may be passed to the daemon. None:
    no limit.
    """
    files_max = None if files is None else max(0, files - len(sockets))
    in_use = names_bytes([*slots, *sockets])
    # The names that will follow are taken to be as long as the average of those there are (a plausible 24 at first).
    each = sum(map(len, slots)) / len(slots) + 1 if slots else 25.0
    names_max = len(slots) + max(0, int((NAMES_BYTES - in_use) // each))
    limits = [(names_max, Limit.NAMES)]
    limits += [(files_max, Limit.FILES)] if files_max is not None else []
    limits += [(store_max, Limit.STORE)] if store_max is not None else []
    # Of equal ones the last, which is the one that a person would look at first.
    most, limited_by = min(reversed(limits), key=lambda limit: limit[0])
    return Budget(len(slots), most, limited_by, store_max, files_max, in_use)


def exceeded(budget: Budget) -> Limit | None:
    """The limit that a store in this state is over, or None if it's within all of them."""
    if budget.store_max is not None and budget.used > budget.store_max:
        return Limit.STORE
    if budget.files_max is not None and budget.used > budget.files_max:
        return Limit.FILES
    if budget.names_bytes > budget.names_bytes_max:
        return Limit.NAMES
    return None


def files_limit(soft: int, headroom: int) -> int | None:
    """How many descriptors may be passed to a process whose RLIMIT_NOFILE is `soft` (-1: none).

    They start at 3; `headroom` is what the daemon opens besides them.
    """
    return None if soft < 0 else max(0, soft - _FIRST_FD - headroom)
