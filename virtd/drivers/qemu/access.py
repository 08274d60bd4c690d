# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a guest's user may use what belongs to the host: QEMU's program, and the kernel's devices.

It is checked beforehand, because QEMU or systemd would only report that access failed.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from typing import TYPE_CHECKING

from ... import errors, reach
from ...text import word
from . import prerequisites

if TYPE_CHECKING:
    from collections.abc import Iterable


def shown(program: str, hidden: Iterable[str], who: prerequisites.Account) -> list[str]:
    """The directories of a QEMU outside the usual places that have to be shown to guests, with its libraries and
    firmware: that of the program, or the one above its bin. Nothing if it is visible anyway. `hidden` are the names
    in `/` that aren't.

    Raises HostError if it can't be run there.
    """
    names = set(hidden)
    paths = [path for path in dict.fromkeys((program, os.path.realpath(program))) if path.split("/")[1] in names]
    if not paths:
        return []
    with reach.reached(program) as file:
        if os.statvfs(file.itself).f_flag & os.ST_NOEXEC:
            raise errors.HostError(
                f"{program} is on a file system that is mounted noexec", hint="See qemu.binary in virtd.toml."
            )
        if not prerequisites.may(file.status, who, os.X_OK):
            raise errors.HostError(f"{who.user} may not execute {program}", hint=f"chmod o+rx {word(program)}")
    found = []
    for path in paths:
        place = os.path.dirname(path)
        if os.path.basename(place) in ("bin", "sbin") and os.path.dirname(place).count("/") > 1:
            place = os.path.dirname(place)
        _check_passable(path, place, who)
        found.append(place)
    return found


def require_passable(files: Iterable[str], hidden: Iterable[str], who: prerequisites.Account) -> None:
    """Raise HostError if a file is below a visible directory that the guest's user may not search.

    Where the host's directories are hidden only the file itself is shown, below directories made by systemd.
    """
    names = set(hidden)
    for path in files:
        real = os.path.realpath(path)
        if real.split("/")[1] not in names:
            _check_passable(real, "/", who)


def _check_passable(path: str, place: str, who: prerequisites.Account) -> None:
    """Raise HostError unless the guest's user may search all directories from `place` to `path`."""
    below = path
    while len(path := os.path.dirname(path)) >= len(place) and path != "/":
        status = os.stat(path)
        if not prerequisites.may(status, who, os.X_OK):
            raise errors.HostError(
                f"{who.user}, as whom the guest runs, may not pass {path} to {below}: it is {_owners(status)}'s, "
                f"with mode {stat.S_IMODE(status.st_mode):04o}",
                hint=f"chmod o+x {word(path)}",
            )


def require_devices(who: prerequisites.Account, *, kvm: bool, tap: bool) -> None:
    """Raise HostError if the guest's user may not open a device that it needs."""
    for device, needed in ((prerequisites.KVM, kvm), (prerequisites.TUN, tap)):
        if not needed:
            continue
        try:
            status = os.stat(device)
        except OSError as exc:
            raise errors.HostError(f"There is no {device}: {exc.strerror}", hint="modprobe tun makes it.") from exc
        if not prerequisites.may_use(status, who):
            mode = stat.S_IMODE(status.st_mode)
            raise errors.HostError(
                f"{who.user}, as whom the guest runs, may not open {device}: it is {_owners(status)}'s, "
                f"with mode {mode:04o}",
                hint=_hint(device),
            )


def _owners(status: os.stat_result) -> str:
    """user:group, or their numbers where they have no names."""
    user, group = str(status.st_uid), str(status.st_gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(status.st_uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    return f"{user}:{group}"


def _hint(device: str) -> str:
    name = os.path.basename(device)
    if device == prerequisites.TUN:
        # This gives nobody a tap: each can be opened only by its owner.
        return f'chmod 666 {device}; for good by a rule of udev\'s: KERNEL=="{name}", MODE="0666".'
    make = ""
    try:
        grp.getgrnam(name)
    except KeyError:
        make = f"groupadd --system {name}; "
    rule = f'KERNEL=="{name}", GROUP="{name}", MODE="0660"'
    return f"{make}chgrp {name} {device}; chmod 660 {device}; for good by a rule of udev's: {rule}."
