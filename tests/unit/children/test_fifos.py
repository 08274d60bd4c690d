# SPDX-License-Identifier: LGPL-2.1-or-later
"""A child's pipes by path: as pipes are, in nobody's way later, and gone with the child."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, on_loop
from tests.unit.guests.test_fsck import check
from virtd.children import fifos

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.doubles.whole_host import World


def test_they_are_pipes_like_any_other(tmp_path: Path) -> None:
    directory = str(tmp_path / "fifos" / "qemu.web1")
    read, write = fifos.make(directory, ("stderr",))
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(os.path.dirname(directory)).st_mode) == 0o700
    assert os.get_blocking(read)
    assert os.get_blocking(write)
    assert fifos.fresh(directory)
    theirs = os.open(f"{directory}/stderr", os.O_WRONLY)
    fifos.retire(directory)
    fifos.retire(directory)
    assert not fifos.fresh(directory)
    os.close(write)
    os.write(theirs, b"words")
    os.close(theirs)
    assert os.read(read, 99) == b"words"
    assert os.read(read, 99) == b"", "the end of file"
    os.close(read)
    for name in fifos.NAMES:  # which nobody has to wait for
        with open(f"{directory}/{name}", "r+b", buffering=0) as file:
            assert file.write(b"ignored") == 7
    fifos.remove(directory)
    fifos.remove(directory)
    assert os.listdir(tmp_path / "fifos") == []


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = os.mkfifo

    def mkfifo(path: str, mode: int) -> None:
        if made:
            raise OSError(28, "No space left on device")
        made.append(path)
        real(path, mode)

    monkeypatch.setattr(os, "mkfifo", mkfifo)
    with pytest.raises(OSError, match="No space left"):
        fifos.make(str(tmp_path / "qemu.web1"), fifos.NAMES)
    assert os.listdir(tmp_path) == []


@on_loop
async def test_no_stop_waits_in_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd opens all three for ExecStop=; with /run full, no link could take their places after the start."""
    with monkeypatch.context() as full:
        full.setattr(os, "symlink", failing(os.symlink))
        async with world.daemon():
            await world.run("web1")
            directory = world.paths.fifos("qemu", "web1")
            assert os.listdir(directory) == []
    with monkeypatch.context() as stuck:
        stuck.setattr(os, "unlink", failing(os.unlink))
        async with world.daemon():
            await world.run("web2")
    collected: list[tuple[str, list[bool]]] = []

    def step(what: str) -> None:
        if what.startswith("collect"):
            there = world.paths.fifos("qemu", what[-12:-8])
            collected.append((what[-12:-8], [os.path.islink(f"{there}/{name}") for name in fifos.NAMES]))

    async with world.daemon() as host:
        monkeypatch.setattr(world.units, "step", step)
        for name in ("web1", "web2"):
            await host.domains.stop(name, by=ROOT)
    assert collected == [("web1", [True] * 3), ("web2", [True] * 3)]


def failing(real: Callable[..., None]) -> Callable[..., None]:
    """`real`, but for a child's pipes."""

    def call(*paths: str) -> None:
        if "/fifos/" in str(paths[-1]):
            raise OSError(28, "No space left on device")
        real(*paths)

    return call


@on_loop
async def test_a_start_that_left_nothing_else_is_swept_up(world: World) -> None:
    """A crash between the pipes and the record of them, or before the first pipe."""
    async with world.daemon():
        pid = await world.run("web1")
        fifos.make(world.paths.fifos("qemu", "web2"), ())
        fifos.retire(world.paths.fifos("qemu", "web2"))
        fifos.make(world.paths.fifos("qemu", "web4"), ())
        for fd in fifos.make(world.paths.fifos("qemu", "web3"), fifos.NAMES):
            os.close(fd)
    async with world.daemon() as host:
        assert fifos.owners(world.paths.fifos()) == [("qemu", "web1"), ("qemu", "web2")]
        assert (await host.domains.info("web1"))["pid"] == pid
        # Whatever else is left over is told by fsck, but not what may be of a start that is under way.
        assert await check(host) == []
        for name in ("web1", "web2"):
            os.utime(world.paths.fifos("qemu", name), (0, 0))
        (found,) = await check(host, repair=True)
        assert found["repaired"]
        assert "qemu.web2 is of a child that is gone" in found["text"]
        await host.domains.stop("web1", by=ROOT)
        assert fifos.owners(world.paths.fifos()) == []
