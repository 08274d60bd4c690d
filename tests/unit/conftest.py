# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host of their own for the tests that want one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.whole_host import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(tmp_path, monkeypatch, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
