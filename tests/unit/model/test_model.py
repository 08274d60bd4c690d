# SPDX-License-Identifier: LGPL-2.1-or-later
"""Definitions and settings: what is accepted, and how the rest is refused."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from virtd import errors
from virtd.model import document, domain, drives, naming, settings, size
from virtd.model.state import ALIVE, State, require

GOOD = 'name = "web1"\nmemory = "256M"\n[boot]\nkernel = "/boot/vmlinuz"\n'
UUID = "0123abcd-4567-89ab-cdef-0123456789ab"
# Where whatever makes the examples, or takes them, may have to wait for a CPU.
ON_A_BUSY_HOST = examples(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def wrong(text: str) -> errors.InvalidDefinition:
    with pytest.raises(errors.InvalidDefinition) as caught:
        domain.parse(text, "web1.toml")
    assert caught.value.file == "web1.toml"
    assert caught.value.message.startswith("web1.toml: ")
    return caught.value


def at(error: errors.InvalidDefinition) -> str:
    """The key. msgspec before 0.19 doesn't say which element of a list it was."""
    return error.key.replace("[...]", "[0]")


def test_the_smallest_definition_and_its_defaults() -> None:
    found = domain.parse(GOOD, "x")
    assert (found.name, found.memory_bytes, found.vcpus, found.autostart) == ("web1", 256 << 20, 1, False)
    assert (found.on_poweroff, found.on_reboot, found.on_crash) == ("stop", "reset", "stop")
    assert found.uuid is None


def test_a_full_definition() -> None:
    found = domain.parse(
        f"""
        name = "a"
        uuid = "{UUID.upper().replace("-", "")}"
        memory = 1073741824
        vcpus = 255
        machine = "pc-q35-7.2"
        cpu = "host,-avx2,+x2apic,pmu=off"
        autostart = true
        on_poweroff = "keep"
        on_reboot = "stop"
        on_crash = "restart"
        rng = false
        disk = [{{ path = "/a", format = "qcow2" }}, {{ path = "/b", readonly = true }}]
        cdrom = [{{ path = "/c.iso" }}]
        nic = [{{ mode = "user" }}, {{ mac = "52:54:00:AB:cd:ef" }}]
        [vnc]
        """,
        "x",
    )
    assert found.uuid == UUID
    assert found.memory_bytes == 1 << 30
    assert [disk.format for disk in found.disk] == ["qcow2", None]
    assert found.vnc is not None
    assert found.vnc.enabled


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("vcpus = '2'", "vcpus", "expected integer, got string"),
        ("vcpus = 0", "vcpus", "expected integer >= 1"),
        ("vcpus = 256", "vcpus", "expected integer <= 255"),
        ("vcpus = 1.5", "vcpus", "expected integer, got float"),
        ("autostart = 'yes'", "autostart", "expected boolean, got string"),
        ("autostart = 1", "autostart", "expected boolean, got integer"),
        ("machine = 35", "machine", "expected string, got integer"),
        ("cpu = true", "cpu", "expected string, got boolean"),
        ("uuid = 7", "uuid", "expected string, got integer"),
        ("rng = []", "rng", "expected boolean, got array"),
        ("on_crash = 'burn'", "on_crash", 'expected one of "stop", "keep", "restart", got \'burn\''),
        ("on_reboot = 1", "on_reboot", "expected string, got integer"),
        ("on_poweroff = ''", "on_poweroff", 'expected one of "stop", "keep", got \'\''),
        ("disk = 'web1.qcow2'", "disk", "expected array, got string"),
        ("disk = [ 'web1.qcow2' ]", "disk[0]", "expected table, got string"),
        ("disk = [ { path = 7 } ]", "disk[0].path", "expected string, got integer"),
        (
            "disk = [ { path = '/a', format = 'vmdk' } ]",
            "disk[0].format",
            'expected one of "raw", "qcow2", got \'vmdk\'',
        ),
        ("disk = [ { path = '/a', readonly = 'no' } ]", "disk[0].readonly", "expected boolean, got string"),
        ("disk = [ { format = 'raw' } ]", "disk[0]", "expected path, or pool and volume"),
        (
            "disk = [ { path = '/a', bus = 'ide' } ]",
            "disk[0].bus",
            'expected one of "virtio", "scsi", "sata", "nvme", got \'ide\'',
        ),
        (
            "disk = [ { path = '/a', cache = 'fast' } ]",
            "disk[0].cache",
            'expected one of "none", "writeback", "writethrough", "directsync", "unsafe", got',
        ),
        ("disk = [ { path = '/a', discard = true } ]", "disk[0].discard", "expected string, got boolean"),
        ("disk = [ { path = '/a', discard = 'on' } ]", "disk[0].discard", 'expected one of "unmap", "ignore", got'),
        ("disk = [ { path = '/a', detect_zeroes = true } ]", "disk[0].detect_zeroes", "expected string, got boolean"),
        (
            "disk = [ { path = '/a', aio = 'posix' } ]",
            "disk[0].aio",
            'expected one of "threads", "native", "io_uring"',
        ),
        ("disk = [ { path = '/a', shared = 1 } ]", "disk[0].shared", "expected boolean, got integer"),
        ("disk = [ { path = '/a', iothread = 'yes' } ]", "disk[0].iothread", "expected boolean, got string"),
        ("disk = [ { path = '/a', serial = 7 } ]", "disk[0].serial", "expected string, got integer"),
        ("disk = [ { path = '/a', boot = 0 } ]", "disk[0].boot", "expected integer >= 1"),
        ("disk = [ { path = '/a', boot = true } ]", "disk[0].boot", "expected integer, got boolean"),
        ("cdrom = [ { path = '/c', boot = '1' } ]", "cdrom[0].boot", "expected integer, got string"),
        ("nic = [ { mode = 1 } ]", "nic[0].mode", "expected string, got integer"),
        ("nic = [ { mac = 1 } ]", "nic[0].mac", "expected string, got integer"),
        ("vnc = true", "vnc", "expected table, got boolean"),
        ("vnc = { enabled = 'no' }", "vnc.enabled", "expected boolean, got string"),
        ("tpm = true", "tpm", "expected table, got boolean"),
        ("tpm = { model = 'fifo' }", "tpm.model", 'expected one of "crb", "tis", got \'fifo\''),
        ("machine = 'microvm'\ntpm = {}", "tpm", "expected none: virtd has no TPM for microvm"),
        ("machine = 'virt'\ntpm = { model = 'crb' }", "tpm.model", 'expected "tis"'),
        # Right in type, wrong in content.
        ("uuid = ''", "uuid", "expected a UUID"),
        ("uuid = 'web1'", "uuid", "expected a UUID"),
        (f"uuid = '{UUID}0'", "uuid", "expected a UUID"),
        ("uuid = 'urn:" + UUID.replace("-", "") + "'", "uuid", "expected a UUID"),
        ("uuid = '1_1_1_1_1_1_1_1_1_1_1_1_1_1_1_11'", "uuid", "expected a UUID"),
        ("machine = 'q35,accel=tcg'", "machine", "expected a QEMU machine type"),
        ("machine = ''", "machine", "expected a QEMU machine type"),
        ("cpu = 'host -machine none'", "cpu", "expected a CPU model"),
        ("nic = [ { mode = 'bridge' } ]", "nic[0].mode", 'expected "user", got "bridge"'),
        ("nic = [ { mode = 'user', network = 'lab' } ]", "nic[0].mode", "expected no mode, since network is given"),
        ("nic = [ { trusted = true } ]", "nic[0].trusted", "expected nothing here, since there is no network"),
        ("nic = [ { network = 'a/b' } ]", "nic[0].network", "expected the name of a network"),
        ("nic = [ { mac = '52:54:00:12:34' } ]", "nic[0].mac", "expected a unicast address"),
        ("nic = [ { mac = '53:54:00:12:34:56' } ]", "nic[0].mac", "expected a unicast address"),
        ("nic = [ { mac = '52:54:00:12:34:56,x=y' } ]", "nic[0].mac", "expected a unicast address"),
        (
            "nic = [ { mac = '52:54:00:12:34:56' }, {}, { mac = '52:54:00:12:34:56' } ]",
            "nic[2].mac",
            "nic[0] already",
        ),
        ("disk = [ { path = 'web1.qcow2' } ]", "disk[0].path", "expected an absolute path"),
        ("disk = [ { path = '' } ]", "disk[0].path", "expected an absolute path"),
        ("disk = [ { path = '/a/../etc/shadow' } ]", "disk[0].path", "expected a path without '..'"),
        ("disk = [ { path = '/a/..' } ]", "disk[0].path", "expected a path without '..'"),
        ('disk = [ { path = "/a\\nb" } ]', "disk[0].path", "expected an absolute path"),
        ('disk = [ { path = "/a\\u0000b" } ]', "disk[0].path", "expected an absolute path"),
        (
            "disk = [ { path = '/a' }, { path = '/b' }, { path = '/a' } ]",
            "disk[2].path",
            "/a is disk[0].path already",
        ),
        ("disk = [ { path = '/boot/vmlinuz' } ]", "disk[0].path", "is boot.kernel already"),
        (
            "machine = 'pc'\ndisk = [ { path = '/a', bus = 'sata' } ]",
            "disk[0].bus",
            'expected "virtio", "scsi" or "nvme", which is what virtd has for pc',
        ),
        ("machine = 'pc-i440fx-9.0'\ndisk = [ { path = '/a', bus = 'sata' } ]", "disk[0].bus", 'expected "virtio",'),
        ("machine = 'virt-9.1'\ndisk = [ { path = '/a', bus = 'sata' } ]", "disk[0].bus", 'expected "virtio",'),
        (
            "machine = 'microvm'\ndisk = [ { path = '/a' }, { path = '/b', bus = 'sata' } ]",
            "disk[1].bus",
            'expected "virtio", which is what virtd has for microvm',
        ),
        ("machine = 'microvm'\ndisk = [ { path = '/a', bus = 'nvme' } ]", "disk[0].bus", 'expected "virtio",'),
        ("disk = [ { path = '/a', bus = 'sata', readonly = true } ]", "disk[0].readonly", "expected false"),
        ("disk = [ { path = '/a', serial = '' } ]", "disk[0].serial", "expected 1 to 20 letters"),
        ("disk = [ { path = '/a', serial = 'a,b=c' } ]", "disk[0].serial", "expected 1 to 20 letters"),
        ("disk = [ { path = '/a', serial = 'a b' } ]", "disk[0].serial", "expected 1 to 20 letters"),
        ("disk = [ { path = '/a', serial = 'ü' } ]", "disk[0].serial", "expected 1 to 20 letters"),
        (f"disk = [ {{ path = '/a', serial = '{'x' * 21}' }} ]", "disk[0].serial", "expected 1 to 20"),
        (f"disk = [ {{ path = '/a', bus = 'scsi', serial = '{'x' * 21}' }} ]", "disk[0].serial", "expected 1 to 20"),
        (
            "disk = [ { path = '/a', aio = 'io_uring' } ]",
            "disk[0].aio",
            'expected "threads" or "native": what is done',
        ),
        ("disk = [ { path = '/a', aio = 'native' } ]", "disk[0].aio", 'expected cache = "none" or "directsync"'),
        (
            "disk = [ { path = '/a', aio = 'native', cache = 'unsafe' } ]",
            "disk[0].aio",
            'expected cache = "none" or "directsync"',
        ),
        (
            "disk = [ { path = '/a', detect_zeroes = 'unmap', discard = 'ignore' } ]",
            "disk[0].detect_zeroes",
            'expected discard = "unmap"',
        ),
        (
            "disk = [ { path = '/a', shared = true, readonly = true } ]",
            "disk[0].shared",
            "expected false: several guests",
        ),
        ("disk = [ { path = '/a', shared = true, format = 'qcow2' } ]", "disk[0].shared", 'expected format = "raw"'),
        (
            "disk = [ { path = '/a', bus = 'sata', iothread = true } ]",
            "disk[0].iothread",
            "expected false: only virtio",
        ),
        (
            "disk = [ { path = '/a', bus = 'nvme', iothread = true } ]",
            "disk[0].iothread",
            "expected false: only virtio",
        ),
        (
            "disk = [ { path = '/a', serial = 'S' }, { path = '/b', bus = 'nvme', serial = 'S' } ]",
            "disk[1].serial",
            "S is disk[0] already",
        ),
        ("cdrom = [ { bus = 'ide' } ]", "cdrom[0].bus", 'expected one of "sata", "scsi", got'),
        (
            "machine = 'pc'\ncdrom = [ { bus = 'sata' } ]",
            "cdrom[0].bus",
            "expected another one or none: pc has no sata",
        ),
        ("machine = 'microvm'\ncdrom = [ { bus = 'scsi' } ]", "cdrom[0].bus", "microvm has no scsi"),
        ("machine = 'virt'\ncdrom = [ { bus = 'scsi' }, {} ]", "cdrom[1].path", "expected a path: with virt"),
        ("cdrom = [ { path = 'x.iso' } ]", "cdrom[0].path", "expected an absolute path"),
    ],
)
def test_a_wrong_value(line: str, key: str, expected: str) -> None:
    error = wrong(line + "\n" + GOOD)
    assert at(error) == key
    assert expected in error.expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-web1",
        ".web1",
        "..",
        "web/1",
        "a:b",
        "web 1",
        "wéb",
        "web1\\n",
        "w" * 65,
        "w" * 300,
        "a,b",
        "%i",
        "a\\u0000",
    ],
)
def test_a_name_that_can_be_none(name: str) -> None:
    error = wrong(GOOD.replace("web1", name))
    assert error.key == "name"
    assert "1 to 64 letters" in error.expected
    # However long it is, the message stays readable.
    assert len(error.message) < 220


@pytest.mark.parametrize("name", ["a", "_", "9", "web-1.example_org", "w" * 64])
def test_a_good_name(name: str) -> None:
    assert domain.parse(GOOD.replace("web1", name), "x").name == name


@pytest.mark.parametrize(
    "memory",
    [
        "0",
        "-1",
        '"0"',
        '"-5M"',
        '"10T"',
        '"10TiB"',
        "10995116277760",
        '"much"',
        '""',
        '"1.5G"',
        '"١G"',
        '"999999999P"',
        "1023",
    ],
)
def test_memory_that_makes_no_sense(memory: str) -> None:
    error = wrong(GOOD.replace('"256M"', memory))
    assert error.key == "memory"
    assert error.expected.startswith("expected ")
    assert memory.strip('"') in error.expected


@pytest.mark.parametrize("memory", ["true", "1.5", "[1]", "1979-05-27"])
def test_memory_of_a_wrong_type(memory: str) -> None:
    assert wrong(GOOD.replace('"256M"', memory)).key == "memory"


@pytest.mark.parametrize(
    ("line", "key", "hint"),
    [
        ("memroy = 1", "memroy", "Did you mean memory?"),
        ("zzz = 1", "zzz", "Keys here: name, memory, uuid"),
        ("disk = [ { path = '/a', fromat = 'raw' } ]", "disk[0].fromat", "Did you mean format?"),
        ("nic = [ { address = 1 } ]", "nic[0].address", "Keys here: mode, network, mac"),
        ("vnc = { enable = true }", "vnc.enable", "Did you mean enabled?"),
        ("tpm = { version = '1.2' }", "tpm.version", "Keys here: model."),
    ],
)
def test_an_unknown_key(line: str, key: str, hint: str) -> None:
    error = wrong(line + "\n" + GOOD)
    assert (at(error), error.expected) == (key, "unknown key")
    assert str(error.hint).startswith(hint)


def test_an_unknown_key_in_a_table() -> None:
    error = wrong(GOOD + 'cmdlime = "x"\n')
    assert (error.key, error.hint) == ("boot.cmdlime", "Did you mean cmdline?")


@pytest.mark.parametrize(("missing", "key"), [('name = "web1"\n', "name"), ('memory = "256M"\n', "memory")])
def test_a_missing_key(missing: str, key: str) -> None:
    error = wrong(GOOD.replace(missing, ""))
    assert (error.key, error.expected) == (key, "expected this key, which is missing")


@pytest.mark.parametrize(
    ("boot", "key"),
    [
        ('[boot]\ninitrd = "/i"', "boot.kernel"),
        ('[boot]\ncmdline = "quiet"', "boot.kernel"),
        ("", "boot.kernel"),
        ('[boot]\nkernel = "vmlinuz"', "boot.kernel"),
        ('[boot]\nkernel = "/k"\ninitrd = "../i"', "boot.initrd"),
        ('[boot]\nkernel = "/k"\ncmdline = "a\\nb"', "boot.cmdline"),
        (f'[boot]\nkernel = "/k"\ncmdline = "{"a" * 2048}"', "boot.cmdline"),
    ],
)
def test_a_boot_that_makes_no_sense(boot: str, key: str) -> None:
    assert wrong(f'name = "a"\nmemory = "1G"\n{boot}\n').key == key


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ('boot = { kernel = "/k" }\ndisk = [{ path = "/a", boot = 1 }]', "disk[0].boot", "expected nothing here"),
        ('boot = { kernel = "/k" }\nnic = [{}, { boot = 1 }]', "nic[1].boot", "expected nothing here"),
        (
            'disk = [{ path = "/a", boot = 2 }, { path = "/b" }]\ncdrom = [{ boot = 2 }]',
            "cdrom[0].boot",
            "expected another number, since 2 is the turn of disk[0] already",
        ),
        (
            'disk = [{ path = "/a", boot = 7 }]\nnic = [{}, { boot = 7 }]',
            "nic[1].boot",
            "the turn of disk[0] already",
        ),
        ("nic = [{}]", "boot.kernel", "expected a kernel, a [[disk]], a [[cdrom]] or a [[nic]] with boot"),
    ],
)
def test_a_boot_order_that_makes_no_sense(text: str, key: str, expected: str) -> None:
    error = wrong(f'name = "a"\nmemory = "1G"\n{text}\n')
    assert error.key == key
    assert expected in error.expected


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ('disk = [{ path = "/a" }, { path = "/b" }]\ncdrom = [{}]\nnic = [{}]', ["disk[0]", "disk[1]", "cdrom[0]"]),
        (
            'disk = [{ path = "/a" }, { path = "/b", boot = 9 }]\ncdrom = [{ boot = 2 }]\nnic = [{ boot = 8 }, {}]',
            ["cdrom[0]", "nic[0]", "disk[1]", "disk[0]"],
        ),
        ("nic = [{ boot = 1 }]", ["nic[0]"]),
        ('boot = { kernel = "/k" }\ndisk = [{ path = "/a" }]', []),
    ],
)
def test_the_boot_order(text: str, order: list[str]) -> None:
    assert domain.boot_order(domain.parse(f'name = "a"\nmemory = "1G"\n{text}\n', "x")) == order


@pytest.mark.parametrize(
    "text", ["name = ", "= 1", "name = 'a'\nname = 'b'", "\0", "[[[[", "a" * (document.LIMIT + 1)]
)
def test_what_is_no_toml(text: str) -> None:
    error = wrong(text)
    assert error.key == ""
    assert error.expected.startswith("expected ")
    assert len(error.message) < 300


@ON_A_BUSY_HOST
@given(st.text(max_size=300))
def test_any_text_is_taken_or_explained(text: str) -> None:
    with contextlib.suppress(errors.InvalidDefinition):
        domain.parse(text, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@ON_A_BUSY_HOST
@given(st.sampled_from(domain.Domain.__struct_fields__), JSON)
def test_any_value_of_any_key_is_taken_or_explained(key: str, value: Any) -> None:
    """Without TOML's syntax in between, so that values arrive that nobody would think of writing."""
    table: dict[str, Any] = {"name": "a", "memory": "1G", "boot": {"kernel": "/k"}} | {key: value}
    key_of = ""
    try:
        domain.check(msgspec.convert(table, domain.Domain), "x")
    except msgspec.ValidationError as exc:
        key_of = document._explain(exc, "x", domain.Domain).key
    except errors.InvalidDefinition as exc:
        key_of = exc.key
    assert key_of.startswith((key, "boot")) or not key_of


NAMES = st.from_regex(naming.NAME, fullmatch=True)
PATHS = st.lists(st.from_regex(r"[a-z0-9 ,=]{1,8}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)


@ON_A_BUSY_HOST
@given(
    st.builds(
        domain.Domain,
        name=NAMES,
        memory=st.integers(domain.MEMORY_MIN, domain.MEMORY_MAX) | st.sampled_from(["1M", "4T", "512 MiB"]),
        uuid=st.none() | st.uuids().map(str),
        vcpus=st.integers(1, domain.VCPUS_MAX),
        autostart=st.booleans(),
        boot=st.builds(
            domain.Boot, kernel=st.just("/k"), cmdline=st.from_regex(r"[a-z0-9 =.,\"]{0,40}", fullmatch=True)
        ),
        disk=st.lists(
            st.builds(
                drives.Disk, path=PATHS, format=st.sampled_from(drives.Format), bus=st.sampled_from(drives.Bus)
            ),
            unique_by=lambda d: d.path,
        )
        .filter(lambda disks: all(disk.path != "/k" for disk in disks))
        .map(tuple),
    )
)
def test_what_is_written_down_is_read_again(wanted: domain.Domain) -> None:
    domain.check(wanted, "x")
    assert domain.parse(to_toml(msgspec.to_builtins(wanted)), "x") == wanted


def to_toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {value(item)}\n" for key, item in table.items())


def value(item: Any) -> str:
    match item:
        case dict():
            return "{" + ", ".join(f"{key} = {value(inner)}" for key, inner in item.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(value, item)) + "]"
        case _:
            return msgspec.json.encode(item).decode()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("256M", 256 << 20),
        ("1k", 1024),
        ("512MiB", 512 << 20),
        (" 2 GB ", 2 << 30),
        ("7", 7),
        (7, 7),
        ("3P", 3 << 50),
    ],
)
def test_a_size(text: str | int, number: int) -> None:
    assert size.parse(text) == number


@pytest.mark.parametrize("text", ["", "M", "1X", "1MM", "-1", "+1", "1 000", "0x10", "1e3", "1" * 19, -1, True])
def test_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(text))}$"):
        size.parse(text)


@ON_A_BUSY_HOST
@given(st.integers(0, 1 << 59))
def test_sizes_are_shown_so_that_they_are_read(number: int) -> None:
    assert size.parse(size.show(number)) == number


def test_canonical_uuid() -> None:
    assert naming.canonical_uuid(UUID.upper()) == UUID
    assert naming.canonical_uuid(UUID.replace("-", "")) == UUID
    for text in ("", "web1", "{" + UUID + "}", UUID[:-1], UUID.replace("-", "", 1), " " + UUID[1:]):
        assert naming.canonical_uuid(text) is None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[log]\nmax_size = 'big'", "log.max_size"),
        ("[log]\nmax_size = 0", "log.max_size"),
        ("[log]\nmax_size = '63K'", "log.max_size"),
        ("[log]\nbackups = -1", "log.backups"),
        ("[log]\nbackup = 1", "log.backup"),
        ("[qemu]\nbinary = 'qemu'", "qemu.binary"),
        ("[qemu]\nstart_timeout = 0", "qemu.start_timeout"),
        ("[qemu]\nshutdown_timeout = '1m'", "qemu.shutdown_timeout"),
        ("[quemu]", "quemu"),
        ("log = 1", "log"),
    ],
)
def test_wrong_settings(text: str, key: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        settings.parse(text, "virtd.toml")
    assert caught.value.key == key


def test_settings() -> None:
    assert settings.parse("", "x") == settings.Settings()
    found = settings.parse("[log]\nmax_size = '1M'\nbackups = 0\n[qemu]\nshutdown_timeout = 5", "x")
    assert (found.log.max_bytes, found.log.backups, found.qemu.shutdown_timeout) == (1 << 20, 0, 5)


def test_a_state_of_a_newer_version_counts_as_running() -> None:
    assert State.of("migrating") is State.RUNNING
    assert all(State.of(state.value) is state for state in State)


@pytest.mark.parametrize(
    ("operation", "allowed"),
    [
        ("shut down", {"running", "stopping"}),
        ("reboot", {"running"}),
        ("suspend", {"running", "stopping", "paused"}),
        ("resume", {"running", "stopping", "paused"}),
        ("send a signal to", {"starting", "running", "stopping", "paused"}),
        ("attach to the console of", {"starting", "running", "stopping", "paused"}),
        ("undefine", {"stopped", "crashed"}),
    ],
)
def test_which_operation_makes_sense_when(operation: str, allowed: set[str]) -> None:
    for state in State:
        if state.value in allowed:
            require(operation, "web1", state)
            continue
        with pytest.raises(errors.InvalidState, match=f"Cannot {operation} web1: it is {state}") as caught:
            require(operation, "web1", state)
        # A hint that leads out of it.
        assert "virtdctl" in str(caught.value.hint)
        assert ("start" in str(caught.value.hint)) == (state not in ALIVE)


def test_errors_cross_the_wire_whole() -> None:
    for kind, cls in errors.KINDS.items():
        fields = {"message": "m", "hint": "h"} | {key: key * 2 for key in cls.details}
        error = errors.from_wire(kind, fields)
        assert type(error) is cls
        assert error.fields() == fields
        assert str(error) == "m"
    assert type(errors.from_wire("OfTomorrow", {})) is errors.VirtdError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (".".join("a" * 50_000) + " = 1", "keys of at most 128 parts"),
        ("[" + " . ".join(["'a'"] * 50_000) + "]", "keys of at most 128 parts"),
        ("a = " + "1" * 500_000, "integers of at most 64 bits"),
        ("a = 0x" + "f" * 500_000, "integers of at most 64 bits"),
        ("a = " + "[" * 100_000, "nested as deeply"),
        ("a = " + "{a=" * 100_000, "nested as deeply"),
        ("x" * (2 << 20), "at most 1 MiB, got 2097152 bytes"),
    ],
)
def test_texts_that_cost_too_much(text: str, said: str) -> None:
    with pytest.raises(errors.InvalidDefinition, match=said) as caught:
        domain.parse(text, "web1.toml")
    assert len(caught.value.message) < 200


def test_a_byte_order_mark_means_nothing() -> None:
    assert domain.parse(f"\ufeff{GOOD}", "web1.toml").name == "web1"
