# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live tests, and those few that failed once more, alone: python -m tests.again [pytest's options].

A test that waits for other programs on a busy machine may fail for want of time. Whether it did is seen by trying it
with nothing else running. One that passes then is named at the end: it is to be mended, but stands in nobody's way.
What proves the promise isn't tried again, for a byte that was lost once is lost; nor is anything when so many failed
that it can't be chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 3
PROMISE = tuple(
    f"tests/live/test_{name}.py"
    for name in ("survival", "survival_table", "sweep", "model", "swaps", "children", "console", "fdstore_facts")
)


def pytest(cache: str, *options: str) -> int:
    """Its exit status."""
    command = [sys.executable, "-m", "pytest", "-m", "live and not hard", "-o", f"cache_dir={cache}", *options]
    return subprocess.run([*command, "-o", "faulthandler_timeout=900"], check=False).returncode


def failed(cache: str) -> list[str]:
    """The tests that failed, as pytest names them; [] if it has none on record."""
    try:
        return sorted(json.loads(Path(cache, "v/cache/lastfailed").read_text()))
    except FileNotFoundError:
        return []


def worth_another_try(tests: list[str]) -> bool:
    return 0 < len(tests) <= MOST and not any(test.startswith(PROMISE) for test in tests)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="virtd-tests-") as cache:
        status = pytest(cache, "tests/live", *sys.argv[1:])
        first = failed(cache)
        if status != 1 or not worth_another_try(first):
            return status
        print(f"\n=== once more, alone: {', '.join(first)}", flush=True)
        status = pytest(cache, *first)
    for test in first if status == 0 else []:
        print(f"=== UNSTABLE, failed and then passed: {test}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
