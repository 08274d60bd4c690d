# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all operations share: the caller, and replies that carry file descriptors."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..replies import Reply

Listener = Callable[[str, Reply], None]


class Caller(msgspec.Struct, frozen=True):
    """The calling process, as reported by SO_PEERCRED or by the bus."""

    uid: int
    pid: int
    name: str

    @classmethod
    def of(cls, uid: int, pid: int) -> Caller:
        """A Caller named by its number, except for root: looking up a name may block on a directory server."""
        return cls(uid=uid, pid=pid, name="root" if uid == 0 else f"uid {uid}")


class WithDescriptors(msgspec.Struct, frozen=True):
    """A reply with file descriptors, which the front end passes on and then closes."""

    value: Reply
    fds: list[int]
