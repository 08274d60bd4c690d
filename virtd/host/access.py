# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what, decided once for every front end.

Each operation takes a right, which stands beside what answers it (virtd.api.interfaces). Root may do everything, and
others may look.

What that doesn't decide may be asked of an authority, such as polkit. Its answer may take as long as a person does,
so a front end doesn't let others wait for it, and stops asking when its caller is gone.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from .. import errors

if TYPE_CHECKING:
    from .base import Caller

PATIENCE: Final = 120.0  # seconds for an authority's answer; a person may have to type a password


class Right(StrEnum):
    """What a caller must be allowed to do."""

    LOOK = "look"  # at what there is and how it is
    OVERHEAR = "overhear"  # read consoles, which may show what isn't for everybody, and type on them
    CHANGE = "change"


class Authority(Protocol):
    """Decides about callers other than root."""

    async def allows(self, by: Caller, operation: str, right: Right) -> bool:
        """May take any time; cancelled when the answer is no longer wanted."""


class Access:
    """The decision, which is immediate without an authority."""

    def __init__(self, authority: Authority | None = None, patience: float = PATIENCE) -> None:
        self._authority = authority
        self._patience = patience

    def allows(self, by: Caller, operation: str, right: Right, called: str = "") -> bool:
        """Whether `by` certainly may; if not, `ask`. Raises AccessDenied if `by` certainly may not.

        `operation`: its name on Varlink; `called`: in the front end, if that is another one.
        """
        if by.uid == 0 or right is Right.LOOK:
            return True
        if self._authority is not None:
            return False
        raise _denied(by, called or _short(operation))

    async def ask(self, by: Caller, operation: str, right: Right, called: str = "") -> None:
        """Wait for the authority's answer. Raises AccessDenied, also if there is none in time."""
        assert self._authority is not None
        called = called or _short(operation)
        try:
            async with asyncio.timeout(self._patience):
                allowed = await self._authority.allows(by, operation, right)
        except TimeoutError:
            raise errors.AccessDenied(
                f"Nobody has allowed {by.name} to call {called}", hint="Try again, or as root."
            ) from None
        if not allowed:
            raise _denied(by, called)


def _short(operation: str) -> str:
    return operation.rpartition(".")[2]


def _denied(by: Caller, called: str) -> errors.AccessDenied:
    return errors.AccessDenied(
        f"{by.name} may not call {called}", hint="Only root may change anything or read consoles."
    )
