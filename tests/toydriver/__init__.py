# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fifth driver: programs with a console, supervised as guests are. What it takes to add one, and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtd.api import interfaces
from virtd.cli import main
from virtd.drivers import loader

if TYPE_CHECKING:
    import pytest


def register(patch: pytest.MonkeyPatch) -> None:
    """The lines that a driver of virtd's own has in these tables."""
    patch.setitem(loader.MODULES, "toy", "tests.toydriver.driver")
    patch.setitem(interfaces.MODULES, "org.virtd1.Toy", "tests.toydriver.api")
    patch.setitem(main.NOUNS, "toy", ("tests.toydriver.cli", "Run programs with a console"))
