# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for the jobs that virtd runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time

from virtd.cli.client import Call, constant
from virtd.cli.output import clean
from virtd.errors import InvalidState, VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtd.cli.client import Parameters, Session

OVER = ("done", "failed", "cancelled")
ASK = 1.0  # seconds that one request waits for news
WORK = 600.0  # seconds until the daemon answers: it may sync a finished volume, or have just been started
QUIET = 0.5  # seconds before progress is shown
STEP = 10  # percent between two lines


def token() -> str:
    """A token that identifies repeated calls as the same."""
    return os.urandom(8).hex()


def run(session: Session, method: str, parameters: Parameters, what: str) -> Parameters:
    """Make the call, and wait for its job if it has one; returns the call's reply. Raises VirtdError."""
    with Call(session, method, constant(parameters), limit=WORK) as call:
        reply = call.result().parameters
    if job := str(reply.get("job") or ""):
        wait(session, job, what)
    return reply


def wait(session: Session, job: str, what: str) -> None:
    """Wait until the job is finished, showing its progress. Raises VirtdError if it fails."""
    show = Progress(what)
    try:
        while True:
            call = Call(session, "Volume.Await", constant({"job": job, "timeout": ASK}), limit=WORK)
            with call:
                found: dict[str, Any] = call.result().parameters["object"]
            if found.get("state") in OVER:
                break
            show.at(float(found.get("progress") or 0))
    except KeyboardInterrupt:
        show.end()
        print(f"The job goes on. To end it: virtdctl volume cancel {job}", file=sys.stderr)
        raise
    finally:
        show.end()
    if found["state"] == "cancelled":
        raise InvalidState(str(found.get("error") or "it was cancelled"))
    if found["state"] == "failed":
        raise VirtdError(str(found.get("error") or "it failed"))


class Progress:
    """The progress of one job, on stderr; nothing is shown for one that finishes at once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._shown = -1
        self._begun = time.monotonic()
        self._open = False

    def at(self, percent: float) -> None:
        number = min(100, int(percent))
        if time.monotonic() - self._begun < QUIET:
            return
        if self._terminal:
            columns = 40
            done = number * columns // 100
            bar = "#" * done + "." * (columns - done)
            print(f"\r{clean(self._what)} [{bar}] {number:3d} %", end="", file=sys.stderr, flush=True)
            self._open = True
        elif number // STEP > self._shown // STEP:
            self._shown = number
            print(f"{clean(self._what)}: {number} %", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._open:
            self._open = False
            # Erase the bar: only the command's own messages stay on the terminal.
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
