# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a start of the daemon doesn't wait for: in processes of their own, for pytest has imported all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from virtd import later

TOP = Path(__file__).resolve().parents[2]


def said(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=TOP, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_daemon_is_imported_without_them() -> None:
    # msgspec does without typing_extensions, which needs inspect at once.
    program = "import sys; sys.modules['typing_extensions'] = None\nimport virtd.daemon; print(*sorted(sys.modules))"
    assert not {"ssl", *later.PUT_OFF} & set(said(program).split())


def test_they_are_all_there_afterwards() -> None:
    loaded = said("import virtd.daemon, sys; virtd.daemon.later.catch_up(); print(*sorted(sys.modules))").split()
    assert set(later.PUT_OFF) <= set(loaded)
    assert "ssl" not in loaded


@pytest.mark.parametrize("after", ["", "virtd.daemon.later.catch_up()"])
def test_who_imported_a_stand_in_gets_what_it_asks_for(after: str) -> None:
    program = (
        f"import asyncio.coroutines as user, virtd.daemon\n{after}\nprint(user.inspect.iscoroutinefunction(print))"
    )
    assert said(f"from virtd import later\nwith later.put_off(): import asyncio\n{program}") == "False"


def test_what_is_there_already_stays() -> None:
    assert said("import inspect, virtd.daemon, sys; print(sys.modules['inspect'] is inspect)") == "True"
    assert said("import ssl, virtd.daemon, sys; print(sys.modules['ssl'] is ssl)") == "True"
