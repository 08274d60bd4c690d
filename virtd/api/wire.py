# SPDX-License-Identifier: LGPL-2.1-or-later
"""Encoding of replies that never fails, although others determine their content: file names that aren't UTF-8,
numbers larger than any type on the wire.

A reply that couldn't be encoded would end its connection, which a client takes for a restart and repeats its call.
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
