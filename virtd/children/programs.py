# SPDX-License-Identifier: LGPL-2.1-or-later
"""The programs that children run: where they are, and what environment they get."""

from __future__ import annotations

import os

PLACES = (
    "/usr/bin", "/usr/sbin", "/usr/libexec", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin",
)  # fmt: skip
# A child's whole environment: nothing is inherited from ours.
HOMELESS = (("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8"))
ENVIRONMENT = (*HOMELESS, ("HOME", "/"))


def find(name: str) -> str | None:
    """The path of a program; None if no directory has an executable one."""
    return next((path for place in PLACES if os.access(path := f"{place}/{name}", os.X_OK)), None)
