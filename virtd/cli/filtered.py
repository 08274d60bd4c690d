# SPDX-License-Identifier: LGPL-2.1-or-later
"""A log on a terminal: what a guest wrote, without control characters that a terminal would obey.

Colours, line ends, tabs and carriage returns are let through. Terminals take other control characters for commands,
some of which write to the clipboard (OSC 52), produce input as if typed, or lock the terminal; they are shown
escaped, as `\\x1b` and so on.
"""

from __future__ import annotations

import codecs
import re

_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,40}m")
_BEGUN = re.compile(r"\x1b(\[[0-9;:]{0,40})?\Z")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10, 13)}


class Filter:
    """Takes the bytes of a log in pieces that may end anywhere."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""
        self._coloured = False

    def pass_on(self, data: bytes, *, last: bool = False) -> bytes:
        """The text to show; with `last` also everything kept back, and the terminal's colours are reset."""
        text = self._rest + self._decoder.decode(data, last)
        begun = None if last else _BEGUN.search(text)
        self._rest = begun.group() if begun else ""
        text = text[: begun.start()] if begun else text
        colours = _COLOUR.findall(text)
        parts = [part.translate(_CONTROL) for part in _COLOUR.split(text)]
        shown = parts[0] + "".join(colour + part for colour, part in zip(colours, parts[1:], strict=True))
        if colours:
            self._coloured = True
        if last and self._coloured:
            shown += "\x1b[0m"
        return shown.encode()
