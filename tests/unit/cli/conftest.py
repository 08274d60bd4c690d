# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon for virtdctl to talk to, and a guest of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.doubles.fake_daemon import FakeDaemon, Guest
from virtd.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Ran(NamedTuple):
    """How a run of virtdctl ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def virtdctl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run it in this process."""

    def run(*words: str) -> Ran:
        return Ran(main(words), *capsys.readouterr())

    return run


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """At VIRTDCTL_ADDRESS, for this process and those that it starts."""
    fake = FakeDaemon(tmp_path / "virtd.sock")
    monkeypatch.setenv("VIRTDCTL_ADDRESS", fake.path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield fake
    fake.close()


@pytest.fixture
def guest(tmp_path: Path, daemon: FakeDaemon) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    daemon.guest(guest)
    yield guest
    guest.close()
