# SPDX-License-Identifier: LGPL-2.1-or-later
"""The programs that children run: where they are, what environment they get, and as whom they run."""

from __future__ import annotations

import grp
import os
import pwd

from .. import errors

PLACES = (
    "/usr/bin", "/usr/sbin", "/usr/libexec", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin",
)  # fmt: skip
# All that a child gets of an environment: nothing of ours.
HOMELESS = (("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8"))
ENVIRONMENT = (*HOMELESS, ("HOME", "/"))


def find(name: str) -> str | None:
    """Where a program is; None when no place has one that can be run."""
    return next((path for place in PLACES if os.access(path := f"{place}/{name}", os.X_OK)), None)


def ids(user: str, group: str | None, what: str, hint: str) -> tuple[int, int]:
    """UID and GID to run `what` as; without a group it is the user's own. Raises HostError."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise errors.HostError(f"There is no user {user} to run {what} as", hint=hint) from None
    try:
        return entry.pw_uid, entry.pw_gid if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.HostError(f"There is no group {group} to run {what} as", hint=hint) from None
