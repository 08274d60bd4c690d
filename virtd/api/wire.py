# SPDX-License-Identifier: LGPL-2.1-or-later
"""Replies that can always be sent. What they tell of was made by others: names of files that are no UTF-8, numbers
that are larger than any type on the wire.

A reply that can't be encoded would end its connection, which a client takes for a restart, and asks again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..text import plainly


def encode(reply: Any) -> bytes:
    """As JSON, without the NUL that ends a message."""
    try:
        return msgspec.json.encode(reply)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError):
        return msgspec.json.encode(plainly(msgspec.to_builtins(reply, enc_hook=str)), enc_hook=str)
