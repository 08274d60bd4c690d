# SPDX-License-Identifier: LGPL-2.1-or-later
"""No single file, whatever it is and wherever it lies, costs the daemon its start or any other object anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import to_builtins

from tests.doubles.whole_host import ROOT, World, on_loop
from virtd import errors, layout, records, strictmodes
from virtd.drivers.loader import MODULES
from virtd.messages import Message
from virtd.objects import definitions, reading
from virtd.replies.daemon import Status

if TYPE_CHECKING:
    from collections.abc import Callable

DRIVERS = list(MODULES)
NOT_UTF8 = os.fsdecode(b"B\xfcro")


def a_socket(path: str) -> None:
    here = os.getcwd()
    os.chdir(os.path.dirname(path))  # its address has 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
            os.rename("s", path)
    finally:
        os.chdir(here)


def sparse(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(10 << 30)


def holding(content: bytes) -> Callable[[str], None]:
    return lambda path: _write(path, content)


def _write(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


ODD: dict[str, Callable[[str], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": os.mkdir,
    "a socket": a_socket,
    "a link to /dev/zero": lambda path: os.symlink("/dev/zero", path),
    "a link to /dev/ptmx": lambda path: os.symlink("/dev/ptmx", path),
    "a link to itself": lambda path: os.symlink(os.path.basename(path), path),
    "a link to nowhere": lambda path: os.symlink("/nowhere", path),
    "10 GiB of holes": sparse,
    "2 MiB": holding(b"x" * (2 << 20)),
    "noise": holding(bytes(range(256)) * 20),
    "a dotted key": holding(b".".join([b"a"] * 50_000) + b" = 1"),
    "deep TOML": holding(b"a = " + b"[" * 100_000),
    "deep JSON": holding(b"[" * 100_000),
    "deep JSON objects": holding(b'{"a":' * 100_000),
    "many digits": holding(b"a = " + b"1" * 500_000),
    "many digits of JSON": holding(b'{"schema": ' + b"1" * 500_000 + b"}"),
    "surrogates of JSON": holding(b'{"name": "\\udcff"}'),
}


async def works(world: World) -> Status:
    """The daemon answers, and `good` can be had. Its status."""
    assert world.host is not None
    assert "good" in {item["name"] for item in await world.host.domains.listing()}
    status = await world.host.status()
    for row in status["problems"]:
        for text in (row.object, row.text, row.hint):
            text.encode()
    return status


NAMES = [NOT_UTF8, "with blanks", "-", "x" * 200]
CASES = [(kind, "odd", driver) for kind in ODD for driver in DRIVERS]
CASES += [(kind, name, driver) for kind in ("a FIFO", "noise") for name in NAMES for driver in DRIVERS]


@pytest.mark.parametrize(("kind", "name", "driver"), CASES, ids=ascii)
@on_loop
async def test_as_a_definition(world: World, kind: str, name: str, driver: str) -> None:
    os.makedirs(f"{world.paths.etc}/{driver}", exist_ok=True)
    async with world.daemon():
        await world.define("good")
    path = world.paths.definition(driver, name)
    ODD[kind](path)
    async with world.daemon() as host:
        status = await works(world)
        (problem,) = status["problems"]
        assert problem["object"].startswith(f"{driver}/"), problem
        assert problem["hint"]
        again = await host.reload(by=ROOT)
        assert [row["text"] for row in again["problems"]] == [problem["text"]]
        told = world.told(Message.DEFINITION_PROBLEM)
        assert {message["VIRTD_FILE"] for message in told} == {path}
        assert all(len(message["text"]) < 600 for message in told)


@pytest.mark.parametrize(("kind", "name", "driver"), CASES, ids=ascii)
@on_loop
async def test_as_a_record(world: World, kind: str, name: str, driver: str) -> None:
    os.makedirs(f"{world.paths.run}/{driver}", exist_ok=True)
    async with world.daemon():
        pid = await world.run("good")
    ODD[kind](world.paths.record(driver, name))
    async with world.daemon() as host:
        status = await works(world)
        info = await host.domains.info("good")
        assert (info["state"], info["pid"]) == ("running", pid), "the others' records are read all the same"
        (problem,) = status["problems"]
        assert problem["object"].startswith(f"{driver}/")
        assert not os.path.lexists(world.paths.record(driver, name))
        assert len(world.told(Message.RECORD_QUARANTINED)) == 1
        differences = (await host.check_all(repair=True, by=None))["differences"]
        assert all(row["repaired"] for row in differences), differences
        assert os.listdir(world.paths.quarantine) == []
        await host.domains.stop("good", by=ROOT)


@pytest.mark.parametrize("kind", ["a FIFO", "a link to itself", "noise", "a socket"])
@on_loop
async def test_in_place_of_a_directory(world: World, kind: str) -> None:
    async with world.daemon():
        pid = await world.run("good")
    etc, run = f"{world.paths.etc}/qemu", f"{world.paths.run}/qemu"
    os.rename(etc, f"{etc}.old")
    ODD[kind](etc)
    for other in ("network", "lxc", "storage"):
        for path in (f"{world.paths.etc}/{other}", f"{world.paths.run}/{other}"):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)
            ODD[kind](path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(f"{world.paths.run}/quarantine")
    ODD[kind](f"{world.paths.run}/quarantine")
    async with world.daemon() as host:
        status = await works(world)
        assert (await host.domains.info("good"))["pid"] == pid
        assert {row["object"] for row in status["problems"]} >= set(DRIVERS)
        # What was known of definitions stays in force until they can be read again.
        os.unlink(etc)
        os.rename(f"{etc}.old", etc)
        await host.reload(by=ROOT)
        assert (await host.domains.info("good"))["persistent"]
        os.rename(etc, f"{etc}.old")
        ODD[kind](etc)
        await host.reload(by=ROOT)
        assert (await host.domains.info("good"))["persistent"]
        await host.domains.stop("good", by=ROOT)
    os.rename(run, f"{run}.old")
    ODD[kind](run)
    async with world.daemon() as host:
        status = await host.status()
        assert any(f"{run} can't be read" in row["text"] for row in status["problems"])
        with pytest.raises((errors.HostError, errors.NotFound)):
            await host.domains.start("good", by=ROOT)


@pytest.mark.parametrize("where", ["fifos", "autostarted", "launched", "daemon.json", "fifos/x", "qemu/good"])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a socket", "a link to /dev/zero", "noise"])
@on_loop
async def test_elsewhere_in_run(world: World, kind: str, where: str) -> None:
    async with world.daemon():
        await world.define("good", more="autostart = true\n")
    path = f"{world.paths.run}/{where}"
    if where == "fifos/x":
        os.makedirs(f"{world.paths.run}/fifos", exist_ok=True)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    ODD[kind](path)
    async with world.daemon() as host:
        await works(world)
        await host.autostart()
        await works(world)


@on_loop
async def test_thousands_of_new_definitions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has to be given a uuid. Others have their turn meanwhile, and no file is left without one."""
    turns = 0
    monkeypatch.setattr("virtd.host.TURN", 0.0)
    async with world.daemon() as host:
        await world.define("good")
        for number in range(200):
            _write(world.paths.definition("qemu", f"new{number}"), world.text(f"new{number}").encode())

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(others())
        changed = (await host.reload(by=ROOT))["changed"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(changed) == 200
        assert turns > 100
        uuids = {item["name"]: item["uuid"] for item in await host.domains.listing()}
        assert (await host.check_all(repair=False, by=None))["differences"] == []
    async with world.daemon() as host:
        assert {item["name"]: item["uuid"] for item in await host.domains.listing()} == uuids


@on_loop
async def test_no_uuid_where_it_cannot_be_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as host:
        _write(world.paths.definition("qemu", "good"), world.text("good").encode())
        await host.reload(by=ROOT)

        def refuse(path: str, *_args: Any, **_more: Any) -> None:
            raise errors.HostError(f"Cannot write {path}: Read-only file system")

        monkeypatch.setattr("virtd.files.write", refuse)
        _write(world.paths.definition("qemu", "new"), world.text("new").encode())
        _write(world.paths.definition("qemu", "good"), world.text("good", more="vcpus = 2").encode())
        found = await host.reload(by=ROOT)
        assert len(found["problems"]) == 2
        assert [item["name"] for item in await host.domains.listing()] == ["good"]


# Whose they are


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("what", ["a user's", "everybody's", "a group's", "a link into a user's directory"])
@on_loop
async def test_definitions_that_others_can_write(world: World, what: str, tmp_path: Path) -> None:
    async with world.daemon():
        await world.define("good")
        await world.define("bad")
    path = world.paths.definition("qemu", "bad")
    match what:
        case "a user's":
            os.chown(path, 65534, 0)
        case "everybody's":
            os.chmod(path, 0o646)
        case "a group's":
            os.chown(path, 0, 65534)
            os.chmod(path, 0o664)
        case _:
            (tmp_path / "theirs").mkdir()
            os.chown(tmp_path / "theirs", 65534, 65534)
            os.rename(path, tmp_path / "theirs/bad.toml")
            os.symlink(tmp_path / "theirs/bad.toml", path)
    async with world.daemon() as host:
        (problem,) = (await works(world))["problems"]
        assert problem["object"] == "qemu/bad"
        assert "only root can write" in problem["text"] or "it leads into" in problem["text"]
        assert problem["hint"]
        assert [item["name"] for item in await host.domains.listing()] == ["good"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@on_loop
async def test_directories_that_others_can_write(world: World) -> None:
    """Told, but what is root's in there is taken: it says itself whose it is."""
    async with world.daemon():
        await world.define("good")
    os.chmod(f"{world.paths.etc}/qemu", 0o777)
    async with world.daemon():
        (problem,) = (await works(world))["problems"]
        assert problem["object"] == "qemu"
        assert f"Definitions in {world.paths.etc}/qemu can be replaced by others" in problem["text"]
    os.chmod(f"{world.paths.etc}/qemu", 0o1777)
    async with world.daemon():
        assert (await works(world))["problems"] == [], "the sticky bit keeps root's files root's"


@on_loop
async def test_a_rewrite_keeps_link_and_mode(world: World, tmp_path: Path) -> None:
    kept = tmp_path / "git"
    kept.mkdir()
    path = world.paths.definition("qemu", "good")
    (kept / "good.toml").write_text(world.text("good"))
    (kept / "good.toml").chmod(0o600)
    os.symlink(kept / "good.toml", path)
    async with world.daemon() as host:
        uuid = (await host.domains.info("good"))["uuid"]
        assert os.path.islink(path)
        assert uuid in (kept / "good.toml").read_text()
        assert mode_of(path) == 0o600
        await host.domains.set_autostart("good", True, by=ROOT)
        await world.define("good", more="vcpus = 2")
        assert os.path.islink(path)
        assert "vcpus = 2" in (kept / "good.toml").read_text()
        assert mode_of(path) == 0o600
        (kept / "good.toml").write_text(world.text("good", more=f'uuid = "{uuid}"\nvcpus = 3'))
        assert (await host.reload(by=ROOT))["changed"] == ["good"]
        await host.domains.undefine("good", by=ROOT)
        assert not os.path.lexists(path)
        assert (kept / "good.toml").exists()


@on_loop
async def test_a_byte_order_mark_in_a_file(world: World) -> None:
    path = world.paths.definition("qemu", "good")
    _write(path, b"\xef\xbb\xbf" + world.text("good").encode())
    async with world.daemon() as host:
        await works(world)
        assert to_builtins(await host.reload(by=ROOT)) == {"changed": [], "problems": []}
        await host.domains.set_autostart("good", True, by=ROOT)
    async with world.daemon() as host:
        (item,) = await host.domains.listing()
        assert item["autostart"]


def test_who_else_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o644)
    assert strictmodes.fault(os.stat(tmp_path / "file")) == ""
    assert list(strictmodes.faults_above(os.fspath(tmp_path / "file"))) == []


# Directories


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_directories_have_their_modes_whoever_makes_them(world: World, mask: int) -> None:
    repository = Path(__file__).resolve().parents[3]
    lines = [line.split() for line in (repository / "units/virtd.tmpfiles").read_text().splitlines()]
    of_tmpfiles = {line[1]: int(line[2], 8) for line in lines if line[:1] == ["d"]}
    of_virtd = {path.removeprefix(world.paths.root): mode for path, mode in layout.directories(world.paths)}
    assert of_tmpfiles == of_virtd
    for _path, mode in layout.directories(world.paths):
        assert mode in (0o755, 0o711, 0o700)
    old = os.umask(mask)
    try:
        os.rmdir(f"{world.paths.run}/qemu")
        os.rmdir(f"{world.paths.lib}")
        os.mkdir(f"{world.paths.run}/network", 0o700)  # by a version that left the umask in it
        layout.ensure(world.paths)
    finally:
        os.umask(old)
    made = {path: mode_of(path) for path, _mode in layout.directories(world.paths)}
    changed = {path for path, mode in layout.directories(world.paths) if made[path] != mode}
    assert changed <= {f"{world.paths.etc}", f"{world.paths.etc}/qemu", world.paths.log, f"{world.paths.log}/qemu"}


def test_a_record_is_saved_where_there_is_no_directory(world: World) -> None:
    os.rmdir(f"{world.paths.run}/qemu")
    old = os.umask(0o077)
    try:
        record = records.Record(
            driver="qemu", name="x", uuid="", state="stopped", reason=f"{NOT_UTF8}", since=records.now()
        )
        records.Records(world.paths, "qemu").save(record)
    finally:
        os.umask(old)
    assert mode_of(f"{world.paths.run}/qemu") == 0o711
    assert world.record("x").reason == r"B\xfcro"


def test_batches_are_smaller_than_the_watchdogs_patience() -> None:
    assert reading.BATCH <= 4 * definitions.AT_ONCE
