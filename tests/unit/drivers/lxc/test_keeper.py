# SPDX-License-Identifier: LGPL-2.1-or-later
"""Marking the control groups of containers, with directories in place of groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from virtd.drivers.lxc import cgroup, keeper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = f"user.{keeper.MARK}"


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of those that are marked: not every file system supports such attributes."""
    found: set[str] = set()

    def setxattr(path: str, name: str, value: bytes) -> None:
        assert (name, value) == (NAME, b"1")
        os.stat(path)
        found.add(os.path.basename(path))

    monkeypatch.setattr(os, "setxattr", setxattr)
    return found


@pytest.fixture
def kept() -> Iterator[keeper.Keeper]:
    made = keeper.Keeper()
    yield made
    made.close()


def test_all_that_is_there_is_marked(tmp_path: Path, kept: keeper.Keeper, marked: set[str]) -> None:
    (tmp_path / "payload/system.slice/a.service").mkdir(parents=True)
    (tmp_path / "monitor").mkdir()
    (tmp_path / "payload/cgroup.procs").touch()
    kept.take(str(tmp_path))
    assert marked == {tmp_path.name, "payload", "monitor", "system.slice", "a.service"}


def test_what_is_made_later_is_marked_too(tmp_path: Path, kept: keeper.Keeper, marked: set[str]) -> None:
    """Including groups that exist below a new one when it is seen; those that have disappeared are ignored."""
    (tmp_path / "payload").mkdir()
    kept.take(str(tmp_path))
    (tmp_path / "payload/user.slice/session").mkdir(parents=True)
    (tmp_path / "payload/gone").mkdir()
    (tmp_path / "payload/gone").rmdir()
    kept.look()
    assert {"user.slice", "session"} <= marked
    assert "gone" not in marked
    (tmp_path / "payload/user.slice/session/deeper").mkdir()
    kept.look()
    assert "deeper" in marked
    kept.look()  # with nothing new


def test_an_old_kernel_has_them_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def setxattr(path: str, name: str, value: bytes) -> None:
        names.append(name)
        if name.startswith("user."):
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", setxattr)
    keeper.mark(str(tmp_path))
    assert names == [NAME, f"trusted.{keeper.MARK}"]


def test_after_reboots(tmp_path: Path) -> None:
    """At each reboot LXC 6 makes a container's groups anew, one deeper; with the first ones it couldn't be frozen."""
    unit = "virtd-lxc-web1.service"
    assert keeper.payload(str(tmp_path)) is None
    (tmp_path / "lxc.pivot/lxc.pivot/payload").mkdir(parents=True)
    assert keeper.payload(str(tmp_path)) == f"{tmp_path}/lxc.pivot/lxc.pivot/payload"
    (tmp_path / "payload").mkdir()
    assert keeper.payload(str(tmp_path)) == f"{tmp_path}/payload"
    above = f"/virtd.slice/virtd-lxc.slice/{unit}"
    for deeper in ("", "/lxc.pivot", "/lxc.pivot/lxc.pivot"):
        assert cgroup.payload_of(f"{above}{deeper}/monitor", unit) == f"{cgroup.CGROUPS}{above}{deeper}/payload"
    assert cgroup.payload_of(above, unit) is None
    assert cgroup.payload_of("/user.slice/monitor", unit) is None
