# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes as people write them: a number of bytes with an optional unit, powers of 1024 (`256M`, `512MiB`, `10G`)."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = r"\s*(\d{1,18})\s*([KMGTP]?)(?:i?B)?\s*"


def parse(value: str | int) -> int:
    """Bytes. A bare number is bytes. Raises ValueError."""
    if isinstance(value, int):
        if isinstance(value, bool) or value < 0:
            raise ValueError(value)
        return value
    match = re.fullmatch(_SIZE, value, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(value)
    return int(match[1]) * _UNITS[match[2].upper()]


def show(number: int) -> str:
    """The shortest exact form: `256M`; bytes when no unit divides it."""
    for unit in "PTGMK":
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return f"{number}"
