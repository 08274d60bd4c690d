# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which build of UEFI a guest gets, and its variable store."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from virtd import errors
from virtd.drivers.qemu import firmware, hardware
from virtd.drivers.qemu.devices.flash import Flash
from virtd.drivers.qemu.hardware import Build
from virtd.model import domain as model

if TYPE_CHECKING:
    from pathlib import Path

UUID = "0123abcd-4567-89ab-cdef-0123456789ab"
UEFI = 'name = "a"\nmemory = "64M"\nboot = { firmware = "uefi" }\ndisk = [{ path = "/a" }]\n'
SECURE = UEFI.replace('"uefi"', '"uefi", secure_boot = true')


class Host:
    """Two directories of descriptors, the first before the second, and files that they name."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top
        (top / "etc").mkdir()
        (top / "usr").mkdir()
        monkeypatch.setattr(firmware, "PLACES", (f"{top}/etc", f"{top}/usr"))

    def describe(self, name: str, *features: str, there: bool = True, **other: Any) -> None:
        program, template = (self.top / f"{name}.{what}" for what in ("code", "vars"))
        if there:
            program.write_bytes(b"code" * 16)
            template.write_bytes(name.encode() * 16)
        mapping = {
            "device": "flash",
            "executable": {"filename": str(program), "format": "raw"},
            "nvram-template": {"filename": str(template), "format": "raw"},
        }
        target = {"architecture": "x86_64", "machines": ["pc-q35-*"]}
        said = {"description": name, "interface-types": ["uefi"], "mapping": mapping, "targets": [target], "tags": []}
        (self.top / "usr" / f"{name}.json").write_text(json.dumps(said | {"features": features} | other))

    def found(self, machine: str = "q35", *, secure: bool = False) -> str:
        build = firmware.find(machine, "a.toml", secure=secure)
        assert (build.secure, build.template) == (secure, build.program.replace(".code", ".vars"))
        return build.program.rpartition("/")[2].removesuffix(".code") + ("+smm" if build.smm else "")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": "x86_64"}))
    return Host(tmp_path, monkeypatch)


def test_the_first_that_fits(host: Host) -> None:
    host.describe("10-bios", there=True, **{"interface-types": ["bios"]})
    host.describe("20-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    host.describe("30-gone", there=False)
    host.describe("40-memory", mapping={"device": "memory", "filename": "/x"})
    host.describe("41-stateless", mapping={"device": "flash", "mode": "stateless", "executable": {"filename": "/x"}})
    host.describe("50-keys", "secure-boot", "enrolled-keys", "requires-smm")
    host.describe("51-other-keys", "enrolled-keys")
    host.describe("60-plain", "secure-boot", "requires-smm")
    host.describe("70-later")
    assert host.found() == host.found("pc-q35-10.0") == "60-plain+smm"
    assert host.found(secure=True) == "50-keys+smm"


def test_a_description_in_etc_hides_the_same_name_in_usr(host: Host) -> None:
    host.describe("50-a")
    host.describe("60-b")
    (host.top / "etc" / "50-a.json").write_text("")
    assert host.found() == "60-b"


@pytest.mark.parametrize("text", ["{", "[]", '{"mapping": 1}', "[" * 50000, "\0", "x" * 70000])
def test_one_that_is_not_understood_costs_no_other(host: Host, text: str) -> None:
    (host.top / "etc" / "10-odd.json").write_text(text)
    (host.top / "etc" / "11-directory.json").mkdir()
    host.describe("60-b")
    assert host.found() == "60-b"


@pytest.mark.parametrize(
    ("machine", "secure", "key", "hint"),
    [
        ("q35", True, "boot.secure_boot", "ovmf"),
        ("pc", False, "boot.firmware", "ovmf"),
        ("pc-q35-10.0", True, "boot.secure_boot", "ovmf"),
        ("pc-i440fx-10.0", True, "boot.secure_boot", 'machine = "q35"'),
    ],
)
def test_none_that_fits(host: Host, machine: str, secure: bool, key: str, hint: str) -> None:
    host.describe("60-plain")
    with pytest.raises(errors.InvalidDefinition, match="isn't installed") as caught:
        host.found(machine, secure=secure)
    assert key in str(caught.value)
    assert hint in str(caught.value.hint)


def choose(text: str, before: hardware.Hardware | None) -> hardware.Hardware:
    domain = model.parse(text, "a.toml")
    mine = hardware.assign(before, domain, UUID, kvm=False)
    return msgspec.structs.replace(mine, firmware=firmware.choose(mine, domain, "a.toml"))


def test_a_guest_keeps_its_build(host: Host) -> None:
    host.describe("60-old")
    host.describe("70-keys", "secure-boot", "enrolled-keys")
    first = choose(UEFI, None)
    record = msgspec.json.decode(msgspec.json.encode(first), type=hardware.Hardware)
    host.describe("50-new")
    assert choose(UEFI, record) == first
    new = choose(UEFI, msgspec.structs.replace(record, renew=True)).firmware
    assert new is not None
    assert new.program.endswith("50-new.code")
    keys = choose(SECURE, record).firmware
    assert keys is not None
    assert keys.program.endswith("70-keys.code")
    assert choose(UEFI, msgspec.structs.replace(record, firmware=keys)).firmware == new
    (host.top / "60-old.code").unlink()
    assert choose(UEFI, record).firmware == new


def test_another_machine_gets_a_build_for_it(host: Host) -> None:
    host.describe("50-q35", "requires-smm")
    host.describe("60-pc", targets=[{"architecture": "x86_64", "machines": ["pc-i440fx-*"]}])
    record = msgspec.structs.replace(choose(UEFI, None), type="pc-q35-10.0", model="max")
    assert record.firmware is not None
    assert record.firmware.smm
    found = choose(f'machine = "pc"\n{UEFI}', record).firmware
    assert found is not None
    assert found.program.endswith("60-pc.code")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_build_that_can_use_the_variables_is_preferred(host: Host, kind: str) -> None:
    """A person who asks for newer hardware doesn't ask for a guest that can't be started."""
    host.describe("50-larger")
    host.describe("60-old")
    (host.top / "50-larger.vars").write_bytes(b"larger" * 100)
    descriptor = host.top / "usr" / "50-larger.json"
    descriptor.write_text(descriptor.read_text().replace('"raw"', f'"{kind}"'))
    store = host.top / "store"
    domain = model.parse(UEFI, "a.toml")
    renewed = hardware.assign(None, domain, UUID, kvm=False)

    def chosen() -> Build:
        return firmware.choose(renewed, domain, "a.toml", str(store))

    assert chosen().program.endswith("50-larger.code")
    store.write_bytes(b"old" * 100)
    assert chosen().program.endswith("50-larger.code"), "none can, so the first one says why"
    with pytest.raises(errors.HostError, match="belongs to another build"):
        firmware.prepare(Flash(build=chosen(), store=str(store)))
    store.write_bytes(b"6-old!" * 16)
    assert chosen().program.endswith("60-old.code")


def test_a_qcow2_store_that_names_another_file_is_refused(tmp_path: Path) -> None:
    """One that was raw until now has what the guest wrote, which may be such a header."""
    store, template = tmp_path / "store", tmp_path / "template"
    template.write_bytes(b"")
    flash = Flash(build=Build("/code", "qcow2", str(template), "qcow2"), store=str(store))
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0)
    store.write_bytes(head + struct.pack(">QQQII", 0, 0, 0, 4, 104))
    firmware.prepare(flash)
    store.write_bytes(head + struct.pack(">QQQII", 1 << 2, 0, 0, 4, 104))
    with pytest.raises(errors.HostError, match="can't be used by /code"):
        firmware.prepare(flash)


def test_the_store_is_made_once(tmp_path: Path) -> None:
    template, store = tmp_path / "template", tmp_path / "a" / "store.fd"
    template.write_bytes(b"new" * 100)
    build = Build("/code", "raw", str(template), "raw")
    firmware.prepare(Flash(build=build, store=str(store)))
    assert store.read_bytes() == template.read_bytes()
    assert store.stat().st_mode & 0o777 == 0o600
    store.write_bytes(b"own" * 100)
    firmware.prepare(Flash(build=build, store=str(store)))
    assert store.read_bytes() == b"own" * 100
    template.write_bytes(b"larger" * 100)
    with pytest.raises(errors.HostError, match="belongs to another build"):
        firmware.prepare(Flash(build=build, store=str(store)))
    template.unlink()
    firmware.prepare(Flash(build=build, store=str(store)))
    assert store.read_bytes() == b"own" * 100


def test_a_template_that_is_gone(tmp_path: Path) -> None:
    store = tmp_path / "a" / "store.fd"
    with pytest.raises(errors.HostError, match="Cannot make"):
        firmware.prepare(Flash(build=Build("/code", "raw", f"{tmp_path}/none", "raw"), store=str(store)))
    assert not store.exists()


def test_secure_boot_needs_uefi() -> None:
    with pytest.raises(errors.InvalidDefinition, match=r"boot\.secure_boot"):
        model.parse(UEFI.replace('firmware = "uefi"', "secure_boot = true"), "a.toml")
