# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for whichever of several events comes first."""

from __future__ import annotations

import asyncio


async def first_of(*events: asyncio.Event, limit: float | None = None) -> None:
    """Wait until one of the events is set, or for `limit` seconds."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
