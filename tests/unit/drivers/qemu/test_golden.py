# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dozen definitions come to: QEMU's arguments and the unit's settings, kept in golden/.

A change there is a change of hardware, or of the sandbox, for guests that there are. To renew the files, and see in
the diff what has become of them:

    VIRTD_GOLDEN=renew .venv/bin/python -m pytest tests/unit/drivers/qemu/test_golden.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virtd.children.hardening import HARDENED, Property
from virtd.drivers.qemu import command, images, nics, prerequisites, sandbox, tpmunit
from virtd.drivers.qemu.devices import assembly, placing
from virtd.drivers.qemu.devices.flash import Flash
from virtd.drivers.qemu.hardware import Build
from virtd.model import domain as model
from virtd.model.drives import Format

HERE = Path(__file__).parent / "golden"
TOPLEVEL = ["bin", "boot", "dev", "etc", "home", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var"]
# What a pool's driver would tell of its volumes.
VOLUMES = {
    ("images", "root"): images.Image(
        "/srv/images/root", Format.QCOW2, backing=(("/srv/images/base", Format.RAW),), after="srv-images.mount"
    ),
    ("vg0", "data"): images.Image("/dev/vg0/data"),
}
UEFI = Build("/usr/share/OVMF/CODE.secboot.fd", "raw", "/usr/share/OVMF/VARS.ms.fd", "raw", secure=True, smm=True)


def outcome(domain: model.Domain) -> str:
    assert domain.uuid is not None
    runtime = f"/run/virtd/qemu/{domain.name}"
    taps = {nic.index: nic.interface for nic in nics.plan(domain, domain.uuid, placing.place(domain))}
    flash = None
    if domain.boot.firmware is model.Firmware.UEFI:
        flash = Flash(build=UEFI, store=f"/var/lib/virtd/qemu/{domain.name}/{domain.uuid}.secure.fd")
    host = command.HostFacts("/usr/bin/qemu-system-x86_64", kvm=False, runtime=runtime, flash=flash, taps=taps)
    disks = [VOLUMES.get((image.pool, image.volume), image) for image in images.plain(domain)]
    devices = assembly.assemble(domain, domain.uuid, host, disks)
    arguments = command.argv(domain, domain.uuid, host, devices)
    properties = sandbox.properties(
        domain,
        runtime,
        toplevel=TOPLEVEL,
        devices=prerequisites.devices(kvm=False, tap=bool(taps), vhost=False),
        stop_after=60,
        has=devices,
        memory_overhead=0,
    )
    lines = [*arguments, "", *shown(properties)]
    if domain.tpm is not None:
        state = f"/var/lib/virtd/qemu/{domain.name}/{domain.uuid}.tpm"
        lines += ["", *tpmunit.argv("/usr/bin/swtpm", state), "", *shown(tpmunit.properties(state, TOPLEVEL, 257))]
    return "\n".join(lines) + "\n"


def shown(properties: list[Property]) -> list[str]:
    return [f"{name} {value!r}" for name, kind, value in properties if (name, kind, value) not in HARDENED]


@pytest.mark.parametrize("definition", sorted(HERE.glob("*.toml")), ids=lambda path: path.stem)
def test_as_in_the_golden_file(definition: Path) -> None:
    golden = definition.with_suffix(".args")
    found = outcome(model.parse(definition.read_text(), str(definition)))
    if os.environ.get("VIRTD_GOLDEN") == "renew":
        golden.write_text(found)
    assert found == golden.read_text()


def test_there_are_a_dozen() -> None:
    assert len(list(HERE.glob("*.toml"))) >= 12
    assert {path.stem for path in HERE.glob("*.args")} == {path.stem for path in HERE.glob("*.toml")}
