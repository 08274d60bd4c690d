# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the storage driver must know of the host: the guests' user, the programs, and which backend makes a pool."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ... import errors
from ...model.pool import Type
from .. import programs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...child import Services
    from ...model import pool as model
    from ...model.settings import Settings
    from .backend import Backend
    from .job import Program

    RunTool = Callable[[str, Program], Awaitable[str]]


def account(settings: Settings) -> tuple[int, int]:
    """The guests' user and group. Raises HostError."""
    hint = "Run systemd-sysusers, or see qemu.user in virtd.toml."
    return programs.ids(settings.qemu.shared_user, settings.qemu.shared_group, "jobs", hint)


def program(name: str, package: str) -> str:
    """Where a program is. Raises HostError."""
    if (path := programs.find(name)) is not None:
        return path
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
