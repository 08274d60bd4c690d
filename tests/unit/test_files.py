# SPDX-License-Identifier: LGPL-2.1-or-later
"""Replacing a file: the old content or the new, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from virtd import errors, files

STEPS = ("open", "fchmod", "write", "fsync", "close", "rename")


class PulledPlug(BaseException):
    pass


def test_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write(str(path), b"one")
    assert path.read_bytes() == b"one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files.write(str(path), b"", mode=0o644)
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    files.write(str(tmp_path / "a"), b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, when: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    real = getattr(os, step)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if step == "close":  # not left open, whatever happens
            real(*args)
        elif when == "after":
            result = real(*args, **kwargs)
            if step == "open":
                os.close(result)
        raise PulledPlug

    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(PulledPlug):
            files.write(str(path), b"new content")
    assert path.read_bytes() == (b"new content" if (step, when) == ("rename", "after") else b"old")
    # What the crash left is no hindrance, and doesn't stay.
    files.write(str(path), b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "The file system is full"),
        (errno.EDQUOT, "The file system is full"),
        (errno.EROFS, "mounted read-only"),
        (errno.EMFILE, "LimitNOFILE="),
        (errno.EIO, ""),
    ],
)
@pytest.mark.parametrize("step", [step for step in STEPS if step != "close"])
def test_an_error_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, hint: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(errors.HostError, match=os.strerror(number)) as caught:
            files.write(str(path), b"new")
    assert str(path) in caught.value.message
    assert hint in str(caught.value.hint)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_laid_as_a_trap_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".a.new").symlink_to("victim")
    with pytest.raises(errors.HostError):
        files.write(str(tmp_path / "a"), b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(errors.HostError, match="No such file or directory"):
        files.write(str(tmp_path / "none" / "a"), b"")


def test_remove(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    assert files.remove(str(path)) is True
    assert files.remove(str(path)) is False
    path.mkdir()
    with pytest.raises(errors.HostError, match="Cannot remove"):
        files.remove(str(path))


@pytest.mark.parametrize("step", ["open", "fsync"])
def test_a_directory_that_is_not_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The file is in its place, or gone, for all to see."""
    real = getattr(os, step)

    def refuse(what: Any, *args: Any, **kwargs: Any) -> Any:
        path = what if step == "open" else os.readlink(f"/proc/self/fd/{what}")
        if path == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(what, *args, **kwargs)

    monkeypatch.setattr(os, step, refuse)
    files.write(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert files.remove(str(tmp_path / "a"))
    assert os.listdir(tmp_path) == []
