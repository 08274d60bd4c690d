# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what, decided once for every front end.

Each operation requires a right, which is declared beside the code that answers it (virtd.api.interfaces). Root may do
everything, and others may look.

An authority such as polkit may be asked about calls that this doesn't decide. A person may have to answer, which
takes time, so a front end doesn't make other callers wait for it, and stops asking once its caller is gone.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from .. import errors

if TYPE_CHECKING:
    from .base import Caller

PATIENCE: Final = 120.0  # seconds to wait for an authority; a person may have to type a password


class Right(StrEnum):
    """What a caller must be allowed to do."""

    LOOK = "look"  # see which objects exist, and their state
    OVERHEAR = "overhear"  # read consoles, which may show confidential output, and type on them
    CHANGE = "change"


class Authority(Protocol):
    """Decides about callers other than root."""

    async def allows(self, by: Caller, operation: str, right: Right) -> bool:
        """Whether `by` may call `operation`. May take any time; cancelled once the answer is no longer wanted."""


class Access:
    """Decides whether a call is allowed; immediately, unless an authority must be asked."""

    def __init__(self, authority: Authority | None = None, patience: float = PATIENCE) -> None:
        self._authority = authority
        self._patience = patience

    def allows(self, by: Caller, operation: str, right: Right, called: str = "") -> bool:
        """True if `by` may, False if the authority must be asked (see `ask`). Raises AccessDenied if `by` may not.

        `operation` is its name on Varlink; `called` is the name by which the caller knows it, if that is a different
        one.
        """
        if by.uid == 0 or right is Right.LOOK:
            return True
        if self._authority is not None:
            return False
        raise _denied(by, called or _short(operation))

    async def ask(self, by: Caller, operation: str, right: Right, called: str = "") -> None:
        """Wait for the authority's answer. Raises AccessDenied if it refuses or doesn't answer in time."""
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
