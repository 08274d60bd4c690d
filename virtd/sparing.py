# SPDX-License-Identifier: LGPL-2.1-or-later
"""Journal messages that an unprivileged user can cause: a few at once, then one from time to time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from .allowance import Allowance

if TYPE_CHECKING:
    from collections.abc import Callable

BURST = 5
EVERY = 60.0  # seconds until one more is allowed


class Sparing:
    """Messages beyond that are only counted; the next one says how many were suppressed."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._allowance = Allowance(BURST, 1 / EVERY, clock)
        self._kept_back = 0

    def warning(self, text: str, *values: Any, exc_info: bool = False) -> None:
        self._write(logging.WARNING, text, values, exc_info=exc_info)

    def exception(self, text: str, *values: Any) -> None:
        """With the traceback of the exception being handled."""
        self._write(logging.ERROR, text, values, exc_info=True)

    def _write(self, level: int, text: str, values: tuple[Any, ...], *, exc_info: bool) -> None:
        if not self._allowance.take():
            self._kept_back += 1
            return
        if self._kept_back:
            text, values = text + " (%d more like this were suppressed)", (*values, self._kept_back)
            self._kept_back = 0
        self._log.log(level, text, *values, exc_info=exc_info)
