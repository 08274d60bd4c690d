# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest wrote, on a terminal and in JSON: nothing that a terminal would obey."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.doubles.fake_daemon import FakeDaemon, Guest
from virtd.cli.filtered import Filter
from virtd.cli.output import clean, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
CLIPBOARD = b"\x1b]52;c;cm0gLXJmIC8K\x07"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"[  \x1b[0;32mOK\x1b[0m  ] Started\r\n\tx", b"[  \x1b[0;32mOK\x1b[0m  ] Started\r\n\tx\x1b[0m"),
        (CLIPBOARD, b"\\x1b]52;c;cm0gLXJmIC8K\\x07"),
        (b"\x1b[2J\x1b[6n\x1bc\x9b6n\x00\x7f", b"\\x1b[2J\\x1b[6n\\x1bc\\x9b6n\\x00\\x7f"),
        ("\u009b6n é \u0085".encode(), "\\x9b6n é \\x85".encode()),
        (b"a\xff\xc3", b"a\\xff\\xc3"),
        (b"\x1b[" + b"1" * 1000 + b"m", b"\\x1b[" + b"1" * 1000 + b"m"),
        (b"end \x1b[3", b"end \\x1b[3"),
    ],
)
def test_what_is_shown(written: bytes, shown: bytes) -> None:
    for size in (1, 2, 3, 7, len(written)):
        ours = Filter()
        pieces = [ours.pass_on(written[at : at + size]) for at in range(0, len(written), size)]
        assert b"".join(pieces) + ours.pass_on(b"", last=True) == shown, size


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path / "virtd.sock")
    guest = Guest(tmp_path)
    fake.guest(guest)
    guest.write(b"one " + CLIPBOARD + b"\r\n")
    yield fake
    fake.close()
    guest.close()


def on_a_terminal(daemon: FakeDaemon, *words: str) -> bytes:
    command = [sys.executable, "-m", "virtd.cli", *words, "--address", daemon.path]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stdin=subprocess.DEVNULL) as process:
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:
            pass  # the other end was closed
        os.close(ours)
        assert process.wait(60) == 0
    return seen


def test_a_log_on_a_terminal(daemon: FakeDaemon) -> None:
    assert b"\x1b" not in on_a_terminal(daemon, "log", "web1")
    assert CLIPBOARD in on_a_terminal(daemon, "log", "--raw", "web1")


def test_json_has_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\u009b": "b\u0085\x7fé\udcff", "c": "\x1b"}
    for style in ("short", "pretty"):
        write_json(value, style)
        out = capsys.readouterr().out
        assert not set(out) & {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160))}
        assert json.loads(out) == value


def test_tables_have_none_either() -> None:
    assert clean("a\u009b\x1b\udcff") == "a\\x9b\\x1b\\udcff"
