# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a domain's operations make of its state: the model for test_host_model.py and for tests/live/test_model.py."""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = st.sampled_from(["web1", "web2"])
# More of what starts than of what ends, so that something runs most of the time.
OPERATIONS = st.sampled_from(["start", "start", "start", "stop", "suspend", "resume", "define", "define", "undefine"])
ALIVE = ("running", "paused")


def after(operation: str, state: str) -> str:
    """What an operation makes of a domain in `state` ("": there is none); LookupError if it refuses."""
    table = {
        "define": {"": "stopped", **{now: now for now in (*ALIVE, "stopped", "crashed")}},
        "start": {"stopped": "running", "crashed": "running", "running": "running", "paused": "paused"},
        "stop": {"running": "stopped", "paused": "stopped", "stopped": "stopped", "crashed": "crashed"},
        "undefine": {"stopped": "", "crashed": ""},
        "suspend": {"running": "paused", "paused": "paused"},
        "resume": {"running": "running", "paused": "running"},
    }
    return table[operation][state]
