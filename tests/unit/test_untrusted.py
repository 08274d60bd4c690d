# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever lies where a file is expected: it is read, or refused at once with words that say what it is."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from virtd import untrusted

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 1 << 16


def odd_files(directory: Path) -> dict[str, Path]:
    """One of each kind that there is, but for what only a kernel with faults has."""
    made = {kind: directory / kind for kind in ("fifo", "directory", "socket", "zero", "ptmx", "loop", "sparse")}
    os.mkfifo(made["fifo"])
    made["directory"].mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(made["socket"]))
    made["zero"].symlink_to("/dev/zero")
    made["ptmx"].symlink_to("/dev/ptmx")
    made["loop"].symlink_to("loop")
    with made["sparse"].open("wb") as file:
        file.truncate(10 << 30)
    return made


@pytest.mark.parametrize("follow", [False, True])
def test_nothing_odd_is_read(tmp_path: Path, *, follow: bool) -> None:
    for kind, path in odd_files(tmp_path).items():
        with pytest.raises(OSError, match=r"it is|it has|[Ll]evels|[Nn]o such") as caught:
            untrusted.read(os.fspath(path), LIMIT, follow=follow)
        assert caught.value.strerror, kind
        if kind != "sparse":
            with pytest.raises(OSError):  # noqa: PT011  # one of many; that there is one is what is asked
                untrusted.tail(os.fspath(path), LIMIT)


def test_a_tail_of_many_holes(tmp_path: Path) -> None:
    assert untrusted.tail(os.fspath(odd_files(tmp_path)["sparse"]), 100) == b"\0" * 100


def test_what_is_regular(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * LIMIT)
    (tmp_path / "link").symlink_to("file")
    assert untrusted.read(os.fspath(tmp_path / "file"), LIMIT) == b"x" * LIMIT
    assert untrusted.read(os.fspath(tmp_path / "link"), LIMIT, follow=True) == b"x" * LIMIT
    with pytest.raises(untrusted.Unfit, match="it is a link"):
        untrusted.read(os.fspath(tmp_path / "link"), LIMIT)
    with pytest.raises(untrusted.Unfit, match=f"it has {LIMIT} bytes"):
        untrusted.read(os.fspath(tmp_path / "file"), LIMIT - 1)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert untrusted.tail(os.fspath(tmp_path / "file"), 4) == b"6789"
    assert untrusted.tail(os.fspath(tmp_path / "file"), 8, since=5) == b"56789"
    assert untrusted.tail(os.fspath(tmp_path / "file"), 8, since=99) == b""
    assert untrusted.read("/proc/self/stat", LIMIT), "files of the kernel have no size"
