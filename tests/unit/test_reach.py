# SPDX-License-Identifier: LGPL-2.1-or-later
"""A path is walked name by name, and ends where others could replace what it leads to."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from virtd import errors, mountinfo, reach
from virtd.reach import Trust, reached

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOMEBODY = 4321


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a file another user's; without being root, by being another user oneself as far as `reach` knows."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)

    return give


def told(path: Path) -> tuple[str, str]:
    with pytest.raises(errors.HostError) as caught, reached(str(path)):
        pass
    return caught.value.message, str(caught.value.hint)


def test_a_file_in_roots_directories(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(b"content")
    with reached(f"{tmp_path}/./disk") as found:
        assert found.path == str(file)
        assert found.identity == (file.stat().st_dev, file.stat().st_ino)
        file.rename(tmp_path / "elsewhere")
        file.write_bytes(b"another")
        with open(found.itself, "rb") as opened:
            assert opened.read() == b"content"


def test_links_are_followed_as_the_kernel_does(tmp_path: Path) -> None:
    """Random trees of directories and links: where a path leads to, and whether it leads anywhere."""
    chance = random.Random(12)
    directories, files = [tmp_path], []
    for number in range(40):
        place = chance.choice(directories) / f"n{number}"
        match chance.randrange(4):
            case 0:
                place.mkdir()
                directories.append(place)
            case 1:
                place.touch()
                files.append(place)
            case 2:
                place.symlink_to(chance.choice([*directories, *files]))
            case _:
                place.symlink_to("/".join(chance.choice(["..", ".", f"n{chance.randrange(40)}"]) for _ in range(3)))
    everything = list(tmp_path.rglob("*"))
    for path in [*everything, *(one / ".." / two.name for one in everything for two in everything[:10])]:
        try:
            fd = os.open(path, os.O_PATH)
            expected: object = (os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino)
            os.close(fd)
        except OSError as exc:
            expected = exc.errno
        try:
            with reached(str(path)) as found:
                result: object = (found.path, found.status.st_ino)
        except OSError as exc:
            result = exc.errno
        assert result == expected, path


def test_links_without_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as caught, reached(f"{tmp_path}/a"):  # noqa: PT011 (the number is looked at)
        pass
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["missing", "file/below", "missing/below", "file/.."])
def test_what_isnt_there(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((FileNotFoundError, NotADirectoryError)), reached(f"{tmp_path}/{path}"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_of_another_users(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    place = tmp_path / "alice"
    place.mkdir()
    (place / "disk").touch()
    give_away(place)
    text, hint = told(place / "disk")
    assert "belongs to user" in text
    assert "disk in it" in text or os.geteuid()
    assert "chown root" in hint
    with reached(f"{place}/disk", Trust.ANYBODY) as found:
        assert found.path == f"{place}/disk"


def test_a_file_of_another_users_in_roots_directory(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    if os.geteuid():
        pytest.skip("the whole way would be another user's")
    (tmp_path / "disk").touch()
    give_away(tmp_path / "disk")
    assert reach.look(f"{tmp_path}/disk").st_uid == SOMEBODY


@pytest.mark.parametrize(("mode", "who"), [(0o757, "everybody"), (0o777, "everybody"), (0o775, "group")])
@pytest.mark.parametrize("link", [False, True])
def test_a_directory_that_others_can_write(tmp_path: Path, mode: int, who: str, link: bool) -> None:
    """Also where only a link leads through it."""
    place = tmp_path / "open"
    place.mkdir()
    (tmp_path / "disk").touch()
    (place / "disk").symlink_to("../disk") if link else (place / "disk").touch()
    (tmp_path / "there").symlink_to("open/disk")
    place.chmod(mode)
    os.chown(place, -1, os.getgid() or (SOMEBODY if mode == 0o775 else 0))
    for path in (place / "disk", tmp_path / "there"):
        text, hint = told(path)
        assert f"{place} can be written by {who}" in text
        assert f"chmod {'o' if who == 'everybody' else 'g'}-w {place}" in hint


def test_roots_own_group_may_write_unless_a_list_names_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "group"
    place.mkdir()
    (place / "disk").touch()
    place.chmod(0o775)
    if os.geteuid() == 0:
        reach.look(f"{place}/disk")
        monkeypatch.setattr(reach, "_has_acl", lambda _fd: True)
    assert "or an ACL" in told(place / "disk")[0]


def test_a_sticky_directory(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    """In /tmp nobody can rename another's file, but everybody can have made it."""
    place = tmp_path / "tmp"
    place.mkdir()
    for name in ("mine", "linked", "theirs", "target"):
        (place / name).touch()
    (place / "link").symlink_to("target")
    (place / "below").mkdir()
    (place / "below/disk").touch()
    os.link(place / "linked", tmp_path / "secret")
    place.chmod(0o1777)
    for name in ("mine", "link", "below/disk"):
        with reached(f"{place}/{name}"):
            pass
    assert "everybody" in told(place / "linked")[0]
    give_away(place / "theirs")
    told(place / "theirs")
    if os.geteuid() == 0:
        with reached(f"{place}/theirs", Trust.OWNER):
            pass


def test_the_hosts_root_may_be_another_than_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a mount namespace. Nothing leads out of it, and paths are the host's."""
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv/a").touch()
    (tmp_path / "link").symlink_to("/srv/../../srv")
    monkeypatch.setattr(reach, "_ROOT", f"{tmp_path}/")
    for path in ("/srv/a", "/../srv/a", "/link/a", "/srv/../../link/a"):
        with reached(path) as found:
            assert found.path == "/srv/a"
            assert os.path.samestat(found.status, os.stat(tmp_path / "srv/a"))


def test_a_file_system_that_a_user_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says of its files whatever its user wants."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "30 1 0:77 / /srv rw - tmpfs tmpfs rw\n"
        "31 30 0:78 / /srv/bob\\040x rw,nosuid - fuse.x x rw,user_id=1000,group_id=1000,allow_other\n"
        "32 30 0:79 / /srv/root rw,nosuid shared:1 - fuse.y y rw,user_id=0,group_id=0\n"
    )
    monkeypatch.setattr(mountinfo, "PATH", str(table))
    whole = os.stat(tmp_path)

    def of(device: int) -> os.stat_result:
        return os.stat_result((*whole[:2], device, *whole[3:10]))

    for number, user in ((77, 0), (78, 1000), (79, 0), (80, 0)):
        assert reach._mounted_by(whole, of(os.makedev(0, number))) == user
    assert reach._mounted_by(of(os.makedev(0, 78)), of(os.makedev(0, 78))) == 0  # told where it began


def test_a_file_that_only_its_owner_could_exchange(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    """As an image that is imported from its owner's directory. A link of the owner's leads to nothing else."""
    if os.geteuid():
        pytest.skip("nobody's but one user's files can be made")
    place, secret = tmp_path / "bob", tmp_path / "secret"
    place.mkdir()
    secret.touch()
    (place / "mine").touch()
    (place / "link").symlink_to("mine")
    (place / "theft").symlink_to(secret)
    os.link(secret, place / "hard")
    for path in (place, place / "mine"):
        give_away(path)
    for name in ("mine", "link"):
        with reached(f"{place}/{name}", Trust.OWNER) as found:
            assert found.path == f"{place}/mine"
    for name in ("theft", "hard"):
        with pytest.raises(errors.HostError, match="belongs to user"), reached(f"{place}/{name}", Trust.OWNER):
            pass
    place.chmod(0o770)
    with pytest.raises(errors.HostError, match="belongs to user"), reached(f"{place}/mine", Trust.OWNER):
        pass
