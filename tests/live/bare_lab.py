# SPDX-License-Identifier: LGPL-2.1-or-later
"""A lab without virtd, for what is tried against systemd alone; `virtd.fdstore` is copied into it as a library."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab" / "lab"
LIBRARY = "/opt/fdstore"


class BareLab:
    """A booted system; `run` executes in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *argv: str, check: bool = True, stdin: bytes | None = None, seconds: float = 60) -> str:
        """Standard output of a command in the lab; CalledProcessError carries what it wrote to stderr as a note."""
        ran = subprocess.run(
            [str(LAB), "exec", self.name, "--", *argv],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=seconds,
        )
        if check and ran.returncode:
            error = subprocess.CalledProcessError(ran.returncode, argv, ran.stdout, ran.stderr)
            error.add_note(ran.stderr.decode(errors="replace"))
            raise error
        return ran.stdout.decode()

    def systemctl(self, *argv: str, check: bool = True) -> str:
        return self.run("systemctl", *argv, check=check)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        lines = self.systemctl("show", unit, "-p", ",".join(properties)).splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def write(self, path: str, content: str) -> None:
        self.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && cat >"$0"', path, stdin=content.encode())

    def version(self) -> int:
        return int(self.run("systemctl", "--version").split()[1])

    def dump(self, unit: str) -> list[Sequence[Any]]:
        """What PID 1 says is in the unit's store, as DumpUnitFileDescriptorStore() answers it."""
        manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
        answer = self.run("busctl", "--json=short", "call", *manager, "DumpUnitFileDescriptorStore", "s", unit)
        entries: list[Sequence[Any]] = json.loads(answer)["data"][0]
        return entries

    def install_library(self) -> None:
        """Copy virtd.fdstore to /opt/fdstore, where PYTHONPATH has to point."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(ROOT / "virtd" / "__init__.py", "virtd/__init__.py")
            archive.add(ROOT / "virtd" / "fdstore", "virtd/fdstore")
        self.run("mkdir", "-p", LIBRARY)
        self.run("tar", "-x", "-C", LIBRARY, "--no-same-owner", stdin=buffer.getvalue())


@contextlib.contextmanager
def bare_lab(purpose: str, suite: str) -> Iterator[BareLab]:
    """A lab of that suite, gone at the end. Its name holds our PID, so that two runs don't meet."""
    name = f"{purpose}-{os.getpid()}"
    try:
        subprocess.run([str(LAB), "up", name, "--suite", suite, "--no-virtd"], check=True, stdin=subprocess.DEVNULL)
        lab = BareLab(name)
        lab.install_library()
        yield lab
    finally:
        subprocess.run([str(LAB), "down", name], check=True, stdin=subprocess.DEVNULL)
