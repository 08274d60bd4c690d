# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text that can be encoded, whatever it was made of.

A file's name is bytes to the kernel. Python has those that aren't UTF-8 as lone surrogates (PEP 383), and to write
such text to the journal, into JSON or onto a bus is an error: one that nobody expects of a file's name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def span(value: float) -> str:
    """A span as a person writes it: "2 s" for 1.99983, "0.25 s", "3600 s"."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def plain(text: str) -> str:
    """`text`, with what can't be encoded as a person would write it: the byte 0xff as \\xff."""
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
    """As a shell has to be given it, in quotes where that makes a difference: for commands in hints."""
    import re

    if re.fullmatch(r"[A-Za-z0-9/._+,@=:-]+", text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def plainly(value: Any) -> Any:
    """JSON's kinds of values with each text in them made `plain`: for what could not be encoded as it is."""
    match value:
        case str():
            return plain(value)
        case dict():
            return {plainly(key): plainly(item) for key, item in value.items()}
        case list() | tuple():
            return [plainly(item) for item in value]
        case _:
            return value
