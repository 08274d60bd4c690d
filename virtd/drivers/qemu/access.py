# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a guest's user may use what isn't the guest's: QEMU's own program, and the devices of the kernel's.

QEMU, or systemd in its place, would only say that it can't.
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
    """What of a QEMU of somebody's own has to be shown to guests: its directory, or the one above its bin, for its
    libraries and firmware are there; nothing where it can be seen anyway. `hidden`: the names in `/` that can't.

    Raises HostError when it can't be run there.
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
    """Raise HostError when a file is in a directory that the guest's user may not pass, and can see.

    Where the host's directories are hidden only the file itself is shown, and what is above it is systemd's.
    """
    names = set(hidden)
    for path in files:
        real = os.path.realpath(path)
        if real.split("/")[1] not in names:
            _check_passable(real, "/", who)


def _check_passable(path: str, place: str, who: prerequisites.Account) -> None:
    """The guest's user has to pass from `place` to what is at `path`. Raises HostError."""
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
    """Raise HostError when the guest's user may not open what it is to use: QEMU would only say that it can't."""
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
    """user:group, by number where they have no name."""
    user, group = str(status.st_uid), str(status.st_gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(status.st_uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    return f"{user}:{group}"


def _hint(device: str) -> str:
    name = os.path.basename(device)
    if device == prerequisites.TUN:
        # Who opens it still needs a tap that is his.
        return f'chmod 666 {device}; for good by a rule of udev\'s: KERNEL=="{name}", MODE="0666".'
    make = ""
    try:
        grp.getgrnam(name)
    except KeyError:
        make = f"groupadd --system {name}; "
    rule = f'KERNEL=="{name}", GROUP="{name}", MODE="0660"'
    return f"{make}chgrp {name} {device}; chmod 660 {device}; for good by a rule of udev's: {rule}."
