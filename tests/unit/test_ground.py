# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory pool whose file system isn't mounted: the empty directory below isn't the pool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.unit.whole_host import on_loop
from virtd import errors
from virtd.drivers.storage import mounts
from virtd.drivers.storage.directory import Directory
from virtd.drivers.storage.ground import Ground, above
from virtd.model import pool as model

if TYPE_CHECKING:
    from pathlib import Path

    from virtd.units import Units


class Systemd:
    """Which mount units it knows of."""

    def __init__(self, *known: str) -> None:
        self.known = known

    async def unit_property(self, name: str, prop: str) -> Any:
        assert prop == "LoadState"
        return "loaded" if name in self.known else "not-found"


class Host:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *known: str) -> None:
        self.top = tmp_path / "late" / "pool"
        self.top.mkdir(parents=True)
        self.mountpoint = str(tmp_path / "late")
        self.mounted: set[str] = set()
        self.systemd = Systemd(*(mounts.unit_of(self.mountpoint) if unit == "ours" else unit for unit in known))
        self.memory = str(tmp_path / "lib/storage/p.json")
        monkeypatch.setattr(mounts, "mounted", lambda path: "/dev/vdb" if path in self.mounted else None)

    def pool(self, path: str = "") -> Directory:
        async def units() -> Units:
            return cast("Units", self.systemd)

        pool = model.Pool("p", path or str(self.top))
        return Directory(pool, os.getuid(), os.getgid(), Ground(pool, self.memory, units))


@on_loop
async def test_systemd_knows_that_something_is_to_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, monkeypatch, "ours")
    with pytest.raises(errors.HostError, match="isn't mounted") as refused:
        await host.pool().start()
    assert mounts.unit_of(host.mountpoint) in refused.value.hint
    with pytest.raises(errors.HostError, match="isn't mounted"):
        await host.pool().build()
    assert os.listdir(host.top) == []
    host.mounted.add(host.mountpoint)
    await host.pool().start()
    assert os.listdir(host.top) == [".virtd"]


@on_loop
async def test_the_last_time_it_was_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has told systemd of it: a script mounts it."""
    host = Host(tmp_path, monkeypatch)
    host.mounted.add(host.mountpoint)
    await host.pool().start()
    assert await host.pool().lost() == ""
    host.mounted.clear()
    assert host.mountpoint in await host.pool().lost()
    with pytest.raises(errors.HostError, match="isn't mounted") as refused:
        await host.pool().start()
    assert "build" not in refused.value.hint
    with pytest.raises(errors.HostError, match="isn't mounted"):
        await host.pool().build()
    # As the hint says: undefined, which removes the file, and defined anew.
    os.unlink(host.memory)
    await host.pool().start()
    await host.pool().start()


@on_loop
async def test_another_path_is_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, monkeypatch)
    host.mounted.add(host.mountpoint)
    await host.pool().start()
    host.mounted.clear()
    (tmp_path / "elsewhere").mkdir()
    await host.pool(str(tmp_path / "elsewhere")).start()


@on_loop
async def test_a_damaged_memory_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, monkeypatch)
    os.makedirs(os.path.dirname(host.memory))
    for content in (b"", b"[]", b'{"path": 1}'):
        with open(host.memory, "wb") as file:
            file.write(content)
        await host.pool().start()
    os.unlink(host.memory)
    os.mkfifo(host.memory)
    await host.pool().start()


def test_above() -> None:
    assert above("/srv/late/pool") == ["/srv/late/pool", "/srv/late", "/srv"]
    assert above("/") == []
