# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the storage driver must know about the host: the guests' user, and programs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from ... import errors
from ...children import programs

if TYPE_CHECKING:
    from ...children.facts import Facts
    from ...model.settings import Settings


class Account(NamedTuple):
    """The user that jobs run as."""

    user: str
    group: str


def account(settings: Settings, facts: Facts) -> tuple[int, int]:
    """The guests' user and group. Raises HostError."""
    hint = "Run systemd-sysusers, or see qemu.user in virtd.toml."
    return facts.ids(settings.qemu.shared_user, settings.qemu.shared_group, "jobs", hint)


def program(name: str, package: str) -> str:
    """Where a program is. Raises HostError."""
    if (path := programs.find(name)) is not None:
        return path
    raise errors.HostError(f"{name} is missing", hint=f"Install {package}.")


def worker(*arguments: str) -> tuple[str, ...]:
    """The command line of the copying program, worker.py."""
    here = os.path.dirname(os.path.realpath(__file__))
    return (os.path.realpath(sys.executable), "-IS", f"{here}/worker.py", *arguments)
