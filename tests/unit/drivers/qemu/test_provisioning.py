# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's own system is set up with: what is accepted, what comes of it, and when it is there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, World, nothing_left, on_loop
from virtd import errors
from virtd.drivers.qemu import directory, iso9660, provisioning
from virtd.drivers.qemu.devices import placing
from virtd.model import domain as model
from virtd.replies.guests import Provided

if TYPE_CHECKING:
    from pathlib import Path

    from tests.doubles.cuts import Cuts

UUID = "0123abcd-4567-89ab-cdef-0123456789ab"


def public_key(kind: str = "ssh-ed25519", comment: str = " me@example.org") -> str:
    blob = struct.pack(">I", len(kind)) + kind.encode() + struct.pack(">I", 32) + bytes(range(32))
    return f"{kind} {base64.b64encode(blob).decode()}{comment}"


KEY = public_key()


def parse(guest: str, more: str = "", name: str = "web1") -> model.Domain:
    return model.parse(
        f'name = "{name}"\nmemory = "256M"\nguest = {{ {guest} }}\n{more}\ndisk = [{{ path = "/a" }}]', "x"
    )


# The definition


@pytest.mark.parametrize(
    ("guest", "key", "expected"),
    [
        ("hostname = 1", "guest.hostname", "expected string, got integer"),
        ("hostname = ''", "guest.hostname", 'expected a host name such as "web1", got ""'),
        ("hostname = 'a_b'", "guest.hostname", "expected a host name"),
        ("hostname = '-a'", "guest.hostname", "expected a host name"),
        ("hostname = 'a..b'", "guest.hostname", "expected a host name"),
        ("hostname = 'a.'", "guest.hostname", "expected a host name"),
        ('hostname = "a\\n"', "guest.hostname", "expected a host name"),
        (f"hostname = '{'a' * 64}'", "guest.hostname", "expected a host name"),
        (f"hostname = '{'a.' * 32}a'", "guest.hostname", "expected a host name"),
        ("ssh_keys = 'ssh-ed25519 A'", "guest.ssh_keys", "expected array, got string"),
        ("ssh_keys = ['ssh-ed25519']", "guest.ssh_keys[0]", "expected a public key in one line"),
        ("ssh_keys = ['ssh-ed25519 AAAA']", "guest.ssh_keys[0]", "expected a public key in one line"),
        ("ssh_keys = ['ssh-ed25519 A=']", "guest.ssh_keys[0]", "expected a public key in one line"),
        (f"ssh_keys = ['{KEY}', '{KEY.replace('ssh-ed25519', 'ssh-rsa')}']", "guest.ssh_keys[1]", "expected a pub"),
        (f'ssh_keys = ["{KEY}\\n"]', "guest.ssh_keys[0]", "expected a public key in one line"),
        (f"ssh_keys = ['{KEY}{'x' * (16 << 10)}']", "guest.ssh_keys[0]", "expected a public key in one line"),
        (f"ssh_keys = [{', '.join([repr(KEY)] * 257)}]", "guest.ssh_keys", "expected at most 256 keys, got 257"),
        ("user_data = 'cloud.yaml'", "guest.user_data", "expected an absolute path"),
        ("user_data = '/a/../b'", "guest.user_data", "expected a path without '..'"),
        ("network_config = ''", "guest.network_config", "expected an absolute path"),
        ("user-data = '/a'", "guest.user-data", "unknown key"),
        ("ignition = 'a.ign'", "guest.ignition", "expected an absolute path"),
        ("ignition = '/a', hostname = 'b'", "guest.ignition", "expected no keys for cloud-init with it"),
        (f"ignition = '/a', ssh_keys = ['{KEY}']", "guest.ignition", "expected no keys for cloud-init with it"),
        ("credentials = { a = 'x' }", "guest.credentials.a", "expected the absolute path of a file that has it"),
        ("credentials = { a = '/x/../y' }", "guest.credentials.a", "expected a path without '..'"),
        ("credentials = { a = { text = 'x' } }", "guest.credentials[0]", "expected string, got table"),
        ("credentials = { 'a=b' = '/x' }", "guest.credentials", "expected a name of letters, digits"),
        ("credentials = { 'a/b' = '/x' }", "guest.credentials", "expected a name of letters, digits"),
        ("credentials = { '.a' = '/x' }", "guest.credentials", "expected a name of letters, digits"),
        (
            f"credentials = {{ {', '.join(f'a{number} = {chr(39)}/x{chr(39)}' for number in range(65))} }}",
            "guest.credentials",
            "expected at most 64, got 65",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value(guest: str, key: str, expected: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse(guest)
    assert (caught.value.file, caught.value.key.replace("[...]", "[0]")) == ("x", key)
    assert expected in caught.value.expected


def test_a_private_key_is_not_repeated() -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse('ssh_keys = ["-----BEGIN OPENSSH PRIVATE KEY-----\\nb3BlbnNzaC1rZXk"]')
    assert "BEGIN" not in caught.value.message


def test_a_secret_in_the_place_of_its_file_is_not_repeated() -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse("credentials = { 'passwd.plaintext-password.root' = 'horse' }")
    assert caught.value.key == "guest.credentials.passwd.plaintext-password.root"
    assert "horse" not in caught.value.message


@pytest.mark.parametrize(
    "guest",
    [
        "",
        f"hostname = '{'a' * 63}'",
        "hostname = 'WEB-1.example.org'",
        f"ssh_keys = ['{KEY}', '{public_key('sk-ssh-ed25519@openssh.com', '')}', '{public_key(comment=' é: # x')}']",
        "user_data = '/srv/user data', network_config = '/srv/network'",
    ],
)
def test_a_good_value(guest: str) -> None:
    assert parse(guest).guest.by_cloud_init == bool(guest)


@pytest.mark.parametrize("guest", ["credentials = { 'a.b@c-d' = '/x' }", "ignition = '/a'"])
def test_what_needs_no_volume(guest: str) -> None:
    found = parse(guest)
    assert not found.guest.by_cloud_init
    assert not found.guest.is_empty
    assert placing.of_kind(placing.place(found), placing.SEED) == []


def test_the_files_that_it_names_are_checked_like_all_others() -> None:
    more = parse("credentials = { a = '/a', b = '/b' }, ignition = '/i'")
    assert model.paths(more)[1:] == [
        ("guest.credentials.a", "/a"), ("guest.credentials.b", "/b"), ("guest.ignition", "/i"),
    ]  # fmt: skip
    domain = parse("user_data = '/u', network_config = '/n'")
    assert model.paths(domain)[1:] == [("guest.user_data", "/u"), ("guest.network_config", "/n")]


# The volume


class Volume:
    """An ISO 9660 volume, read back by the field numbers of ECMA-119."""

    def __init__(self, data: bytes, sector: int) -> None:
        self.data = data
        self.descriptor = data[sector * 2048 :][:2048]
        self.encoding = "utf-16-be" if self.descriptor[88:91] == b"%/E" else "ascii"

    def number(self, offset: int, size: int, data: bytes | None = None) -> int:
        """One in both byte orders."""
        field = (self.descriptor if data is None else data)[offset : offset + 2 * size]
        assert field[:size] == field[:-size][::-1] or field[:size] == field[size:][::-1]
        return int.from_bytes(field[:size], "little")

    @property
    def label(self) -> str:
        return self.descriptor[40:72].decode(self.encoding).rstrip(" ")

    def files(self) -> dict[str, bytes]:
        """The files in the root directory, in its order."""
        root = self.descriptor[156:190]
        at, size = self.number(2, 4, root), self.number(10, 4, root)
        # The path tables have the root directory only.
        for order, field in (("<I", 140), (">I", 148)):
            (start,) = struct.unpack_from(order, self.descriptor, field)
            table = self.data[start * 2048 :][: self.number(132, 4)]
            assert struct.unpack_from(order, table, 2) == (at,)
        rest = self.data[at * 2048 :][:size]
        found = []
        while rest[0]:
            record, rest = rest[: rest[0]], rest[rest[0] :]
            assert len(record) % 2 == 0
            name = record[33 : 33 + record[32]]
            where, length = self.number(2, 4, record), self.number(10, 4, record)
            found.append((name, record[25], self.data[where * 2048 :][:length], where))
        assert [(name, flags, where) for name, flags, _, where in found[:2]] == [(b"\0", 2, at), (b"\1", 2, at)]
        assert not any(flags for _, flags, _, _ in found[2:])
        return {name.decode(self.encoding): content for name, _, content, _ in found[2:]}


def test_the_volume() -> None:
    files = {"user-data": b"x" * 5000, "meta-data": b"", "network-config": b"y" * 2048, "z": b"z"}
    data = iso9660.image("cidata", files)
    plain, joliet = Volume(data, 16), Volume(data, 17)
    assert (plain.descriptor[:7], joliet.descriptor[:7]) == (b"\1CD001\1", b"\2CD001\1")
    assert data[18 * 2048 :][:7] == b"\xffCD001\1"
    for volume in (plain, joliet):
        assert volume.label == "cidata"
        assert volume.number(80, 4) * 2048 == len(data)
        assert (volume.number(120, 2), volume.number(124, 2), volume.number(128, 2)) == (1, 1, 2048)
    assert joliet.files() == {f"{name};1": files[name] for name in sorted(files)}
    assert plain.files() == {f"{name.upper()}.;1": files[name] for name in sorted(files)}
    assert iso9660.image("cidata", dict(reversed(files.items()))) == data


def files_of(domain: model.Domain) -> dict[str, str]:
    """The files for cloud-init."""
    found = provisioning.contents(domain, UUID, "x")
    assert set(found) == {directory.SEED}
    volume = Volume(found[directory.SEED], 17)
    assert volume.label == "cidata"
    return {name.removesuffix(";1"): content.decode() for name, content in volume.files().items()}


def meta_data(text: str) -> dict[str, object]:
    """What is in it: texts, and one list of texts."""
    found: dict[str, object] = {}
    keys: list[str] = []
    for line in text.splitlines():
        if line.startswith("- "):
            keys.append(json.loads(line[2:]))
        else:
            name, _, value = line.partition(":")
            found[name] = json.loads(value) if value else keys
    return found


def test_a_host_name_and_keys() -> None:
    other = public_key(comment=' "quoted" \\ é: # x')
    found = files_of(parse(f"hostname = 'a.example.org', ssh_keys = ['{KEY}', '{other}']"))
    assert found["user-data"] == "#cloud-config\n"
    assert meta_data(found["meta-data"]) == {
        "instance-id": UUID,
        "local-hostname": "a.example.org",
        "public-keys": [KEY, other],
    }


@pytest.mark.parametrize(("name", "hostname"), [("web1", "web1"), ("web_1", None), ("1", "1"), ("a.b", "a.b")])
def test_without_a_host_name_it_is_the_domains(name: str, hostname: str | None) -> None:
    found = meta_data(files_of(parse(f"ssh_keys = ['{KEY}']", name=name))["meta-data"])
    assert found.get("local-hostname") == hostname


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "user").write_text("#!/bin/sh\n")
    (tmp_path / "network").write_text("version: 2\n")
    domain = parse(f"user_data = '{tmp_path}/user', network_config = '{tmp_path}/network'")
    found = files_of(domain)
    assert list(found) == ["meta-data", "network-config", "user-data"]
    assert (found["user-data"], found["network-config"]) == ("#!/bin/sh\n", "version: 2\n")


def test_credentials(tmp_path: Path) -> None:
    """One structure of the SMBIOS tables, with a string for each."""
    (tmp_path / "one").write_bytes(b"\0\xff" * 5)
    (tmp_path / "none").touch()
    domain = parse(f"credentials = {{ one = '{tmp_path}/one', 'b.c' = '{tmp_path}/none' }}")
    found = provisioning.contents(domain, UUID, "x")
    assert set(found) == {directory.SMBIOS}
    kind, length, _handle, count = struct.unpack_from("<BBHB", found[directory.SMBIOS])
    assert (kind, length, count) == (11, 5, 2)
    assert found[directory.SMBIOS][5:] == (
        b"io.systemd.credential.binary:one=AP8A/wD/AP8A/w==\0io.systemd.credential.binary:b.c=\0\0"
    )


def test_too_much_for_the_tables(tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(b"x" * (12 << 10))
    text = ", ".join(f"{name} = '{tmp_path}/half'" for name in "ab")
    assert len(provisioning.contents(parse(f"credentials = {{ {text} }}"), UUID, "x")[directory.SMBIOS]) < 1 << 16
    (tmp_path / "more").write_text("x")
    with pytest.raises(errors.InvalidDefinition, match=r"guest\.credentials: expected at most 24 KiB"):
        provisioning.contents(parse(f"credentials = {{ {text}, c = '{tmp_path}/more' }}"), UUID, "x")


def test_ignition(tmp_path: Path) -> None:
    (tmp_path / "a.ign").write_text("{}")
    assert provisioning.contents(parse(f"ignition = '{tmp_path}/a.ign'"), UUID, "x") == {directory.IGNITION: b"{}"}


def test_a_file_that_can_not_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "user"
    domain = parse(f"user_data = '{path}'")
    with pytest.raises(errors.InvalidDefinition, match=r"x: guest\.user_data: .* can't be read: No such file"):
        provisioning.contents(domain, UUID, "x")
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(errors.InvalidDefinition, match="at most 1048576 are allowed"):
        provisioning.contents(domain, UUID, "x")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.InvalidDefinition, match="can't be read"):
        provisioning.contents(domain, UUID, "x")


# Its place


@pytest.mark.parametrize(("machine", "slot"), [("q35", 30), ("pc", 31), ("virt", 31), ("microvm", 0)])
def test_it_is_the_last_disk(machine: str, slot: int) -> None:
    kernel = 'boot = { kernel = "/k" }'
    without = parse("", f'machine = "{machine}"\nvnc = {{}}\n{kernel}')
    before = placing.place(without)
    after = placing.place(parse("hostname = 'a'", f'machine = "{machine}"\nvnc = {{}}\n{kernel}'), before)
    assert after[:-1] == before
    assert (after[-1].id, after[-1].slot) == ("seed0", slot)


# When it is there


GUEST = 'guest = { hostname = "a" }'


def seed(world: World) -> str:
    return directory.provided(world.paths.runtime("qemu", "web1"), directory.SEED)


@on_loop
async def test_it_is_there_while_the_guest_runs(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", more=GUEST)
        status, above = os.stat(seed(world)), os.stat(os.path.dirname(seed(world)))
        assert (stat.S_IMODE(status.st_mode), stat.S_IMODE(above.st_mode)) == (0o440, 0o750)
        assert status.st_uid == above.st_uid == os.geteuid()
        if os.geteuid() == 0:
            assert status.st_gid == above.st_gid == os.stat(world.paths.runtime("qemu", "web1")).st_gid != 0
        info = await host.domains.info("web1")
        assert info["guest"] == Provided(cloud_init=["meta-data", "user-data"], credentials=[], ignition=False)
        uuid = info["uuid"]
    async with world.daemon() as host:
        with open(seed(world), "rb") as file:
            assert uuid.encode() in file.read()
        await host.domains.stop("web1", by=ROOT)
        nothing_left(world)
        await host.domains.start("web1", by=ROOT)
        assert os.path.exists(seed(world))
        await host.domains.stop("web1", by=ROOT)
        # Another guest of that name has nothing of the kind.
        await world.run("web1")
        assert not os.path.exists(os.path.dirname(seed(world)))
        assert (await host.domains.info("web1"))["guest"] is None


@on_loop
async def test_what_is_given_is_on_no_command_line(world: World) -> None:
    secret = f"{world.paths.root}/secret"
    with open(secret, "w") as file:
        file.write("horse")
    more = f'guest = {{ credentials = {{ word = "{secret}" }}, ignition = "{secret}" }}'
    async with world.daemon() as host:
        await world.run("web1", more=more)
        place = directory.provided(world.paths.runtime("qemu", "web1"))
        assert sorted(os.listdir(place)) == ["ignition", "smbios"]
        argv = world.units.units["virtd-qemu-web1.service"].spec.argv
        assert f"file={place}/smbios" in argv
        assert f"name=opt/com.coreos/config,file={place}/ignition" in argv
        assert not [word for word in argv if "horse" in word or base64.b64encode(b"horse").decode() in word]
        found = (await host.domains.info("web1"))["guest"]
        assert found == Provided(cloud_init=[], credentials=["word"], ignition=True)


@on_loop
async def test_a_missing_file_stops_the_start_before_anything_is_there(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", more='guest = { user_data = "/nonexistent/user-data" }')
        with pytest.raises(errors.InvalidDefinition, match=r"guest\.user_data: no such file"):
            await host.domains.start("web1", by=ROOT)
        assert not world.runtime_left("web1")
        assert world.slots() == []


@on_loop
async def test_killed_around_its_making(cuts: Cuts) -> None:
    cuts.wanted = {f"write {directory.SEED}"}
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            async with world.daemon() as host:
                await world.define("web1", more=GUEST)
                await cuts.cut(world, host.domains.start("web1", by=ROOT))
            async with world.daemon() as host:
                await host.domains._guests.certain()
                if (await host.domains.info("web1"))["pid"] is None:
                    assert not world.runtime_left("web1")
                    assert world.slots() == []
                else:
                    assert os.path.exists(seed(world))
                    await host.domains.stop("web1", by=ROOT)
                    nothing_left(world)
                assert (await host.check_all(repair=False, by=ROOT)).differences == []
