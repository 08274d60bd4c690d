# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtd import mountinfo
from virtd.mountinfo import Mount, mounts


def test_the_fields_of_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw,errors=remount-ro\n"
        "31 22 0:40 /a\\134b /srv/my\\040pool rw,nodev shared:3 master:2 - nfs server:/- rw\n"
        "32 22 0:41 / /srv/nothing rw - fuse.x  rw,user_id=1000\n"
    )
    monkeypatch.setattr(mountinfo, "PATH", str(tmp_path / "mountinfo"))
    assert mounts() == [
        Mount("22", "8:1", "/", "/", "/dev/sda1", ("rw", "errors=remount-ro")),
        Mount("31", "0:40", "/a\\b", "/srv/my pool", "server:/-", ("rw",)),
        Mount("32", "0:41", "/", "/srv/nothing", "", ("rw", "user_id=1000")),
    ]


def test_this_host_has_mounts() -> None:
    assert "/proc" in [mount.point for mount in mounts()]
