# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the storage driver must know of the host: the guests' user, the programs, and which backend makes a pool."""

from __future__ import annotations

import grp
import os
import pwd
import sys
from typing import TYPE_CHECKING

from ... import errors
from ...model.pool import Type

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...child import Services
    from ...model import pool as model
    from ...model.settings import Settings
    from .backend import Backend
    from .job import Program

    RunTool = Callable[[str, Program], Awaitable[str]]

PLACES = ("/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin")


def account(settings: Settings) -> tuple[int, int]:
    """The guests' user and group. Raises HostError."""
    try:
        return pwd.getpwnam(settings.qemu.shared_user).pw_uid, grp.getgrnam(settings.qemu.shared_group).gr_gid
    except KeyError as exc:
        raise errors.HostError(
            f"There is no user or group {exc.args[0]}", hint="Run systemd-sysusers, or see qemu.user in virtd.toml."
        ) from None


def program(name: str, package: str) -> str:
    """Where a program is. Raises HostError."""
    for place in PLACES:
        if os.access(f"{place}/{name}", os.X_OK):
            return f"{place}/{name}"
    raise errors.HostError(f"{name} is missing", hint=f"Install {package}.")


def worker(*arguments: str) -> tuple[str, ...]:
    """The command line of the copying program."""
    here = os.path.dirname(os.path.realpath(__file__))
    return (os.path.realpath(sys.executable), "-IS", f"{here}/worker.py", *arguments)


def backend(pool: model.Pool, services: Services, settings: Settings, run_tool: RunTool) -> Backend:
    """The backend of a definition's type."""
    match pool.type:
        case Type.DIRECTORY:
            from .directory import Directory
            from .mountpoint import MountPoint

            mountpoint = MountPoint(pool, services.paths.mountpoint(pool.name), services.units)
            return Directory(pool, *account(settings), mountpoint)
        case Type.FILESYSTEM:
            from .filesystem import Filesystem

            return Filesystem(pool, *account(settings), services.units)
        case Type.LOGICAL:
            from .logical import Logical

            return Logical(pool, account(settings)[0], run_tool)
