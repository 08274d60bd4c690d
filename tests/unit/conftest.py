# SPDX-License-Identifier: LGPL-2.1-or-later
"""What more than one file's tests begin with: a host of their own, a PID 1 with a store, a pipe."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.cuts import Cuts
from tests.doubles.fake_pid1 import FakePid1
from tests.doubles.whole_host import World
from virtd.fdstore import Store

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


@pytest.fixture
def cuts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Cuts:
    # A short name: there are sockets below it, whose paths have 108 bytes (unix(7)).
    return Cuts(tmp_path_factory.mktemp("cuts"), monkeypatch)


@pytest.fixture
def pid1(tmp_path: Path) -> Iterator[FakePid1]:
    fake = FakePid1(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def store(pid1: FakePid1) -> Iterator[Store]:
    store = Store.from_environment(pid1.environment())
    yield store
    store.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)
