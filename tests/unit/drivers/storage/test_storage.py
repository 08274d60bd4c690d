# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools without systemd: definitions, image headers, and directories that never show an incomplete volume."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.doubles.whole_host import on_loop
from virtd import errors, mountinfo
from virtd.cli.output import rounded
from virtd.drivers import nodes, qcow2
from virtd.drivers.qemu import images
from virtd.drivers.qemu import prerequisites as qemu_host
from virtd.drivers.qemu.devices.disk import Disk
from virtd.drivers.storage import images as storage_images
from virtd.drivers.storage import mounts, programs, worker
from virtd.drivers.storage import prerequisites as storage_host
from virtd.drivers.storage.aside import Aside
from virtd.drivers.storage.backend import Backing, Meta
from virtd.drivers.storage.directory import Directory
from virtd.model import domain as domain_model
from virtd.model import pool as model
from virtd.model.drives import Format

if TYPE_CHECKING:
    from collections.abc import Coroutine


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ('path = "/srv/p"', "name", "missing"),
        ('name = "../x"\npath = "/srv/p"', "name", "letters"),
        ('name = "job-7"\npath = "/srv/p"', "name", "job-"),
        ('name = "p"', "path", "missing"),
        ('name = "p"\npath = "srv"', "path", "absolute"),
        ('name = "p"\npath = "/srv/../etc"', "path", "without"),
        ('name = "p"\npath = "/srv//p"', "path", "without"),
        ('name = "p"\npath = "/srv/\\u0000"', "path", "absolute"),
        ('name = "p"\npath = "/"', "path", "of its own"),
        ('name = "p"\npath = "/srv/p"\nsource = "/dev/vdb"', "source", "filesystem"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"', "source", "what to mount"),
        ('name = "p"\npath = "/srv"\ntype = "filesystem"\nsource = "/dev/vdb"', "path", "two levels"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "vdb"', "source", "a device"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "/dev/../etc"', "source", "a device"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "nas:/x"\nfstype = "ext4"', "fstype", "nfs"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "/dev/vdb"\nfstype = "nfs"', "source", "export"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "/dev/a\\\\"', "source", "neither a backslash"),
        ('name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "/dev/a "', "source", "neither a backslash"),
        (
            'name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "/dev/vdb"\noptions = "a b"',
            "options",
            "mount",
        ),
        ('name = "p"\npath = "/srv/p"\ntype = "logical"', "path", "volume group"),
        ('name = "p"\npath = "/dev/a/b"\ntype = "logical"', "path", "volume group"),
        ('name = "p"\npath = "/srv/p"\ntype = "rbd"', "type", "one of"),
        ('name = "p"\npath = "/srv/p"\nuuid = "1"', "uuid", "UUID"),
        ('name = "p"\npath = "/srv/p"\nsize = 1', "size", "unknown"),
    ],
)
def test_what_a_pool_cant_be(text: str, key: str, expected: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        model.parse(text, "p.toml")
    assert caught.value.key == key
    assert expected in caught.value.expected
    assert caught.value.message.startswith("p.toml: ")


def test_pools() -> None:
    for source in ("/dev/disk/by-label/x", "nas:/data", "[fd00::1]:/data"):
        text = f'name = "p"\npath = "/srv/p"\ntype = "filesystem"\nsource = "{source}"\noptions = "noatime,discard"'
        assert model.parse(text, "x").source == source
    assert model.parse('name = "vg"\npath = "/dev/vg0"\ntype = "logical"', "x").type is model.Type.LOGICAL


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "-x", "a/b", "../x", "a b", "a\n", "é", "x" * 128, "a\0", "a,b"]
)
def test_what_a_volume_cant_be_called(name: str) -> None:
    with pytest.raises(errors.InvalidDefinition):
        model.check_volume(name)


@pytest.mark.parametrize(("value", "size"), [("10G", 10 << 30), ("512MiB", 512 << 20), (513, 1024), ("1k", 1024)])
def test_sizes(value: str | int, size: int) -> None:
    assert model.volume_size(value) == size


@pytest.mark.parametrize("value", ["0", 0, "-1", "", "10X", "8000P", "1.5G"])
def test_bad_sizes(value: str | int) -> None:
    with pytest.raises(errors.InvalidDefinition):
        model.volume_size(value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (1000, "1000B"),
        (1024, "1K"),
        (196 << 10, "196K"),
        (1536 << 20, "1.5G"),
        (10 << 30, "10G"),
        (1001 << 20, "1001M"),
        ((1001 << 20) + 1, "0.98G"),
        (252 << 30, "252G"),
        (5 << 60, "5120P"),
    ],
)
def test_sizes_as_people_read_them(number: int, text: str) -> None:
    assert rounded(number) == text


def test_what_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 8:2 / /srv/my\\040pool rw,nodev shared:3 - xfs /dev/sdb1 rw\n"
        "31 30 0:40 / /srv/my\\040pool rw - nfs server:/a\\040b rw\n"
    )
    monkeypatch.setattr(mountinfo, "PATH", str(tmp_path / "mountinfo"))
    assert mounts.table() == {"/": "/dev/sda1", "/srv/my pool": "server:/a b"}
    assert mounts.mounted("/srv/my pool") == "server:/a b"
    assert mounts.mounted("/srv") is None


@on_loop
async def test_a_mount_after_a_soft_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then systemd has forgotten that a unit is transient, and leaves its file behind when it is stopped."""
    monkeypatch.setattr(mounts, "TRANSIENT", str(tmp_path))
    left = tmp_path / "srv-m.mount"
    left.touch()

    class Units:
        fragment = str(left)

        async def unit_property(self, _name: str, prop: str) -> Any:
            return {"Transient": False, "FragmentPath": self.fragment}[prop]

        async def start_other(self, _name: str, properties: Any, *, timeout: float) -> str:
            # At the end of a line in systemd's own file it would take away the next one.
            assert not any(str(value).endswith("\\") for _key, _kind, value in properties)
            return "failed" if left.exists() else "done"

    units: Any = Units()
    assert await mounts.is_ours(units, "/srv/m")
    await mounts.mount(units, "/dev/loop0", "/srv/m", "ext4", "nodev")
    assert not left.exists()
    await mounts.mount(units, "/dev/loop0", "/srv/m\\", "ext4", "nodev")
    Units.fragment = "/etc/systemd/system/srv-m.mount"
    assert not await mounts.is_ours(units, "/srv/m")


# qcow2 headers


def header(
    *,
    backing: bytes = b"",
    kind: bytes = b"",
    size: int = 1 << 30,
    bits: int = 16,
    version: int = 3,
    features: int = 0,
    snapshots: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A header as in docs/interop/qcow2.txt, followed by a snapshot table."""
    extensions = (
        struct.pack(">II", 0xE2792ACA, len(kind)) + kind.ljust((len(kind) + 7) // 8 * 8, b"\0") if kind else b""
    )
    extensions += bytes(8)
    at = 104 + len(extensions) if backing else 0
    table = b""
    for number, (identifier, name) in enumerate(snapshots):
        entry = struct.pack(">QIHHIIQII", 0, 0, len(identifier), len(name), 1000 + number, 0, 0, 7, 16)
        entry += struct.pack(">QQ", 5 << 32, 0) + identifier + name
        table += entry + bytes(-len(entry) % 8)
    first = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, at, len(backing), bits, size, 0, 0, 0, 0, 0, len(snapshots),
        1 << 16 if snapshots else 0,
    )  # fmt: skip
    first += struct.pack(">QQQII", features, 0, 0, 4, 104)
    return (first + extensions + backing).ljust(1 << 16, b"\0") + table


def read(tmp_path: Path, data: bytes) -> qcow2.Header:
    path = tmp_path / "image"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return qcow2.read(fd, "image", snapshots=True)
    finally:
        os.close(fd)


def test_a_header(tmp_path: Path) -> None:
    found = read(
        tmp_path, header(backing=b"/srv/base", kind=b"qcow2", snapshots=((b"1", b"before"), (b"22", b"x" * 9)))
    )
    assert (found.size, found.backing) == (1 << 30, "/srv/base")
    assert [(snapshot.id, snapshot.name, snapshot.at) for snapshot in found.snapshots] == [
        ("1", "before", 1000),
        ("22", "x" * 9, 1001),
    ]
    assert found.snapshots[0].state == 5 << 32
    plain = read(tmp_path, header())
    assert (plain.backing, plain.snapshots) == ("", ())
    assert read(tmp_path, header(features=2)).corrupt
    assert read(tmp_path, header(features=4)).data_file


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "doesn't begin"),
        (b"QFI\xfb" + bytes(20), "doesn't begin"),
        (bytes(200), "doesn't begin"),
        (header(version=7), "version"),
        (header(bits=60), "clusters"),
        (header()[:90], "cut off"),
        (header(backing=b"x" * 1024), "outside the header"),
        (header(backing=b"abc")[:114], "cut off"),
        (header(backing=b"a\0b"), "cut off"),
        (header(backing=b"\xff\xed\xa0\x80"), "no text"),  # which could be told to no client
        (header(snapshots=((b"1", b"a"),))[: 1 << 16], "outside the file"),
    ],
)
def test_headers_that_lie(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(errors.InvalidState) as caught:
        read(tmp_path, data)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (header(backing=b"/etc/shadow", kind=b"raw"), 'has the backing file "/etc/shadow", which only a volume can'),
        (header(features=4), "its data is in another file"),
        (header()[:32] + struct.pack(">I", 2) + header()[36:], "it is encrypted"),
        (header(features=2), "marked as corrupt"),
    ],
)
def test_an_image_that_is_more_than_its_file_is_no_disk(tmp_path: Path, data: bytes, why: str) -> None:
    """QEMU would open the file that the header names; without that the guest would see holes, not its data."""
    path = tmp_path / "disk.qcow2"
    text = f'name = "d"\nmemory = "64M"\n[[disk]]\npath = "{path}"\nformat = "%s"\n'
    who = qemu_host.Account("me", "me", os.getuid(), os.getgid(), ())
    path.write_bytes(header())
    qemu_host.check_files(domain_model.parse(text % "qcow2", "d.toml"), "d.toml", who)
    path.write_bytes(data)
    with pytest.raises(errors.InvalidDefinition) as caught:
        qemu_host.check_files(domain_model.parse(text % "qcow2", "d.toml"), "d.toml", who)
    assert caught.value.key == "disk[0].path"
    assert why in caught.value.expected
    qemu_host.check_files(domain_model.parse(text % "raw", "d.toml"), "d.toml", who)  # nobody reads a header in it


def test_what_was_changed_after_the_look_is_no_volume(tmp_path: Path) -> None:
    """The owner of an image can write to it while it is imported."""
    pool = directory(tmp_path)

    async def work() -> None:
        await pool.start()
        for data in (header(features=4), header(backing=b"/etc/shadow")):
            Path(await pool.begin("job-1", "a", None)).write_bytes(data)
            with pytest.raises(errors.InvalidState):
                await pool.commit("job-1", "a", Meta(Format.QCOW2, job="job-1"))
            await pool.discard("job-1", "a")
        assert await pool.volumes() == {}
        assert os.listdir(f"{pool.pool.path}/.virtd") == ["new"]

    run(work())


def test_random_headers_raise_nothing_else(tmp_path: Path) -> None:
    good = bytearray(header(backing=b"/base", kind=b"raw", snapshots=((b"1", b"a"),)))
    for at in range(4, 160):
        for value in (0, 1, 127, 255):
            changed = bytearray(good)
            changed[at] = value
            try:
                read(tmp_path, bytes(changed))
            except errors.InvalidState:
                continue


def test_probing(tmp_path: Path) -> None:
    for data, kind in (
        (header(), "qcow2"),
        (b"KDMV", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"", "raw"),
        (b"hello", "raw"),
    ):
        path = tmp_path / "image"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            assert qcow2.probe(fd) == kind
        finally:
            os.close(fd)


# A directory


def directory(tmp_path: Path) -> Directory:
    top = tmp_path / "pool"
    top.mkdir(mode=0o755, exist_ok=True)
    top.chmod(0o755)
    return Directory(model.Pool("p", str(top)), os.getuid(), os.getgid())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_volume_is_there_when_it_is_whole(tmp_path: Path) -> None:
    pool = directory(tmp_path)

    async def work() -> None:
        await pool.start()
        path = await pool.begin("job-1", "a", 4096)
        assert os.path.getsize(path) == 4096
        assert await pool.volumes() == {}
        with pytest.raises(errors.NotFound):
            await pool.volume("a")
        assert await pool.sweep({"job-1"}) == []
        await pool.commit("job-1", "a", Meta(Format.RAW, job="job-1"))
        await pool.commit("job-1", "a", Meta(Format.RAW, job="job-1"))  # as a second daemon does
        found = await pool.volume("a")
        assert (found.meta.format, found.capacity, found.trouble) == (Format.RAW, 4096, "")
        with pytest.raises(errors.Exists):
            await pool.free("a")
        await pool.begin("job-2", "a", 1)
        with pytest.raises(errors.Exists):
            await pool.commit("job-2", "a", Meta(Format.QCOW2, job="job-2"))
        assert (await pool.volume("a")).meta.format is Format.RAW, "the one that was there is as it was"
        assert await pool.sweep(()) == ["job-2"]
        await pool.delete(found)
        await pool.delete(found)
        assert sorted(os.listdir(pool.pool.path)) == [".virtd"]
        assert os.listdir(f"{pool.pool.path}/.virtd") == ["new"]

    run(work())


@pytest.mark.parametrize("cut", ["meta", "link"])
def test_a_commit_that_is_cut_off(tmp_path: Path, cut: str) -> None:
    """Whatever a SIGKILL leaves after each step, here made by hand, is finished or swept away."""
    pool = directory(tmp_path)
    top = pool.pool.path

    async def work() -> None:
        await pool.start()
        await pool.begin("job-1", "a", 512)
        meta = Meta(Format.RAW, job="job-1")
        await pool.describe("a", meta)
        if cut == "link":
            os.link(f"{top}/.virtd/new/job-1", f"{top}/a")
        assert await pool.sweep({"job-1"}) == []
        await pool.commit("job-1", "a", meta)
        assert set(await pool.volumes()) == {"a"}
        assert os.listdir(f"{top}/.virtd/new") == []
        # The same with nobody to finish it.
        await pool.begin("job-2", "b", 512)
        await pool.describe("b", Meta(Format.RAW, job="job-2"))
        assert set(await pool.sweep(())) == {"job-2", "b.json"}
        assert set(await pool.volumes()) == {"a"}

    run(work())


def test_only_regular_files_are_volumes(tmp_path: Path) -> None:
    pool = directory(tmp_path)
    top = tmp_path / "pool"

    async def work() -> None:
        await pool.start()
        (top / "link").symlink_to("/etc/passwd")
        (top / "dir").mkdir()
        os.mkfifo(top / "fifo")
        (top / ".hidden").touch()
        (top / "with space").touch()
        (top / "foreign").write_bytes(header())
        assert set(await pool.volumes()) == {"foreign"}
        assert (await pool.volume("foreign")).meta.format is None, "nobody has said what it is"
        for name, word in (("link", "symbolic link"), ("dir", "regular"), ("fifo", "regular")):
            with pytest.raises(errors.InvalidState, match=word):
                await pool.volume(name)
        for name in ("../x", ".virtd", "a/b"):
            with pytest.raises(errors.InvalidDefinition):
                await pool.volume(name)
        # What is on record but can't be read is said, and isn't taken for raw.
        (top / ".virtd/foreign.json").write_text("{")
        found = await pool.volume("foreign")
        assert found.meta.format is None
        assert "can't be read" in found.trouble
        (top / ".virtd/foreign.json").write_bytes(
            msgspec.json.encode(Meta(Format.QCOW2, Backing("p", "b", Format.RAW)))
        )
        found = await pool.volume("foreign")
        assert (found.capacity, found.meta.backing) == (1 << 30, Backing("p", "b", Format.RAW))

    run(work())


def test_directories_that_are_refused(tmp_path: Path) -> None:
    async def refused(path: Path) -> str:
        with pytest.raises(errors.HostError) as caught:
            await Directory(model.Pool("p", str(path)), os.getuid(), os.getgid()).start()
        return caught.value.message

    async def work() -> None:
        assert "no directory" in await refused(tmp_path / "missing")
        (tmp_path / "file").touch()
        assert "is no directory" in await refused(tmp_path / "file")
        real = tmp_path / "real"
        real.mkdir()
        (tmp_path / "link").symlink_to(real)
        assert "directory" in await refused(tmp_path / "link")
        real.chmod(0o777)
        assert "written by everybody" in await refused(real)
        (real / "below").mkdir()
        assert f"{real} can be written by everybody" in await refused(real / "below")
        real.chmod(0o775)
        os.chown(real, -1, os.getgid() or 4321)
        assert "by group" in await refused(real)

    run(work())


def test_a_directory_of_the_guests_user_becomes_roots(tmp_path: Path) -> None:
    """An older virtd left it like that; the pool may be active, and stays active."""
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(tmp_path, 4321, 4321)
    pool = Directory(model.Pool("p", str(tmp_path)), 4321, 4321)
    assert asyncio.run(pool.lost()) == ""
    assert tmp_path.stat().st_uid == 0
    os.chown(tmp_path, 4322, 4321)
    assert "belongs to user 4322" in asyncio.run(pool.lost())
    assert tmp_path.stat().st_uid == 4322


def test_building_a_pool_in_a_directory_of_anothers(tmp_path: Path) -> None:
    """It isn't made where its owner, or anybody else, has put a link."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open/link").symlink_to(tmp_path)
    (tmp_path / "open").chmod(0o777)

    def pool(path: str) -> Directory:
        return Directory(model.Pool("p", f"{tmp_path}/{path}"), os.getuid(), os.getgid())

    async def work() -> None:
        with pytest.raises(errors.HostError, match="can be written by everybody"):
            await pool("open/link/new").build()
        assert await pool("a/b/c").build()
        assert not await pool("a/b/c").build()

    run(work())
    assert sorted(os.listdir(tmp_path)) == ["a", "open"]
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700


@on_loop
async def test_a_file_system_that_hangs_costs_one_thread() -> None:
    release = threading.Event()
    aside = Aside("Pool p")
    with pytest.raises(errors.TimedOut):
        await aside(release.wait, limit=0.05)
    with pytest.raises(errors.TimedOut, match="doesn't answer"):
        await aside(lambda: 1)
    release.set()
    for _ in range(100):
        try:
            assert await aside(lambda: 1) == 1
            break
        except errors.TimedOut:
            await asyncio.sleep(0.01)
    else:
        pytest.fail("it answers again, and nobody noticed")
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 // 0)


# The copying program


def test_copying_keeps_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with open(source, "wb") as file:
        file.truncate(96 << 20)
        file.seek(80 << 20)
        file.write(b"x" * 100_000)
    target.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-IS", worker.__file__, "copy", source, target, "--", "/bin/echo", "after"],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 4 << 20
    assert "(100.00/100%)" in done.stdout
    assert done.stdout.endswith("after\n")


def test_wiping(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(os.urandom(100_000))
    subprocess.run([sys.executable, "-IS", worker.__file__, "wipe", target], check=True, stdout=subprocess.DEVNULL)
    assert target.read_bytes() == bytes(100_000)


def test_nobody_hears_how_far_it_is(tmp_path: Path) -> None:
    """As when systemd has dropped virtd's end of the pipe: the copy is still made."""
    (tmp_path / "a").write_bytes(os.urandom(1 << 20))
    (tmp_path / "b").touch()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        subprocess.run(
            [sys.executable, "-IS", worker.__file__, "copy", tmp_path / "a", tmp_path / "b"],
            check=True,
            stdout=writer,
        )
    finally:
        os.close(writer)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_the_copying_program_says_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-IS", worker.__file__, "copy", tmp_path / "none", tmp_path / "b"],
        check=False, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "No such file or directory\n")


# Domains


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        ('path = "/a"\npool = "p"\nvolume = "v"', "both"),
        ('pool = "p"', "path, or pool and volume"),
        ('volume = "v"', "path, or pool and volume"),
        ("readonly = true", "path, or pool and volume"),
        ('pool = "../p"\nvolume = "v"', "pool's name"),
        ('pool = "p"\nvolume = "../v"', "volume's name"),
        ('pool = "p"\nvolume = "v"\n[[disk]]\npool = "p"\nvolume = "v"', "already"),
    ],
)
def test_disks_that_cant_be(disk: str, expected: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        domain_model.parse(f'name = "d"\nmemory = "64M"\n[[disk]]\n{disk}\n', "d.toml")
    assert caught.value.key.startswith("disk[")
    assert expected in caught.value.expected


def test_qemu_is_told_what_an_image_stands_on() -> None:
    image = images.Image("/p/top", Format.QCOW2, backing=(("/p/mid", Format.QCOW2), ("/p/base", Format.RAW)))
    argv = Disk(image=image).arguments()
    nodes = [argv[at + 1] for at, word in enumerate(argv) if word == "-blockdev"]
    names = [json.loads(node) for node in nodes]
    assert [(node["node-name"], node.get("backing", "")) for node in names] == [
        ("file0b2", ""), ("disk0b2", ""), ("file0b1", ""), ("disk0b1", "disk0b2"), ("file0", ""),
        ("disk0", "disk0b1"),
    ]  # fmt: skip
    assert [node["read-only"] for node in names] == [True, True, True, True, False, False]
    assert [node["driver"] for node in names] == ["file", "raw", "file", "qcow2", "file", "qcow2"]
    device = Disk(image=images.Image("/dev/vg0/v")).arguments()
    node = json.loads(device[device.index("-blockdev") + 1])
    assert (node["driver"], node["filename"]) == ("host_device", "/dev/vg0/v")


@pytest.mark.parametrize(
    "lower", [(), (("/p/base", Format.QCOW2),), (("/p/mid", Format.QCOW2), ("/p/b", Format.RAW))]
)
@pytest.mark.parametrize("path", ["/p/a", '/p/a,b:c "d\\\n', "/dev/vg/lv"])
def test_nothing_is_left_to_what_an_image_says(path: str, lower: tuple[tuple[str, Format], ...]) -> None:
    """Each node names its driver, and each that could have a backing file says which, or that it has none."""

    def check(node: nodes.Node) -> int:
        assert node["driver"] in ("qcow2", "raw")
        below = node.get("backing", "left open")
        assert (below == "left open") == (node["driver"] == "raw")
        assert node["file"].keys() == {"driver", "filename"}
        return 1 + (check(below) if isinstance(below, dict) else 0)

    name = nodes.name(nodes.image(path, Format.QCOW2, lower))
    assert name.startswith("json:")
    node = json.loads(name[5:])
    assert check(node) == 1 + len(lower)
    assert node["file"]["filename"] == path
    argv = [
        word
        for index in (0, 1)
        for word in Disk(number=index, image=images.Image(path, Format.QCOW2, False, lower)).arguments()
    ]
    blockdevs = [json.loads(argv[at + 1]) for at, word in enumerate(argv) if word == "-blockdev"]
    for node in blockdevs:
        assert ("backing" in node) == (node["driver"] == "qcow2")
    assert sum(node.get("backing", "") is None for node in blockdevs) == (
        0 if lower and lower[-1][1] is Format.RAW else 2
    )


def test_no_program_of_a_job_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-img gets each image's format, and opens no image that it doesn't need."""
    monkeypatch.setattr(storage_host, "program", lambda _name, _package: "qemu-img")
    me = storage_host.Account("u", "g")
    lower = ("/p/base", Format.QCOW2)
    made = [
        programs.create(me, "/p/n", 512, model.Preallocation.OFF, Format.QCOW2, lower),
        programs.copy(me, 7, "/p/n", check=True),
        programs.check(me, "/p/n"),
        programs.resize(me, "/p/n", 512, [lower], shrink=False),
        programs.wipe(me, "/p/n", 512, Format.QCOW2, lower),
        *(programs.convert(me, 7, kind, "/p/n", Format.RAW) for kind in storage_images.FORMATS),
    ]
    for program in made:
        words = program.argv[program.argv.index("qemu-img") :]
        opened = [word for word in words[2:] if word.startswith("/") and word != "/p/base"]
        if "create" in words:
            assert (words[words.index("-b") - 1], words[words.index("-b") + 2]) == ("-u", "-F")
            assert "-f" in words
        elif "convert" in words:
            assert opened == ["/p/n"]  # which is made
            assert "-O" in words
            (name,) = (word for word in words if word.startswith("json:"))
            assert json.loads(name[5:])["file"]["filename"] == programs.STDIN
        else:
            assert opened == []
            assert any(word.startswith("json:") for word in words)
    assert [program.source for program in made] == [-1, 7, -1, -1, -1, *[7] * len(storage_images.FORMATS)]
