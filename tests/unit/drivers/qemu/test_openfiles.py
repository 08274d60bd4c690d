# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk that somebody deletes while a guest has it open is told of while something can be done."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, World, on_loop
from virtd import reach
from virtd.drivers.qemu import firmware, opened, openfiles, prerequisites
from virtd.messages import Message

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("how", ["deleted", "another file"])
@on_loop
async def test_a_disk_that_is_gone(world: World, tmp_path: Path, how: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\0" * 512)
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{disk}", format = "raw" }}]')
        await host.look()
        assert (await host.status())["problems"] == []
        assert (await host.check_all(repair=False, by=None))["differences"] == []
        kept = tmp_path / "kept"
        os.rename(disk, kept)
        if how == "another file":
            disk.write_bytes(b"\0" * 512)
        for _ in range(2):
            await host.look()
        (problem,) = (await host.status())["problems"]
        assert problem["object"] == "qemu/web1"
        assert f"{disk} " in problem["text"]
        assert how in problem["text"]
        assert problem["hint"]
        assert len(world.told(Message.DISK_LOST)) == 1
        (difference,) = (await host.check_all(repair=True, by=None))["differences"]
        assert (difference["kind"], difference["repaired"]) == ("file", False)
        os.rename(kept, disk)
        await host.look()
        assert (await host.status())["problems"] == []
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_a_disk_that_is_cut_short(world: World, tmp_path: Path) -> None:
    """The guest would only find out when it reads what was behind the new end. One that has grown is in order."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"x" * 4096)
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{disk}", format = "raw" }}]')
        os.truncate(disk, 8192)
        await host.look()
        assert (await host.status())["problems"] == []
        os.truncate(disk, 512)
        await host.look()
    async with world.daemon() as host:
        (problem,) = (await host.status())["problems"]
        assert problem["text"] == f"{disk} was truncated to 512 of 4096 bytes under the guest"
        assert "backup" in problem["hint"]
        assert len(world.told(Message.DISK_LOST)) == 1
        (difference,) = (await host.check_all(repair=False, by=None))["differences"]
        assert difference["kind"] == "file"
        os.truncate(disk, 4096)
        await host.look()
        assert (await host.status())["problems"] == []
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_uefi_that_is_upgraded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new package of it under a running guest is no loss; that of the guest's own variables is."""
    program, template = tmp_path / "code", tmp_path / "vars"
    program.write_bytes(b"code")
    template.write_bytes(b"vars")
    mapping = {
        "device": "flash",
        "executable": {"filename": str(program), "format": "raw"},
        "nvram-template": {"filename": str(template), "format": "raw"},
    }
    target = {"architecture": os.uname().machine, "machines": ["pc-q35-*"]}
    (tmp_path / "a.json").write_text(
        json.dumps({"interface-types": ["uefi"], "mapping": mapping, "targets": [target]})
    )
    monkeypatch.setattr(firmware, "PLACES", (str(tmp_path),))
    async with world.daemon() as host:
        text = world.text("web1").replace("[boot]", '[boot]\nfirmware = "uefi"')
        await host.domains.define(text, "test", check=False, by=ROOT)
        await host.domains.start("web1", by=ROOT)
        program.rename(tmp_path / "old")
        program.write_bytes(b"new code")
        await host.look()
        assert (await host.status())["problems"] == []
        assert (await host.check_all(repair=False, by=None))["differences"] == []
        machine = host.domains.driver.machines["web1"]
        os.unlink(world.paths.nvram("web1", machine.uuid, secure=False))
        await host.look()
        (problem,) = (await host.status())["problems"]
        assert ".fd was deleted" in problem["text"]
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_a_record_without_sizes(world: World, tmp_path: Path) -> None:
    """As an older virtd has made it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"x" * 4096)
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{disk}", format = "raw" }}]')
        machine = host.domains.driver.machines["web1"]
        assert machine.record is not None
        machine.keep(data={key: value for key, value in machine.record.data.items() if key != "sizes"})
        os.truncate(disk, 512)
        await host.look()
        assert (await host.status())["problems"] == []
        await host.domains.stop("web1", by=ROOT)


def test_files_are_looked_for_where_the_host_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount below a private one never reaches virtd's namespace: its files aren't deleted."""
    (tmp_path / "private").mkdir()
    disk = tmp_path / "private/a"
    disk.write_bytes(b"x" * 512)
    monkeypatch.setattr(reach, "_ROOT", f"{tmp_path}/")
    identity = prerequisites.identity("/private/a")
    assert identity == (disk.stat().st_dev, disk.stat().st_ino)
    assert opened.sizes({identity: ("/private/a", True)}) == {"/private/a": 512}
    assert openfiles.wrong([openfiles.File(identity, "/private/a", 512)]) == []
    disk.unlink()
    assert openfiles.wrong([openfiles.File(identity, "/private/a", 512)]) != []
