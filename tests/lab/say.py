# SPDX-License-Identifier: LGPL-2.1-or-later
"""Progress lines, and commands of the host run to their end."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .state import LabError

_BEGAN = time.monotonic()


def say(text: str) -> None:
    """One progress line on stderr, after the seconds since the command began."""
    print(f"lab [{time.monotonic() - _BEGAN:6.1f}s] {text}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str | Path],
    *,
    what: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    timeout: float = 900.0,
) -> str:
    """Runs a host command to its end and returns its standard output.

    `what` names the step in the error. Output goes to `log` (appended) when that is given, else it is only kept to be
    quoted when the command fails. Raises LabError on a missing program, a non-zero status and a timeout (seconds).
    """
    # Should this process be killed, the command is as well: a build that nobody waits for would spoil the next one.
    words = ["setpriv", "--pdeathsig", "KILL", "--", *(str(word) for word in argv)]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=dict(env) if env is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise LabError(f"{what}: setpriv is not installed; run tests/lab/lab setup") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{what}: {argv[0]} took more than {timeout:.0f} s") from None
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(words[4:])}\n{done.stdout}")
    if done.returncode != 0:
        # 127 is setpriv's word for a program that isn't there.
        if done.returncode == 127 and shutil.which(words[4]) is None:
            raise LabError(f"{what}: {argv[0]} is not installed; run tests/lab/lab setup")
        said = (done.stdout + (done.stderr or "")).strip().splitlines()[-25:]
        quoted = "".join(f"\n    {text}" for text in said)
        raise LabError(f"{what}: {argv[0]} ended with status {done.returncode}{quoted}")
    return done.stdout


def in_root(root: Path, argv: Sequence[str | Path]) -> list[str | Path]:
    """The command line that runs `argv` with `root` as its file system, a /proc there, and nothing outliving it."""
    enter = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", f"--root={root}"]
    return [*enter, "--wd=/", "--mount-proc", "--", *argv]
