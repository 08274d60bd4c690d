# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what, decided once for every front end.

An operation is known by its name on Varlink; the front ends' own questions, such as D-Bus's Introspect, by theirs.
Each is in RIGHTS, and what isn't there is refused to everybody. Root may do all the rest, and others may look.

What can't be decided by that may be asked of an authority, as polkit is one. It may take a person's time to answer,
so a front end asks outside of what it does in turn, and stops asking when its caller is gone.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from .. import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Caller

PATIENCE: Final = 120.0  # seconds for an authority's answer; a person may have to type a password


class Right(StrEnum):
    """What an operation takes."""

    LOOK = "look"  # at what there is and how it is
    OVERHEAR = "overhear"  # what guests write, and type to them: more than their users would tell everybody
    CHANGE = "change"


# What any object that runs as a process can be asked.
SUPERVISED: Final = {
    Right.LOOK: "List Info Dump Wait",
    Right.OVERHEAR: "Follow OpenConsole",
    Right.CHANGE: "Define Undefine Start Stop Autostart",
}
_RIGHTS: Final = {
    "org.virtd1": {
        Right.LOOK: "Status List Info Dump Check Slots Wait Subscribe",
        Right.OVERHEAR: "Follow OpenConsole",
        Right.CHANGE: "Define Undefine Start Shutdown Stop Kill Reboot Suspend Resume Autostart Repair Reload "
        "UpgradeMachine",
    },
    "org.virtd1.Container": {
        Right.LOOK: "List Info Dump Wait",
        Right.OVERHEAR: "Follow OpenConsole",
        Right.CHANGE: "Define Create Undefine Start Shutdown Stop Kill Reboot Freeze Thaw Autostart Execute Signal",
    },
    "org.virtd1.Network": {
        Right.LOOK: "List Info Dump Leases",
        Right.CHANGE: "Define DefineDefault Undefine Autostart Start Stop",
    },
    "org.virtd1.Pool": {
        Right.LOOK: "List Info Dump",
        Right.CHANGE: "Define Undefine Build Start Stop Refresh Autostart",
    },
    "org.virtd1.Volume": {
        Right.LOOK: "List Info Snapshots Jobs Await",
        Right.CHANGE: "Create Clone Import Resize Wipe Delete Upload Uploaded Download Cancel",
    },
    "org.varlink.service": {Right.LOOK: "GetInfo GetInterfaceDescription"},
    "org.freedesktop.DBus.Introspectable": {Right.LOOK: "Introspect"},
    "org.freedesktop.DBus.ObjectManager": {Right.LOOK: "GetManagedObjects"},
    "org.freedesktop.DBus.Peer": {Right.LOOK: "Ping GetMachineId"},
    # Nothing can be set: who tries is told so.
    "org.freedesktop.DBus.Properties": {Right.LOOK: "Get GetAll Set"},
}


def rights(interface: str, table: Mapping[Right, str]) -> dict[str, Right]:
    """By the operations' whole names."""
    return {f"{interface}.{name}": right for right, names in table.items() for name in names.split()}


RIGHTS: Final[dict[str, Right]] = {
    name: right for interface, table in _RIGHTS.items() for name, right in rights(interface, table).items()
}


class Authority(Protocol):
    """Somebody to ask about callers who aren't root."""

    async def allows(self, by: Caller, operation: str, right: Right) -> bool:
        """May take as long as it likes; cancelled when the answer isn't wanted any more."""


class Access:
    """The decision. Without an authority it is always made at once."""

    def __init__(self, authority: Authority | None = None, patience: float = PATIENCE) -> None:
        self._authority = authority
        self._patience = patience

    def allows(self, by: Caller, operation: str, called: str = "") -> bool:
        """Whether it is certain that `by` may; if not, `ask`. Raises AccessDenied when it is certain that not.

        `called`: the operation's name in the front end, if it has another one there.
        """
        right = RIGHTS.get(operation)
        if right is not None:
            if by.uid == 0 or right is Right.LOOK:
                return True
            if self._authority is not None:
                return False
        raise _denied(by, called or _short(operation))

    async def ask(self, by: Caller, operation: str, called: str = "") -> None:
        """Wait for what the authority says. Raises AccessDenied, also when it says nothing in time."""
        assert self._authority is not None
        called = called or _short(operation)
        try:
            async with asyncio.timeout(self._patience):
                allowed = await self._authority.allows(by, operation, RIGHTS[operation])
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
