# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user of its own for each guest: which ID, under which name, and what it may read and take."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from virtd import errors
from virtd.children.facts import Facts
from virtd.drivers import ids
from virtd.drivers.qemu import acl, limits, ownership, userdb, users
from virtd.drivers.qemu.prerequisites import Account
from virtd.drivers.qemu.userdb import Named
from virtd.drivers.qemu.users import Living, Table, Users
from virtd.model import domain as model
from virtd.model import settings
from virtd.paths import Paths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST = ids.GUESTS.first
OF_PROCESSES = users._of_processes
MIB = 1 << 20


# IDs


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Users]:
    """Users of a host in a directory, on which nobody else has an ID of the range."""
    (tmp_path / "var/lib/virtd").mkdir(parents=True)
    monkeypatch.setattr(users, "SUBORDINATE", (str(tmp_path / "subuid"), str(tmp_path / "subgid")))
    monkeypatch.setattr(users, "known_as", lambda _uid: None)
    monkeypatch.setattr(users, "_of_processes", lambda: {os.getuid()})  # a lab's guests may run on this machine
    facts = Facts(ids=lambda *_asked: (1000, 50))
    return lambda **changes: Users(Paths(str(tmp_path)), settings.Qemu(**changes), facts)


def living(*uuids: str, running: dict[str, int] | None = None) -> list[Living]:
    return [Living(uuid, (running or {}).get(uuid)) for uuid in uuids]


def test_the_range_is_the_one_that_is_ours() -> None:
    qemu = settings.Qemu()
    assert (qemu.first_uid, qemu.uid_count) == (ids.GUESTS.first, ids.GUESTS.many)


async def taken(some: Users, uuid: str, domains: list[Living]) -> int:
    account = await some.account(f"domain-{uuid}", uuid, domains)
    assert account.own
    assert account.gid == account.uid
    return account.uid


def test_an_id_for_each(make: Callable[..., Users]) -> None:
    async def go() -> None:
        some, all_of_them = make(), living("a", "b", "c")
        # At once, as when guests are started at boot.
        found = await asyncio.gather(*(taken(some, uuid, all_of_them) for uuid in "abc"))
        assert sorted(found) == [FIRST, FIRST + 1, FIRST + 2]
        # The next daemon knows them.
        assert [await taken(make(), uuid, all_of_them) for uuid in "abc"] == found
        # One that is undefined leaves an ID that isn't given out at once again: files may be left of it.
        assert await taken(make(), "d", living("a", "c", "d")) == FIRST + 3
        assert await taken(make(), "b", living("a", "b", "c", "d")) == FIRST + 4

    asyncio.run(go())


def test_all_ids_come_round(make: Callable[..., Users]) -> None:
    async def go() -> None:
        some = make(uid_count=16)
        for number in range(40):
            uuid = str(number)
            assert await taken(some, uuid, living("keeps", uuid)) == FIRST + number % 16
        names = [str(number) for number in range(16)]
        for name in names:
            await taken(some, name, living(*names))
        with pytest.raises(errors.HostError, match="no user IDs left"):
            await taken(some, "one more", living(*names, "one more"))

    asyncio.run(go())


def test_what_others_have_is_left_to_them(
    make: Callable[..., Users], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subuid").write_text(f"ann:{FIRST}:10\n")
    (tmp_path / "subgid").write_text(f"root:{FIRST + 12}:1\n")
    monkeypatch.setattr(users, "known_as", lambda uid: "bob" if uid == FIRST + 11 else None)

    async def go() -> None:
        # A guest that runs with one whatever the table says: it was rebuilt from its unit.
        lost = Living("lost", FIRST + 10)
        assert await taken(make(), "a", [lost, *living("a")]) == FIRST + 13
        # Its own, granted to somebody later, it has no longer at its next start.
        (tmp_path / "subuid").write_text(f"ann:{FIRST + 13}:1\n")
        assert await taken(make(), "a", living("a")) == FIRST + 14
        # So it is when the range is another.
        assert await taken(make(first_uid=5000), "a", living("a")) == 5000

    asyncio.run(go())


def test_a_range_that_is_somebody_elses(make: Callable[..., Users], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "known_as", lambda _uid: "everybody")
    with pytest.raises(errors.HostError, match="are other users', everybody for one") as refused:
        asyncio.run(taken(make(), "a", living("a")))
    assert "qemu.first_uid" in str(refused.value.hint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ids": {"a": "b"}}', '{"ids": 5}', "\0", "[" * 100000])
def test_a_table_that_cant_be_read(make: Callable[..., Users], tmp_path: Path, content: str) -> None:
    path = tmp_path / "var/lib/virtd/qemu-ids.json"
    path.write_text(content)
    with pytest.raises(errors.HostError, match="can't be read"):
        make().read()
    assert ids.GUESTS.holds(asyncio.run(taken(make(), "a", living("a"))))
    assert make().read().ids.keys() == {"a"}
    assert (tmp_path / "var/lib/virtd/qemu-ids.json.damaged").read_text() == content


def test_the_table_is_written_before_the_id_is_used(
    make: Callable[..., Users], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise errors.HostError("Cannot write: No space left on device")

    monkeypatch.setattr("virtd.files.write", full)
    with pytest.raises(errors.HostError, match="No space"):
        asyncio.run(taken(make(), "a", living("a")))
    assert make().read() == Table(next=FIRST)


def test_one_for_all_when_asked_for(make: Callable[..., Users]) -> None:
    one = asyncio.run(make(user="ann", group="staff").account("a", "a", living("a")))
    assert (one.user, one.group, one.uid, one.gid, one.own) == ("ann", "staff", 1000, 50, False)


def test_what_runs_has_an_id(make: Callable[..., Users], monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.geteuid() in OF_PROCESSES()
    monkeypatch.setattr(users, "_of_processes", lambda: {FIRST, FIRST + 1})
    assert asyncio.run(taken(make(), "a", living("a"))) == FIRST + 2


def test_the_host_knows_root() -> None:
    assert users.known_as(0) == "root"


# Names


def test_names_are_made_and_removed(tmp_path: Path) -> None:
    directory = str(tmp_path / "userdb")
    old = os.umask(0o077)
    try:
        userdb.add(directory, Named("vm-web1", 77), "web1")
    finally:
        os.umask(old)
    assert sorted(os.listdir(directory)) == ["77.group", "77.user", "vm-web1.group", "vm-web1.user"]
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o755
    for name in os.listdir(directory):
        assert stat.S_IMODE(os.stat(f"{directory}/{name}").st_mode) == 0o644
    with open(f"{directory}/77.user", encoding="utf-8") as file:
        user = json.load(file)
    assert (user["userName"], user["uid"], user["gid"], user["shell"]) == ("vm-web1", 77, 77, "/usr/sbin/nologin")
    with open(f"{directory}/77.group", encoding="utf-8") as file:
        assert (group := json.load(file))["groupName"] == "vm-web1"
    assert group["gid"] == 77
    assert userdb.uid_of(directory, "vm-web1") == 77
    assert userdb.mentioned(userdb.listing(directory), Named("vm-web1", 77))
    for _ in range(2):
        userdb.remove(directory, Named("vm-web1", 77))
    assert os.listdir(directory) == []


@pytest.mark.parametrize("which", ["77.group", "77.user", "vm-web1.group", "vm-web1.user"])
@pytest.mark.parametrize("harm", ["gone", "empty", "half", "directory of another", "dangling"])
def test_names_are_mended(tmp_path: Path, which: str, harm: str) -> None:
    directory, who = str(tmp_path), Named("vm-web1", 77)
    userdb.add(directory, who, "web1")
    assert userdb.is_whole(directory, who, "web1")
    path = tmp_path / which
    content = path.read_bytes()
    path.unlink()
    if harm in ("empty", "half"):
        path.write_bytes(content[: len(content) // 2 if harm == "half" else 0])
    elif harm != "gone":
        path.symlink_to("nowhere.user" if harm == "dangling" else "/etc/hostname")
    assert not userdb.is_whole(directory, who, "web1")
    userdb.add(directory, who, "web1")
    assert userdb.is_whole(directory, who, "web1")
    assert sorted(os.listdir(directory)) == ["77.group", "77.user", "vm-web1.group", "vm-web1.user"]


def test_what_is_left_over_is_found_and_nothing_else(tmp_path: Path) -> None:
    directory = str(tmp_path)
    userdb.add(directory, Named("vm-a", 71), "a")
    userdb.add(directory, Named("vm-b", 72), "b")
    (tmp_path / "ann.user").write_text('{"userName": "ann", "uid": 5, "gid": 5}')
    (tmp_path / "5.user").symlink_to("ann.user")
    (tmp_path / "vm-theirs.user").write_text('{"userName": "vm-theirs", "uid": 6, "gid": 6, "service": "other"}')
    (tmp_path / "6.user").symlink_to("vm-theirs.user")
    (tmp_path / "ann:wheel.membership").write_text("")
    (tmp_path / "vm-half.user").write_text("{")
    before = set(os.listdir(directory))
    listed = userdb.listing(directory)
    assert userdb.left_over(directory, listed, {Named("vm-a", 71)}) == [Named("vm-b", 72)]
    userdb.remove(directory, Named("vm-b", 72))
    assert before - set(os.listdir(directory)) == {"72.group", "72.user", "vm-b.group", "vm-b.user"}
    # A crash between two of the removals.
    os.unlink(tmp_path / "vm-a.user")
    os.unlink(tmp_path / "vm-a.group")
    assert Named("vm-a", 71) in userdb.left_over(directory, userdb.listing(directory), set())
    userdb.remove(directory, Named("vm-a", 71))
    assert "71.user" not in os.listdir(directory)


def test_what_was_cut_off_is_found(tmp_path: Path) -> None:
    directory = str(tmp_path)
    (tmp_path / ".vm-web1.user.new").touch()
    (tmp_path / ".2013265920.group.new").symlink_to("vm-web1.group")
    ours = {f"{directory}/{entry}" for entry in os.listdir(directory)}
    for entry in (".joe.user.new", ".1000.user.new", ".vm-web1.user-privileged.new", "vm-web1.user.new"):
        (tmp_path / entry).touch()
    (tmp_path / ".1001.user.new").symlink_to("joe.user")
    assert set(userdb.unfinished(directory, userdb.listing(directory))) == ours


def test_a_name_that_another_has_by_now_stays(tmp_path: Path) -> None:
    directory = str(tmp_path)
    userdb.add(directory, Named("vm-a", 71), "a")
    userdb.add(directory, Named("vm-a", 72), "a")
    userdb.remove(directory, Named("vm-a", 71))
    assert userdb.is_whole(directory, Named("vm-a", 72), "a")
    # Nor does its number go with a name that somebody has copied.
    (tmp_path / "vm-copy.user").write_bytes((tmp_path / "vm-a.user").read_bytes())
    userdb.remove(directory, Named("vm-copy", 72))
    assert userdb.is_whole(directory, Named("vm-a", 72), "a")


@pytest.mark.parametrize("domain", ["a", "x" * 28, "x" * 29, "x" * 64, "A.b-c_d"])
def test_names_fit(domain: str) -> None:
    name = userdb.name_of(domain)
    assert len(name) <= 31
    assert name.startswith("vm-" + domain[:10])
    assert name == f"vm-{domain}" or "+" in name


def test_long_names_differ() -> None:
    assert userdb.name_of("x" * 40 + "a") != userdb.name_of("x" * 40 + "b")


# What it may read


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """A file on a file system that has access control lists."""
    path = str(tmp_path / "iso")
    with open(path, "wb"):
        os.chmod(path, 0o600)
    try:
        acl.read(path)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            pytest.skip("no access control lists here")
        raise
    return path


def granted(path: str, uid: int) -> bool:
    return any((entry.tag, entry.id) == (acl.USER, uid) and entry.perm & acl.READ for entry in acl.read(path))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o440, 0o644, 0o700])
def test_granted_and_taken_back(listed: str, mode: int) -> None:
    os.chmod(listed, mode)
    acl.grant(listed, 71)
    acl.grant(listed, 72)
    acl.grant(listed, 71)
    assert granted(listed, 71)
    assert granted(listed, 72)
    assert not granted(listed, 73)
    assert [entry for entry in acl.read(listed) if entry.tag == acl.GROUP_OBJ] == [acl.Entry(4, mode >> 3 & 7)]
    acl.revoke(listed, 71)
    acl.revoke(listed, 73)
    assert not granted(listed, 71)
    assert granted(listed, 72)
    acl.revoke(listed, 72)
    assert stat.S_IMODE(os.stat(listed).st_mode) == mode
    with pytest.raises(OSError, match="No data"):
        os.getxattr(listed, acl.ATTRIBUTE)


def test_a_list_of_somebodys_stays_as_it_was(listed: str) -> None:
    acl.grant(listed, 1000)
    before = os.getxattr(listed, acl.ATTRIBUTE)
    acl.grant(listed, 71)
    acl.revoke(listed, 71)
    assert os.getxattr(listed, acl.ATTRIBUTE) == before
    os.chmod(listed, 0o600)  # which switches off what it grants
    with pytest.raises(OSError, match="switched off"):
        acl.grant(listed, 71)


def test_granted_to_write(listed: str) -> None:
    acl.grant(listed, 71, write=True)
    acl.grant(listed, 72, write=True)
    both = acl.READ | acl.WRITE
    assert {(entry.tag, entry.perm) for entry in acl.read(listed) if entry.id != acl.NOBODY} == {(acl.USER, both)}
    assert [entry.perm for entry in acl.read(listed) if entry.tag == acl.MASK] == [both]
    acl.revoke(listed, 71)
    acl.revoke(listed, 72)
    assert stat.S_IMODE(os.stat(listed).st_mode) == 0o600
    # What others may only read, by a mask, isn't unmasked.
    acl.grant(listed, 1000)
    before = os.getxattr(listed, acl.ATTRIBUTE)
    with pytest.raises(OSError, match="switched off"):
        acl.grant(listed, 71, write=True)
    assert os.getxattr(listed, acl.ATTRIBUTE) == before


def test_what_is_shared_is_granted_though_it_is_written(listed: str) -> None:
    uid = FIRST + 1
    (one,) = ownership.needed([(listed, True)], own(uid), LEFT, [listed])
    assert (one.listed, one.writes) == (True, True)
    ownership.hand_over([one], own(uid))
    assert acl.Entry(acl.USER, acl.READ | acl.WRITE, uid) in acl.read(listed)
    assert ownership.recorded({"given": ownership.to_record([one])}, 0) == [one]
    ownership.give_back([one])
    assert stat.S_IMODE(os.stat(listed).st_mode) == 0o600


def test_a_mode_that_was_changed_meanwhile_stays(listed: str) -> None:
    os.chmod(listed, 0o640)
    acl.grant(listed, 71)
    os.chmod(listed, 0o600)
    acl.revoke(listed, 71)
    assert stat.S_IMODE(os.stat(listed).st_mode) == 0o600


def own(uid: int) -> Account:
    return Account(f"vm-{uid}", f"vm-{uid}", uid, uid, (), own=True)


LEFT = ownership.Leftovers(ids.GUESTS, {FIRST + 5}, 50)


def test_what_is_read_is_granted_and_what_is_written_is_given(listed: str) -> None:
    uid = FIRST + 1
    (read,) = ownership.needed([(listed, False)], own(uid), LEFT)
    assert (read.listed, read.to, read.uid) == (True, uid, os.geteuid())
    (written,) = ownership.needed([(listed, True), (listed, False)], own(uid), LEFT)
    assert not written.listed
    # With one user for all nothing is granted: whose end would take it from the others?
    (shared,) = ownership.needed([(listed, False)], Account("x", "x", uid, uid, ()), LEFT)
    assert not shared.listed
    ownership.hand_over([read], own(uid))
    assert granted(listed, uid)
    assert ownership.recorded({"given": ownership.to_record([read])}, 0) == [read]
    for _ in range(2):
        ownership.give_back([read])
    assert not granted(listed, uid)
    assert stat.S_IMODE(os.stat(listed).st_mode) == 0o600


def test_without_lists_it_is_one_guests(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_path: str) -> list[acl.Entry]:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(acl, "read", unsupported)
    (one,) = ownership.needed([(listed, False)], own(FIRST + 1), LEFT)
    assert not one.listed


def as_if_owned(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    real = os.fstat
    monkeypatch.setattr(
        os, "fstat",
        lambda fd: s if not stat.S_ISREG((s := real(fd)).st_mode) else os.stat_result((*s[:4], uid, uid, *s[6:])),
    )  # fmt: skip


def test_what_a_power_cut_left_becomes_roots(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for uid in (FIRST + 1, FIRST + 2):
        as_if_owned(monkeypatch, uid)
        (one,) = ownership.needed([(listed, True)], own(FIRST + 1), LEFT)
        assert (one.uid, one.gid, one.to) == (0, 50, FIRST + 1)


def test_what_another_guest_has_is_refused_it(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_owned(monkeypatch, FIRST + 5)
    with pytest.raises(errors.HostError, match="given to another guest"):
        ownership.needed([(listed, True)], own(FIRST + 1), LEFT)


# Limits


def parse(text: str) -> model.Domain:
    return model.parse(f'name = "a"\nmemory = "256M"\n{text}', "x")


def test_limits_follow_the_definition() -> None:
    small = parse('boot.kernel = "/k"')
    large = parse('vcpus = 4\nboot.kernel = "/k"\nvnc = {}\ndisk = [{ path = "/a" }, { path = "/b" }]')
    threads = parse(
        'disk = [{ path = "/a", iothread = true }, { path = "/b" }, { path = "/c", bus = "scsi" }, '
        '{ path = "/d", bus = "scsi", iothread = true }, { path = "/e", bus = "scsi", iothread = true }]'
    )
    assert limits.tasks_max(small, overhead=200) == 201
    assert limits.tasks_max(threads, overhead=200) == 201 + 2 * 65
    assert limits.tasks_max(large, overhead=200) == 204
    assert limits.tasks_max(large, overhead=0) is None
    rest = 256 * MIB + 2 * MIB
    assert limits.memory_max(small, kvm=True, overhead=1024 * MIB) == rest + (8 + 1024) * MIB
    assert limits.memory_max(small, kvm=False, overhead=1024 * MIB) == rest + (8 + 2 * 1024) * MIB
    assert limits.memory_max(large, kvm=True, overhead=1024 * MIB) == rest + (4 * 8 + 2 * 64 + 64 + 1024) * MIB
    assert limits.memory_max(large, kvm=True, overhead=None) is None


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('memory_overhead = "100M"', "memory_overhead"),
        ('memory_overhead = "much"', "memory_overhead"),
        ("tasks_overhead = 5", "tasks_overhead"),
        ("first_uid = 0", "first_uid"),
        ("uid_count = 0", "uid_count"),
        ("first_uid = 2147483000\nuid_count = 1000", "uid_count"),
    ],
)
def test_bad_settings_are_named(line: str, key: str) -> None:
    with pytest.raises(errors.InvalidDefinition, match=f"qemu.{key}"):
        settings.parse(f"[qemu]\n{line}\n", "virtd.toml")


@pytest.mark.parametrize("path", ["/opt/q'", '/opt/"q"', "/opt/q\\", "/opt/$q", "/opt/100%", "/opt/a;b", "/opt/a\nb"])
@pytest.mark.parametrize("section", ["qemu", "dnsmasq"])
def test_programs_that_systemd_cannot_run(section: str, path: str) -> None:
    with pytest.raises(errors.InvalidDefinition, match=rf"{section}\.binary: .*systemd can run"):
        settings.parse(f"[{section}]\nbinary = {json.dumps(path)}\n", "virtd.toml")


def test_good_settings() -> None:
    assert settings.parse('[qemu]\nbinary = "/opt/my qemu"\n', "x").qemu.binary == "/opt/my qemu"
    assert settings.parse('[qemu]\nmemory_overhead = "unlimited"\n', "x").qemu.overhead_bytes is None
    assert settings.parse("[qemu]\nmemory_overhead = 536870912\n", "x").qemu.overhead_bytes == 512 * MIB
    for user in ("", "virtd-qemu"):
        assert settings.parse(f'[qemu]\nuser = "{user}"\n', "x").qemu.shared_user == "virtd-qemu"
