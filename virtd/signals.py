# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals as events of the loop: like asyncio's add_signal_handler(), but without importing inspect."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping


def listen(loop: asyncio.AbstractEventLoop, actions: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """From now on each signal calls its action in the loop. To be called in the main thread, once in a process."""
    ours, kernels = socket.socketpair()
    ours.setblocking(False)
    kernels.setblocking(False)

    def come() -> None:
        for number in map(signal.Signals, ours.recv(4096)):
            if number in actions:
                actions[number]()

    loop.add_reader(ours, come)
    # The interpreter writes each signal's number to it, whichever thread the kernel has delivered the signal to.
    signal.set_wakeup_fd(kernels.detach(), warn_on_full_buffer=False)
    for number in actions:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
