# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backend of each type of pool, imported when there is such a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...model.pool import Type
from . import prerequisites

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...children.child import Services
    from ...model import pool as model
    from ...model.settings import Settings
    from .backend import Backend
    from .task import Program

    RunTool = Callable[[str, Program], Awaitable[str]]


def make(pool: model.Pool, services: Services, settings: Settings, run_tool: RunTool) -> Backend:
    """The backend of a definition's type. Raises HostError."""
    match pool.type:
        case Type.DIRECTORY:
            from .directory import Directory
            from .mountpoint import MountPoint

            mountpoint = MountPoint(pool, services.paths.mountpoint(pool.name), services.units)
            return Directory(pool, *prerequisites.account(settings, services.facts), mountpoint)
        case Type.FILESYSTEM:
            from .filesystem import Filesystem

            return Filesystem(pool, *prerequisites.account(settings, services.facts), services.units)
        case Type.LOGICAL:
            from .logical import Logical

            return Logical(pool, prerequisites.account(settings, services.facts)[0], run_tool)
