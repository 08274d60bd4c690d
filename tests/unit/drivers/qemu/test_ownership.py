# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which file a guest's user is given, and that no other one is, whatever takes its name meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from virtd import errors
from virtd.drivers.qemu import ownership
from virtd.drivers.qemu.prerequisites import Account

WHO = Account("guest", "guest", 4321, 4321, ())


class Change(NamedTuple):
    inode: int
    uid: int
    gid: int


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """What is chown'ed, in place of doing it."""
    found: list[Change] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: found.append(Change(os.stat(path).st_ino, uid, gid)))
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.touch(0o600)
    return path


def given(path: Path, to: int | None = None) -> ownership.Given:
    status = path.stat()
    return ownership.Given(str(path), status.st_dev, status.st_ino, 5, 6, status.st_uid if to is None else to)


def test_what_the_guest_cant_open_is_changed_and_goes_back(disk: Path, changes: list[Change]) -> None:
    readable = disk.with_name("iso")
    readable.touch(0o644)
    readable.chmod(0o644)
    (disk.parent / "link").symlink_to("disk")
    rows = ownership.needed([(str(disk.parent / "link"), True), (str(disk), True), (str(readable), False)], WHO)
    me = disk.stat()
    assert rows == [ownership.Given(str(disk), me.st_dev, me.st_ino, me.st_uid, me.st_gid, WHO.uid)]
    assert changes == []
    ownership.hand_over(rows, WHO)
    assert changes == [Change(me.st_ino, WHO.uid, WHO.gid)]
    assert ownership.recorded({"given": ownership.to_record(rows)}, 0) == rows


@pytest.mark.parametrize("way", ["another", "link", "hard link", "directory"])
def test_another_file_of_that_name_isnt_given(disk: Path, changes: list[Change], way: str) -> None:
    secret = disk.with_name("secret")
    secret.touch(0o600)
    rows = ownership.needed([(str(disk), True)], WHO)
    back = [given(disk)]
    disk.rename(disk.with_name("aside"))
    match way:
        case "another":
            disk.touch()
        case "link":
            disk.symlink_to(secret)
        case "hard link":
            os.link(secret, disk)
        case _:
            disk.mkdir()
    with pytest.raises(errors.HostError, match="was exchanged"):
        ownership.hand_over(rows, WHO)
    ownership.give_back(back)
    assert changes == []


def test_what_somebody_else_took_stays_theirs(disk: Path, changes: list[Change]) -> None:
    ownership.give_back([given(disk, to=4321)])
    assert changes == []
    ownership.give_back([given(disk)])
    assert changes == [Change(disk.stat().st_ino, 5, 6)]


def test_a_disk_whose_directory_others_can_write_is_refused(disk: Path) -> None:
    disk.parent.chmod(0o777)
    with pytest.raises(errors.HostError, match="can be written by everybody"):
        ownership.needed([(str(disk), True)], WHO)
    # What was given before the directory was opened up goes back all the same: it is the file on record.


def test_a_file_goes_back_though_its_directory_was_opened_to_others(disk: Path, changes: list[Change]) -> None:
    row = given(disk)
    disk.parent.chmod(0o777)
    ownership.give_back([row])
    assert changes == [Change(disk.stat().st_ino, 5, 6)]


def test_records_of_an_older_virtd(disk: Path, changes: list[Change]) -> None:
    """[path, uid, gid]; which file that is, is known from the list of what the guest has open."""
    me = disk.stat()
    data = {"owners": [[str(disk), 5, 6]], "images": [[str(disk), me.st_dev, me.st_ino, True]]}
    rows = ownership.recorded(data, me.st_uid)
    assert rows == [given(disk)]
    disk.rename(disk.with_name("aside"))
    disk.symlink_to("/etc/shadow")
    ownership.give_back(rows)
    assert changes == []
    assert ownership.recorded({}, 0) == []


def test_without_a_known_file_the_path_has_to_be_roots(disk: Path, changes: list[Change]) -> None:
    rows = ownership.recorded({"owners": [[str(disk), 5, 6]]}, disk.stat().st_uid)
    assert rows[0].ino == 0
    disk.parent.chmod(0o777)
    ownership.give_back(rows)
    assert changes == []
    disk.parent.chmod(0o700)
    ownership.give_back(rows)
    assert changes == [Change(disk.stat().st_ino, 5, 6)]


def test_what_the_guest_is_shown(disk: Path) -> None:
    """Its sandbox has the files on record, or the start fails; what can't be seen doesn't keep it from starting."""
    identity = (disk.stat().st_dev, disk.stat().st_ino)
    ownership.check_shown(os.getpid(), {identity: (str(disk), True)})
    ownership.check_shown(1 << 22, {identity: (str(disk), True)})
    disk.rename(disk.with_name("aside"))
    ownership.check_shown(os.getpid(), {identity: (str(disk), True)})
    disk.touch()
    with pytest.raises(errors.StartFailed, match="was exchanged"):
        ownership.check_shown(os.getpid(), {identity: (str(disk), True)})
