# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rate limits: how often something may happen at once, and how often a second from then on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Bucket:
    """A token bucket: `rate` new tokens a second, at most `burst`. Tokens that are taken from an empty bucket are
    owed."""

    __slots__ = ("_at", "_burst", "_rate", "level")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._at = now
        self.level = burst

    def due(self, now: float) -> float:
        """Seconds until a whole token is available; 0 if there is one."""
        self.level = min(self._burst, self.level + (now - self._at) * self._rate)
        self._at = now
        return 0.0 if self.level >= 1 else (1 - self.level) / self._rate

    def take(self, cost: float = 1.0) -> None:
        self.level -= cost

    def full(self, now: float) -> bool:
        self.due(now)
        return self.level >= self._burst


class Allowance:
    """Allows `burst` uses at once, replenished at `rate` a second."""

    __slots__ = ("_bucket", "_clock")

    def __init__(self, burst: float, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = Bucket(rate, burst, clock())
        self._clock = clock

    def take(self) -> bool:
        """Use one, if one is left."""
        if self._bucket.due(self._clock()) > 0:
            return False
        self._bucket.take()
        return True
