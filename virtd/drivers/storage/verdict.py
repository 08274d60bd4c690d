# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the end of a job's program is judged. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...systemd.state import CLD_EXITED, signal_name

if TYPE_CHECKING:
    from ...systemd.state import UnitState

# qemu-img(1), exit statuses of "check". Leaked clusters cost space, and nothing else.
CORRUPT = 2
LEAKED = 3
CHECKING = frozenset({"import", "adopt", "upload"})  # the verbs whose program may end in a check


def why_failed(verb: str, unit: UnitState | None, cancelled: str, words: str) -> str:
    """Why a job failed, or "" when it succeeded.

    `unit` None: systemd no longer knows it; `cancelled`: by whom; `words`: what the program wrote to stderr.
    """
    checking = verb in CHECKING
    if unit is not None and unit.exec_code == CLD_EXITED and unit.exec_status in ((0, LEAKED) if checking else (0,)):
        return ""
    if cancelled:
        return f"cancelled by {cancelled}"
    if checking and unit is not None and unit.exec_status == CORRUPT:
        return "the image is corrupt"
    if words:
        return words
    if unit is None or not unit.exec_code:
        return "its unit has disappeared, so its exit status is unknown"
    if unit.result == "oom-kill":
        return "it was killed, because memory ran out"
    if unit.exec_code != CLD_EXITED:
        return f"it was killed by {signal_name(unit.exec_status)}"
    return f"it ended with exit status {unit.exec_status}"
