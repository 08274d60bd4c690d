# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the host that drivers ask for, which tests can replace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from .. import errors

if TYPE_CHECKING:
    from collections.abc import Callable

KVM = "/dev/kvm"


def ids(user: str, group: str | None, what: str, hint: str) -> tuple[int, int]:
    """UID and GID to run `what` as; without `group`, the user's primary group.

    Raises HostError, with `hint`, if there is no such user or group, or the user is root.
    """
    import grp
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise errors.HostError(f"There is no user {user} to run {what} as", hint=hint) from None
    if entry.pw_uid == 0:
        raise errors.HostError(f"Cannot run {what} as root", hint=hint)
    try:
        return entry.pw_uid, entry.pw_gid if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.HostError(f"There is no group {group} to run {what} as", hint=hint) from None


def has_kvm() -> bool:
    """Whether the kernel offers KVM: the device exists and can be opened."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Facts(NamedTuple):
    """A function for each fact; see those of the same names."""

    ids: Callable[[str, str | None, str, str], tuple[int, int]] = ids
    has_kvm: Callable[[], bool] = has_kvm
