# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives from anywhere: unpacking them stays in its directory, never hangs, and leaves free space."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING

import pytest

from virtd import errors, files
from virtd.drivers.lxc import create, links, prerequisites, sandbox, unpack
from virtd.model import container as model

if TYPE_CHECKING:
    from pathlib import Path


def archive(path: Path, *members: tarfile.TarInfo, data: bytes = b"from the archive") -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    found.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    found.uid, found.gid = os.geteuid(), os.getegid()
    return found


def run(directory: Path, image: Path | None, source: str = "", **changes: object) -> subprocess.CompletedProcess[str]:
    """Run it as the unit does, but with the test's own IDs."""
    target = directory / "target"
    target.mkdir(exist_ok=True)
    code = (
        f"import sys, json; sys.path.insert(0, {os.path.dirname(unpack.__file__)!r}); import unpack\n"
        f"for key, value in {changes!r}.items(): setattr(unpack, key, value)\n"
        "sys.exit(unpack.run(unpack.Job(**json.loads(sys.argv[1]))))"
    )
    job = unpack.Job(str(target), "web1", [], source=source)
    with open(image or os.devnull, "rb") as file:
        return subprocess.run(
            [sys.executable, "-I", "-c", code, json.dumps(job._asdict())],
            stdin=file, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


def test_an_archive_becomes_a_root(tmp_path: Path) -> None:
    image = archive(
        tmp_path / "a.tar", member("etc", tarfile.DIRTYPE), member("etc/hostname"), member("etc/machine-id")
    )
    assert run(tmp_path, image).returncode == 0
    assert (tmp_path / "target/etc/hostname").read_text() == "web1\n"
    assert (tmp_path / "target/etc/machine-id").read_text() == ""


def test_directories_with_odd_names(tmp_path: Path) -> None:
    source = tmp_path / "a\\b 'c' \\n"
    source.mkdir()
    (source / "file").write_text("x")
    directory = tmp_path / 'd\\b "e"'
    directory.mkdir()
    done = run(directory, None, str(source))
    assert done.returncode == 0, done.stderr
    assert (directory / "target/file").read_text() == "x"


@pytest.mark.parametrize("name", ["hostname", "machine-id"])
@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE])
def test_what_has_the_names_that_are_written(tmp_path: Path, name: str, kind: bytes) -> None:
    """A FIFO made this, and everything after it, hang for ever."""
    outside = tmp_path / "outside"
    outside.write_text("outside")
    image = archive(
        tmp_path / "a.tar",
        member("etc", tarfile.DIRTYPE),
        member("other"),
        member(f"etc/{name}", kind, str(outside) if kind == tarfile.SYMTYPE else "other"),
    )
    assert run(tmp_path, image).returncode == 0
    assert outside.read_text() == "outside"
    assert (tmp_path / "target/other").read_bytes() == b"from the archive"
    made = tmp_path / "target/etc" / name
    assert made.is_dir() if kind == tarfile.DIRTYPE else made.read_text() in ("web1\n", "")
    assert not made.is_symlink()


def test_an_etc_that_leads_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "machine-id").write_text("this host's")
    for number, image in enumerate(
        (
            archive(tmp_path / "a.tar", member("etc", tarfile.SYMTYPE, str(outside))),
            archive(tmp_path / "b.tar", member("etc")),
            archive(tmp_path / "c.tar", member("etc", tarfile.FIFOTYPE)),
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert run(directory, image).returncode == 0
    assert os.listdir(outside) == ["machine-id"]
    assert (outside / "machine-id").read_text() == "this host's"


def test_names_that_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("outside")
    run(tmp_path, archive(
        tmp_path / "a.tar",
        member(str(outside)),
        member("../outside"),
        member("deep", tarfile.SYMTYPE, str(tmp_path)),
        member("deep/outside"),
        member("hard", tarfile.LNKTYPE, "../outside"),
        member("hard"),
        member("hard2", tarfile.LNKTYPE, str(outside)),
        member("hard2"),
    ))  # fmt: skip
    assert outside.read_text() == "outside"
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "outside", "target"]


def test_it_ends_before_the_disk_is_full(tmp_path: Path) -> None:
    image = archive(tmp_path / "a.tar", member("usr", tarfile.DIRTYPE), member("usr/large"), data=b"x" * (1 << 20))
    room = os.statvfs(tmp_path)
    most = room.f_blocks * room.f_frsize
    done = run(tmp_path, image, ROOM=most * 2)
    if room.f_bavail * room.f_frsize >= most // 20:
        assert done.returncode == 0, done.stderr
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(unpack.__file__)!r}); import os, unpack\n"
        "class Status: f_bavail = 10; f_blocks = 1000; f_frsize = 4096; f_files = 0; f_favail = 0\n"
        "os.statvfs = lambda _path: Status\n"
        f"sys.exit(unpack.run(unpack.Job({str(tmp_path / 'target')!r}, 'web1', [])))"
    )
    with open("/dev/zero", "rb") as endless:  # whatever tar makes of it, it has no end
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], stdin=endless, capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "it would fill the disk\n")
    # tar came to its end before it could be killed.
    with open(image, "rb") as whole:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code.replace("\nsys.exit", "\nos.kill = lambda *_: None\nsys.exit")],
            stdin=whole, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "it would fill the disk\n")


def test_what_is_said_of_it_has_an_end(tmp_path: Path) -> None:
    """tar writes a line for each member that it can't make, and an archive may have any number of them."""
    members = [member("etc")] + [member(f"etc/{'x' * 90}{number}") for number in range(2000)]
    done = run(tmp_path, archive(tmp_path / "a.tar", *members))
    assert done.returncode == 1
    assert 0 < len(done.stderr) <= unpack.WORDS


def test_a_directory_with_holes(tmp_path: Path) -> None:
    """A hole of 2 GiB became 2 GiB on disk."""
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "lastlog", "wb") as file:
        file.truncate(2 << 30)
    assert run(tmp_path, None, str(source)).returncode == 0
    made = os.stat(tmp_path / "target/lastlog")
    assert (made.st_size, made.st_blocks < 2048) == (2 << 30, True)


def test_a_tree_of_any_depth_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "kept").mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=here)
        os.symlink(tmp_path / "kept", "link", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (tmp_path / "kept/file").touch()
    files.remove_tree(str(top))
    assert not top.exists()
    assert (tmp_path / "kept/file").exists()


def test_what_is_no_archive_isnt_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    job = create.Job("web1", str(tmp_path / "fifo"), str(tmp_path), model.IdMap(1), str(tmp_path))
    with pytest.raises(errors.InvalidState, match="FIFO"):
        create._open(job)


def test_its_unit_sees_nothing_else() -> None:
    found = {
        name: value for name, _, value in sandbox.making("/var/lib/virtd/containers/.a.new", "", toplevel=["var"])
    }
    assert found["CapabilityBoundingSet"] == 1 << 6 | 1 << 7  # setgid, setuid
    assert found["BindPaths"] == [(path := "/var/lib/virtd/containers/.a.new", path, False, 0)]
    assert found["TemporaryFileSystem"] == [("/var", "ro,mode=0755")]
    assert found["RestrictNamespaces"] == 0x10000000
    assert found["PrivateNetwork"] is found["NoNewPrivileges"] is True
    assert {"RuntimeMaxUSec", "MemoryMax", "TasksMax"} <= set(found)
    of_a_directory = {name: value for name, _, value in sandbox.making("/a", "/srv/b", toplevel=[])}
    assert of_a_directory["CapabilityBoundingSet"] == 1 << 2 | 1 << 6 | 1 << 7


def test_no_container_without_a_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was silently left out."""
    monkeypatch.setattr(prerequisites, "SECCOMP", (str(tmp_path / "common.seccomp"),))
    with pytest.raises(errors.HostError, match="seccomp") as caught:
        prerequisites.seccomp()
    assert "liblxc-common" in str(caught.value.hint)


def test_names_that_a_container_has_given_its_interfaces(tmp_path: Path) -> None:
    """One that wasn't ASCII made every list of objects fail."""
    address = "fd000000000000000000000000000001"
    names = ["a\u00e9".encode(), b"\xff\xfe", b"lo\xc2\x85x", b"\x85", b"lo"]
    (tmp_path / "if_inet6").write_bytes(
        b"".join(b"%s 02 40 00 80 %s\n" % (address[:-1].encode() + b"%x" % at, name) for at, name in enumerate(names))
        + b"garbage\nzz 01 02 03 04 eth0\n\n"
    )
    (tmp_path / "fib_trie").write_bytes(b"  |-- 192.0.2.7\n     /32 host LOCAL\n |--\n  |-- \xff\n /32 host LOCAL\n")
    found = links.addresses(str(tmp_path))
    assert "fd00::" in found
    assert "fd00::3" in found
    assert "fd00::4" not in found
    assert "192.0.2.7" in found
    json.dumps(found).encode()


def test_addresses_without_number(tmp_path: Path) -> None:
    rows = b"".join(
        b"|-- 10.%d.%d.%d\n/32 host LOCAL\n" % (a, b, c) for a in range(9) for b in range(99) for c in range(99)
    )
    (tmp_path / "fib_trie").write_bytes(rows)
    assert len(links.addresses(str(tmp_path))) == links.ADDRESSES


def test_what_tar_says_of_ids_that_there_are_not(tmp_path: Path) -> None:
    said, say = os.pipe()
    words = "tar: {}: Cannot change ownership to uid {}, gid {}: Invalid argument\n"
    with open(say, "w") as file:
        for number in range(300):  # past what is passed on
            file.write(words.format("./" + "x" * 60, 65536 + number, 5))
        file.write(words.format("./last", 3, 70000) + "tar: Exiting with failure status\n")
    try:
        assert unpack.watch(str(tmp_path), said) == 70000
    finally:
        os.close(said)


def test_files_beyond_the_ids_of_a_container(tmp_path: Path) -> None:
    first = os.geteuid()
    assert unpack.beyond(str(tmp_path), [first, 1]) == 0
    if first:
        pytest.skip("only root can give files away")
    (tmp_path / "a").touch()
    os.lchown(tmp_path / "a", 100000 + 70000, 100000)
    os.symlink("nowhere", tmp_path / "b")
    os.lchown(tmp_path / "b", 100000, 100000 + 65536)
    assert unpack.beyond(str(tmp_path), [100000, 65536]) == 70000
    assert unpack.beyond(str(tmp_path), [100000, 70001]) == 0


@pytest.mark.parametrize("directory", ["/srv/it's", '/srv/a "b"', "/srv/back\\slash", "/srv/ü"])
def test_the_definition_of_a_container_in_an_odd_directory(directory: str) -> None:
    job = create.Job("web1", "/x", directory, model.IdMap(65536), "/run/virtd/lxc")
    assert model.parse(job.definition, "x").rootfs == f"{directory}/web1"
