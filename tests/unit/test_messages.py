# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal catalogue and virtd/messages.py say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from virtd.messages import FIELDS, Message

CATALOG = Path(__file__).resolve().parents[2] / "units" / "virtd.catalog"


def entries() -> dict[str, str]:
    found: dict[str, str] = {}
    for block in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        identifier, _, text = block.partition("\n")
        assert identifier not in found, f"{identifier} is there twice"
        found[identifier] = text
    return found


def test_every_message_has_an_entry() -> None:
    assert set(entries()) == {message.value for message in Message}


def test_ids_are_128_bits_and_differ() -> None:
    assert all(re.fullmatch("[0-9a-f]{32}", message) for message in Message)
    assert len(set(Message)) == len(Message.__members__)


@pytest.mark.parametrize("message", Message)
def test_entry(message: Message) -> None:
    header, _, body = entries()[message].partition("\n\n")
    assert re.match(r"Subject: \S.*\nDefined-By: virtd\nDocumentation: man:virt", header)
    used = set(re.findall("@([^@]*)@", header + body))
    assert used <= set(FIELDS[message]), f"not among the fields of {message.name}"
    assert len(body.split()) > 20, "says what happened and what to do"


@pytest.mark.skipif(shutil.which("journalctl") is None, reason="journalctl isn't here")
def test_journalctl_compiles_it(tmp_path: Path) -> None:
    directory = tmp_path / "usr/lib/systemd/catalog"
    directory.mkdir(parents=True)
    shutil.copy(CATALOG, directory)
    subprocess.run(["journalctl", f"--root={tmp_path}", "--update-catalog"], check=True, timeout=60)
    assert (tmp_path / "var/lib/systemd/catalog/database").stat().st_size > CATALOG.stat().st_size // 2
