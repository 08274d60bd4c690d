# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bundle of code is used while everything is as it was, and not a moment longer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "virtd"
START = "from virtd import bundle; bundle.use()\n"
LOADER = "import virtd.{0}; print(type(virtd.{0}.__spec__.loader).__module__)"
OURS, PYTHONS = "virtd.bundle", "_frozen_importlib_external"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A directory with a copy of virtd, and its bundle."""
    shutil.copytree(PACKAGE, tmp_path / "virtd", ignore=shutil.ignore_patterns("__pycache__"))
    said(tmp_path, "from virtd import bundle; bundle.make()")
    return tmp_path


def said(top: Path, program: str, options: str = "-I") -> str:
    # Before site-packages, where virtd may be installed.
    program = f"import sys; sys.path.insert(0, {str(top)!r})\n{program}"
    done = subprocess.run([sys.executable, options, "-c", program], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bundle(top: Path) -> Path:
    [path] = top.glob("virtd/__pycache__/start.*.bundle")
    return path


def test_modules_come_from_the_bundle(top: Path) -> None:
    assert said(top, START + LOADER.format("daemon")) == OURS
    assert said(top, START + "import asyncio; print(type(asyncio.__spec__.loader).__module__)") == OURS
    assert said(top, START + "import virtd.api.varlink as it; print(it.__file__)") == f"{top}/virtd/api/varlink.py"
    assert said(top, LOADER.format("daemon")) == PYTHONS


def test_a_file_that_was_exchanged_is_read_again(top: Path) -> None:
    changed = top / "virtd/text.py"
    times = changed.stat()
    content = changed.read_text()
    changed.unlink()
    changed.write_text(content)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert said(top, START + LOADER.format("text")) == PYTHONS
    assert said(top, START + LOADER.format("files")) == OURS


def test_what_comes_first_in_the_path_is_found_first(top: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = tmp_path_factory.mktemp("first")
    insert = f"import sys; sys.path.insert(0, {str(first)!r})\n"
    said(top, insert + "from virtd import bundle; bundle.make()")
    assert said(top, insert + START + LOADER.format("text")) == OURS
    (first / "msgspec.py").write_text("print('first')")
    assert said(top, insert + START + "import msgspec") == "first"
    # Another path than the one that it was made with.
    assert said(top, START + LOADER.format("text")) == PYTHONS


def test_sys_path_is_as_site_makes_it(top: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also in a Python without `site`, which runs only if something could have changed."""
    more = str(tmp_path_factory.mktemp("more"))
    insert = f"sys.path.insert(1, {more!r})\n"
    said(top, insert + "from virtd import bundle; bundle.make()")
    show = START + LOADER.format("text") + "\nprint('site' in sys.modules, *sys.path)"
    usual = said(top, insert + "from virtd import bundle; print(*sys.path)")
    assert said(top, show, "-IS").split("\n") == [OURS, f"False {usual}"]
    assert said(top, insert + show).split("\n") == [OURS, f"True {usual}"]
    Path(more, "new.pth").touch()
    assert said(top, insert + show, "-IS").split("\n") == [PYTHONS, f"True {usual}"]
    bundle(top).write_bytes(b"")
    assert said(top, insert + show, "-IS").split("\n") == [PYTHONS, f"True {usual}"]


@pytest.mark.parametrize("how", ["made", "edited"])
def test_what_site_has_not_put_into_sys_path_counts(
    top: Path, tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    """pip makes the directory in /usr/local with the first package; a .pth file may be rewritten in place."""
    prefix = tmp_path_factory.mktemp("local")
    made = f"import site; site.PREFIXES[:] = [{str(prefix)!r}]; print(site.getsitepackages()[0])\n"
    place = Path(said(top, made))
    if how == "edited":
        place.mkdir(parents=True)
        (place / "a.pth").touch()
    said(top, made + "from virtd import bundle; bundle.make()")
    show = START + "print('site' in sys.modules)"
    assert said(top, show, "-IS") == "False"
    if how == "edited":
        (place / "a.pth").write_text("/somewhere\n")
    else:
        place.mkdir(parents=True)
    assert said(top, show, "-IS") == "True"


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"no code", b"(\x03\0\0\0"])
def test_what_cant_be_read_costs_nothing(top: Path, content: bytes) -> None:
    bundle(top).write_bytes(content)
    assert said(top, START + LOADER.format("text")) == PYTHONS


def test_another_python_takes_nothing_of_it(top: Path) -> None:
    assert said(top, "import sys; sys.version = '3.99'\n" + START + LOADER.format("text")) == PYTHONS
