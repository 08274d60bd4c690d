# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixture that catches leaks, held against tests that leak."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run_with_fixture(where: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run one test whose body is `body`, under this repository's conftest.py and settings."""
    test = "import asyncio, os, subprocess\n\ndef test_one():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (where / "test_leak.py").write_text(test)
    (where / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(where)],
        cwd=where,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("os.dup(1)", "descriptor "),
        ("globals()['kept'] = os.pipe()", "descriptor "),
        ("os.eventfd(0)", "descriptor "),
        (
            """
            async def main():
                globals()['task'] = asyncio.create_task(asyncio.sleep(60), name='forgotten')
            asyncio.run(main())
            """,
            "task <Task pending name='forgotten'",
        ),
        ("globals()['child'] = subprocess.Popen(['sleep', '60'])", ": sleep 60"),
        ("os.fork() or os._exit(0)", "child process "),
    ],
)
def test_a_leak_fails_the_test(tmp_path: Path, body: str, complaint: str) -> None:
    ran = run_with_fixture(tmp_path, body)
    assert ran.returncode == 1, ran.stdout
    assert "the test left behind" in ran.stdout
    assert complaint in ran.stdout


def test_a_clean_test_passes(tmp_path: Path) -> None:
    ran = run_with_fixture(
        tmp_path,
        """
        async def main():
            await asyncio.create_task(asyncio.sleep(0))
        asyncio.run(main())
        read, write = os.pipe()
        os.close(read)
        os.close(write)
        subprocess.run(['true'], check=True)
        """,
    )
    assert ran.returncode == 0, ran.stdout


def test_another_thread_may_close_an_eventfd_a_moment_later(tmp_path: Path) -> None:
    """GDBus' thread does that with the main context of a connection that was closed."""
    ran = run_with_fixture(tmp_path, "import threading\nthreading.Timer(0.5, os.close, [os.eventfd(0)]).start()")
    assert ran.returncode == 0, ran.stdout
