# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's directory is taken back once its sockets are there, and emptied of what doesn't belong there."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.unit.test_untrusted import odd_files
from virtd.drivers.qemu import directory

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 65534


def test_it_is_taken_back(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    path = tmp_path / "web1"
    path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path / "qmp.sock"))
    odd_files(path)
    (path / "directory" / "deep").mkdir()
    (path / "directory" / "deep" / "link").symlink_to("/")
    os.chown(path, NOBODY, NOBODY)
    assert directory.is_open(os.fspath(path))
    directory.close(os.fspath(path))
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, NOBODY, 0o710)
    assert os.listdir(path) == ["qmp.sock"]
    assert not directory.is_open(os.fspath(path))


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "web1").symlink_to("real")
    with pytest.raises(OSError, match="web1"):
        directory.close(os.fspath(tmp_path / "web1"))
    assert not directory.is_open(os.fspath(tmp_path / "nothing"))
