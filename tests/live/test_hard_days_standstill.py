# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that stand still by themselves, for a full disk or a panic: said, kept, and not resumed in vain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab, definition
from tests.live.networks import begin, finish
from tests.live.tools import KILL, Journal
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

PLACE = "/srv/small"
FILL = "dd if=/dev/urandom of=/dev/vda bs=64k count=256 conv=fsync 2>/dev/null"


@pytest.fixture
def small(lab: Lab) -> Iterator[Lab]:
    """A file system of 8 MiB for a disk that claims to have 16."""
    lab.sh(f"mkdir -p {PLACE}; mount -t tmpfs -o size=8M tmpfs {PLACE}; truncate -s 16M {PLACE}/d.img")
    yield lab
    lab.virtdctl("stop", "web1", check=False)
    lab.sh(f"umount {PLACE}; rmdir {PLACE}")


def problems(lab: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return found


def standing_still(lab: Lab) -> str:
    """The problem, once it says how much is free."""

    def told() -> str:
        return next((one["text"] for one in problems(lab) if " free" in one["text"]), "")

    text: str = lab.wait("the problem", told, 60)
    return text


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_a_disk_that_is_full(small: Lab, format_: str) -> None:
    lab = small
    if format_ == "qcow2":
        lab.sh(f"rm {PLACE}/d.img; qemu-img create -q -f qcow2 {PLACE}/d.img 16M")
    disk = f'[[disk]]\npath = "{PLACE}/d.img"\nformat = "{format_}"\n'
    lab.virtdctl("define", "-", stdin=definition("web1", more=disk))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    journal = Journal.now(lab)
    before = begin(lab, "web1", FILL)
    info = lab.wait("the standstill", lambda: (i := lab.info("web1"))["state"] == "paused" and i, 60)
    assert info["reason"] == f"a write to disk[0], {PLACE}/d.img failed: no space left"
    assert (info["standstill"]["kind"], info["standstill"]["full"]) == ("io-error", True)
    text = standing_still(lab)
    assert f"no space left on the file system of {PLACE}, " in text
    assert lab.virtdctl("status", check=False).returncode != 0
    (entry,) = journal.await_entries(f"MESSAGE_ID={Message.GUEST_STOOD_STILL}")
    assert f"{PLACE}/d.img" in entry["MESSAGE"]
    # It is as true for the next daemon, and the next.
    for end in ("systemctl restart virtd.service", f"{KILL}; sleep 1"):
        lab.sh(end)
        assert f"file system of {PLACE}" in standing_still(lab)
        assert lab.info("web1")["standstill"]["disk"] == "disk[0]"
    assert len(journal.entries(f"MESSAGE_ID={Message.GUEST_STOOD_STILL}")) == 1
    refused = lab.virtdctl("resume", "web1", check=False)
    assert refused.returncode == 1
    assert "stands still" in refused.stderr
    assert "Free some space" in refused.stderr
    assert lab.info("web1")["state"] == "paused"
    lab.sh(f"mount -o remount,size=32M {PLACE}")
    lab.virtdctl("resume", "web1")
    assert finish(lab, "web1", before)[0] == 0, "not a byte of it is lost"
    assert (lab.info("web1")["state"], lab.info("web1")["standstill"]) == ("running", None)
    assert problems(lab) == []


def test_a_disk_that_was_full_when_nobody_was_there(small: Lab) -> None:
    lab = small
    lab.virtdctl("define", "-", stdin=definition("web1", more=f'[[disk]]\npath = "{PLACE}/d.img"\n'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    begin(lab, "web1", f"sleep 3; {FILL}")
    lab.sh("systemctl stop virtd.socket virtd-root.socket virtd.service")
    lab.wait("a full disk", lambda: lab.sh(f"df --output=avail -k {PLACE} | tail -n1").strip() in ("0", "4"), 60)
    lab.sh("sleep 1; systemctl start virtd.socket virtd-root.socket virtd.service")
    assert f"disk[0], {PLACE}/d.img" in standing_still(lab)
    lab.virtdctl("stop", "web1")
    assert problems(lab) == []


def test_a_panic_that_is_kept(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more='on_crash = "keep"'))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    lab.virtdctl("console", "--timeout", "0", "web1", stdin="panic\n")
    (found,) = lab.wait("the problem", lambda: problems(lab), 60)
    assert "the guest's kernel panicked" in found["text"]
    lab.sh("systemctl restart virtd.service")
    assert [one["text"] for one in problems(lab)] == [found["text"]]
    # What the hint says.
    lab.virtdctl("stop", "web1")
    lab.virtdctl("start", "web1")
    assert problems(lab) == []
