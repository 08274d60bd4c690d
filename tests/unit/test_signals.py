# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals reach the loop, in a process of its own, whichever thread the kernel gives them to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, os, signal, threading
from virtd import signals

async def main():
    loop = asyncio.get_running_loop()
    came = {number: asyncio.Event() for number in (signal.SIGTERM, signal.SIGHUP)}
    signals.listen(loop, {number: event.set for number, event in came.items()})
    os.kill(os.getpid(), signal.SIGHUP)
    await came[signal.SIGHUP].wait()
    threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
    await came[signal.SIGTERM].wait()
    print("both")

asyncio.run(asyncio.wait_for(main(), 60))
"""


def test_signals_reach_the_loop() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=TOP, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr
