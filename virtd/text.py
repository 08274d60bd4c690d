# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text that can be encoded, wherever it comes from.

To the kernel a file's name is bytes. Python represents those that aren't UTF-8 by lone surrogates (PEP 383), and
writing such text to the journal, to JSON or to a bus is an error that nobody expects from a file's name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def span(value: float) -> str:
    """A duration for people: "2 s" for 1.99983, "0.25 s", "3600 s"."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def plain(text: str) -> str:
    """`text`, with what can't be encoded written out: the byte 0xff as \\xff."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join(map(_escaped, text))
    return text


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else character


def word(text: str) -> str:
    """`text` for a shell, in quotes if necessary: for commands in hints."""
    import re

    if re.fullmatch(r"[A-Za-z0-9/._+,@=:-]+", text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def plainly(value: Any) -> Any:
    """A JSON value with each text in it made `plain`: for values that could not be encoded as they are."""
    match value:
        case str():
            return plain(value)
        case dict():
            return {plainly(key): plainly(item) for key, item in value.items()}
        case list() | tuple():
            return [plainly(item) for item in value]
        case _:
            return value
