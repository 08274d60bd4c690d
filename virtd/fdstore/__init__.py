# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named slots in systemd's FD store: descriptors that outlive the daemon. README.md explains how to use it.

It needs systemd-python and no other part of virtd, so that any Python daemon can use it.
"""

from virtd.fdstore.budget import Budget, Limit
from virtd.fdstore.compare import Difference, StoredEntry
from virtd.fdstore.errors import AlreadyStored, BadName, MissingSlot, NotifyFailed, StoreError, StoreFull
from virtd.fdstore.held import Slot
from virtd.fdstore.store import HEADROOM, Store

__all__ = [
    "HEADROOM",
    "AlreadyStored",
    "BadName",
    "Budget",
    "Difference",
    "Limit",
    "MissingSlot",
    "NotifyFailed",
    "Slot",
    "Store",
    "StoreError",
    "StoreFull",
    "StoredEntry",
]
