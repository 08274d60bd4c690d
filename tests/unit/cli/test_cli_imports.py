# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtdctl imports: each module is paid for at every start of it, and a listing is to be there at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.doubles.fake_daemon import DOMAIN, INFO, FakeDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
SLOW = frozenset(
    {
        *(
            "asyncio",
            "calendar",
            "concurrent",
            "ctypes",
            "dataclasses",
            "datetime",
            "email",
            "gi",
            "importlib.metadata",
        ),
        *("inspect", "logging", "msgspec", "pathlib", "pydbus", "qemu", "shutil", "ssl", "subprocess", "systemd"),
        *("tempfile", "threading", "tomllib", "urllib", "uuid"),
    }
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path / "virtd.sock")
    fake.answers = {"List": {"objects": [DOMAIN]}, "Info": {"object": INFO}, "Start": {"name": "web1"}}
    yield fake
    fake.close()


@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("info", "web1"), ("start", "web1")])
def test_a_command_imports_nothing_slow(daemon: FakeDaemon, words: tuple[str, ...]) -> None:
    # -I and -S: a development environment's .pth files import what an installed virtdctl never sees.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from virtd.cli.main import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", "-c", code, *words, "--address", daemon.path],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "json" in imported
    assert "virtd.cli.main" in imported
    names = {name for name in imported if name in SLOW or name.split(".")[0] in SLOW}
    assert names == set()
    ours = {name for name in imported if name.startswith("virtd")}
    assert {name for name in ours if not name.startswith("virtd.cli")} == {"virtd", "virtd.errors"}
    assert not ours & {"virtd.cli.console", "virtd.cli.log", "virtd.cli.terminal"}
