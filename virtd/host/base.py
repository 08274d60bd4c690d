# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all operations share: who asks, and replies that carry descriptors."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..replies import Reply

Listener = Callable[[str, Reply], None]


class Caller(msgspec.Struct, frozen=True):
    """Who asks: SO_PEERCRED's answer, or D-Bus's."""

    uid: int
    pid: int
    name: str

    @classmethod
    def of(cls, uid: int, pid: int) -> Caller:
        """Users are numbers here, but for root: to ask for a name may mean to wait for a directory server."""
        return cls(uid=uid, pid=pid, name="root" if uid == 0 else f"uid {uid}")


class WithDescriptors(msgspec.Struct, frozen=True):
    """A reply with descriptors, which the front end passes on and then closes."""

    value: Reply
    fds: list[int]
