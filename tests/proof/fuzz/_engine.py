# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all targets have in common: finding them, trying one input, and keeping what was found."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CORPUS = HERE / "corpus"
PATIENCE = 10  # seconds after which an input is taken for one that hangs


class Hang(Exception):
    """An input took longer than PATIENCE."""


class Target(NamedTuple):
    """One module, see the package."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]
    limit: int
    brief: int

    def inputs(self) -> list[bytes]:
        """The seeds, and what is in the corpus."""
        return [*self.seeds, *(path.read_bytes() for path in sorted((CORPUS / self.name).glob("*")))]


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Target:
    module = importlib.import_module(f"tests.proof.fuzz.{name}")
    return Target(
        name,
        module.target,
        tuple(module.SEEDS),
        tuple(getattr(module, "WORDS", ())),
        getattr(module, "LIMIT", 4096),
        getattr(module, "BRIEF", 1000),
    )


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise Hang where the main thread is when PATIENCE is over."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"not done after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, data: bytes) -> Exception | None:
    """What the target raised, or None."""
    try:
        with patience():
            target.run(data)
    except Exception as exc:
        return exc
    return None


class Findings:
    """What was found, one input for each place that raised: `directory`/DIGEST, and DIGEST.txt beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: set[tuple[str, str, int]] = set()

    def take(self, data: bytes, exc: Exception) -> None:
        frames = traceback.extract_tb(exc.__traceback__)
        # Of several inputs that fail in one place of virtd's, wherever below that it was raised, one is enough.
        ours = [frame for frame in frames if "/virtd/" in frame.filename] or frames
        place = (type(exc).__name__, ours[-1].filename, ours[-1].lineno or 0)
        if place in self._seen:
            return
        self._seen.add(place)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("".join(traceback.format_exception(exc)))
        print(f"finding: {place[0]}: {exc} ({place[1]}:{place[2]}): {path}", flush=True)
