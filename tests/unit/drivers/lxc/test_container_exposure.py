# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who can reach a container's files from outside."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from virtd import errors, mountinfo
from virtd.drivers.lxc import exposure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make everything above it look passable for everybody and writable for root alone, wherever tests are run."""
    tmp_path.chmod(0o755)
    real = os.stat

    class Above:
        st_uid = 0
        st_mode = 0o40755

    def stat(path: str, **options: bool) -> object:
        return Above() if f"{tmp_path}/".startswith(f"{str(path).rstrip('/')}/") else real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    return tmp_path


def why(root: Path) -> str:
    try:
        exposure.check(str(root), "web1.toml", "/var/lib/virtd/containers")
    except errors.InvalidDefinition as exc:
        return f"{exc.key}: {exc.expected} {exc.hint}"
    return ""


def test_some_directory_above_has_to_keep_others_out(place: Path) -> None:
    root = place / "private/roots/web1"
    root.mkdir(parents=True)
    for directory in (place / "private", place / "private/roots", root):
        directory.chmod(0o755)
    assert "keeps others out" in why(root)
    assert f"chmod 700 {place}/private/roots" in why(root)
    # Its own mode is its root's to change, and so doesn't count.
    root.chmod(0o700)
    assert "keeps others out" in why(root)
    root.chmod(0o755)
    for directory in (place / "private", place / "private/roots"):
        directory.chmod(0o700)
        assert why(root) == ""
        directory.chmod(0o710)
        assert "keeps others out" in why(root)
        directory.chmod(0o701)
        assert "keeps others out" in why(root)
        directory.chmod(0o744)  # its names can be read, and nothing else of it
        assert why(root) == ""
        directory.chmod(0o755)


def test_nobody_else_may_put_another_in_its_place(place: Path) -> None:
    root = place / "open/private/web1"
    root.mkdir(parents=True)
    (place / "open/private").chmod(0o700)
    assert why(root) == ""
    (place / "open").chmod(0o777)
    assert "can be written by everybody" in why(root)
    (place / "open").chmod(0o1777)
    assert why(root) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_a_directory_of_another_user_keeps_that_user_in(place: Path) -> None:
    root = place / "home/private/web1"
    root.mkdir(parents=True)
    (place / "home").chmod(0o755)
    (place / "home/private").chmod(0o700)
    os.chown(place / "home", 1000, 1000)
    assert "belongs to user 1000" in why(root)
    os.chown(place / "home", 0, 0)
    os.chown(place / "home/private", 1000, 1000)
    assert "belongs to user 1000" in why(root)


def test_links_are_looked_at_where_they_are_and_where_they_lead(place: Path) -> None:
    root = place / "private/web1"
    root.mkdir(parents=True)
    (place / "private").chmod(0o700)
    (place / "links").mkdir()
    (place / "links/web1").symlink_to("../private/web1")
    assert why(place / "links/web1") == ""
    (place / "links").chmod(0o777)
    assert "can be written by everybody" in why(place / "links/web1")
    (place / "links").chmod(0o755)
    (place / "private").chmod(0o755)
    (place / "links").chmod(0o700)  # that of the link doesn't matter
    assert "keeps others out" in why(place / "links/web1")
    (place / "loop").symlink_to("loop")
    assert "symbolic links" in why(place / "loop")


def test_another_mount_of_it_is_another_way_to_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = place / "private/web1"
    (root / "srv").mkdir(parents=True)
    (place / "private").chmod(0o700)
    shown = place / "shown"
    shown.mkdir()
    fd = os.open(root, os.O_PATH)
    with open(f"/proc/self/fdinfo/{fd}") as file:
        ident = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    os.close(fd)

    def table(*more: str) -> None:
        rows = [f"{ident} 1 8:1 /sub / rw - ext4 /dev/sda1 rw", *more]
        (place / "mountinfo").write_text("".join(f"{row}\n" for row in rows))
        monkeypatch.setattr(mountinfo, "PATH", str(place / "mountinfo"))

    table()
    assert why(root) == ""
    table(f"77 1 8:1 /sub{root}/srv {shown} rw - ext4 /dev/sda1 rw")  # a part of it
    assert f"others reach files of its as {shown}" in why(root)
    table(f"77 1 8:2 /sub{root}/srv {shown} rw - ext4 /dev/sdb1 rw")  # of another file system
    assert why(root) == ""
    table(f"77 1 8:1 /sub{place} {shown} rw - ext4 /dev/sda1 rw")  # hidden, as nothing is there
    assert why(root) == ""
    (shown / "private").symlink_to(place / "private")
    assert why(root) == ""
    monkeypatch.setattr(exposure, "_same", lambda *_: True)
    (shown / "private").unlink()
    (shown / "private/web1").mkdir(parents=True)
    (shown / "private").chmod(0o755)
    assert f"others reach files of its as {shown}/private/web1" in why(root)
    (shown / "private").chmod(0o700)
    assert why(root) == ""
