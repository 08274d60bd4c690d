# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the store.

    StoreError
     ├── BadName        a name that systemd would not keep as it is (also a ValueError)
     ├── MissingSlot    there is no such slot (also a KeyError)
     ├── AlreadyStored  the descriptor is stored under another name, and PID 1 keeps only one name for it
     ├── StoreFull      one more wouldn't be kept, or would keep the daemon from being started again
     └── NotifyFailed   PID 1 doesn't accept messages

This tree is the package's own, because the package is meant to be used without the rest of virtd.
"""

from __future__ import annotations


class StoreError(Exception):
    """The root of the tree: one sentence, and a `hint` that says what to do about it (may be empty)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        # KeyError would show the repr of its argument.
        return self.message


class BadName(StoreError, ValueError):
    """The name isn't valid for a slot."""


class MissingSlot(StoreError, KeyError):
    """The store has no slot of that name, or its descriptor was removed with `take()`."""


class AlreadyStored(StoreError):
    """The same open file description is in the store under another name; PID 1 would silently keep the first only."""


class StoreFull(StoreError):
    """The budget doesn't allow it; `limited_by` names the limit, `hint` says how to raise it."""

    def __init__(self, message: str, *, limited_by: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.limited_by = limited_by


class NotifyFailed(StoreError):
    """A message couldn't be handed to the service manager: nobody listens, or it was busy for too long."""
