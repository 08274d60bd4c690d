# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest sees of its machine stays: which device is which, where it sits, and what the machine is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd import errors, files
from virtd.drivers.qemu import command, hardware
from virtd.drivers.qemu.devices import assembly, placing
from virtd.drivers.qemu.hardware import Hardware
from virtd.model import domain as model
from virtd.model import drives

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.doubles.cuts import Cuts

UUID = "0123abcd-4567-89ab-cdef-0123456789ab"


def parse(text: str) -> model.Domain:
    return model.parse(f'name = "web1"\nmemory = "256M"\n{text}', "x")


def rows(placed: list[placing.Placed]) -> dict[str, tuple[str, str]]:
    """What each device is and where, by its id."""
    return {one.id: (one.what, one.address) for one in placed}


# Which is which, and where


def test_the_first_of_two_disks_is_taken_out() -> None:
    both = parse('disk = [{ path = "/a" }, { path = "/b" }]\nnic = [{}]')
    before = placing.place(both)
    after = placing.place(parse('disk = [{ path = "/b" }]\nnic = [{}]'), before)
    assert rows(after) == {name: row for name, row in rows(before).items() if name != "disk0"}
    # What comes next has the place that is free, and a name of its own.
    more = placing.place(parse('disk = [{ path = "/b" }, { path = "/c" }]\nnic = [{}]'), after)
    assert rows(more) == rows(after) | {"disk0": ("/c", rows(before)["disk0"][1])}


def test_the_order_in_the_definition_moves_nothing() -> None:
    before = placing.place(parse('disk = [{ path = "/a" }, { pool = "p", volume = "v" }]'))
    after = placing.place(parse('disk = [{ pool = "p", volume = "v" }, { path = "/a" }]'), before)
    assert rows(after) == rows(before)
    assert [one.id for one in after] == ["rng0", "disk1", "disk0"]


def test_another_file_in_the_same_drive() -> None:
    text = 'disk = [{{ path = "/{}" }}, {{ path = "/b" }}]\ncdrom = [{{ {} }}]'
    before = placing.place(parse(text.format("a", 'path = "/one.iso"')))
    after = placing.place(parse(text.format("moved", "")), before)
    assert [(one.id, one.address) for one in after] == [(one.id, one.address) for one in before]


def test_a_card_keeps_its_mac_address() -> None:
    before = placing.place(parse('boot = { kernel = "/k" }\nnic = [{ network = "a" }, { network = "b" }]'))
    alone = parse('boot = { kernel = "/k" }\nnic = [{ network = "b" }]')
    (card,) = assembly.cards(alone, UUID, placing.place(alone, before))
    assert (card.mac, card.key) == (assembly.mac_of(UUID, 1), "nic[0]")


def test_what_is_switched_on_later_moves_nothing() -> None:
    before = placing.place(parse('rng = false\ndisk = [{ path = "/a" }]'))
    after = placing.place(parse('disk = [{ path = "/a" }]\nvnc = {}'), before)
    assert rows(after)["disk0"] == rows(before)["disk0"]
    assert len({address for _what, address in rows(after).values()}) == 3


def test_on_another_bus_all_get_new_places() -> None:
    text = 'machine = "{}"\ndisk = [{{ path = "/a" }}]\ncdrom = [{{}}]'
    after = placing.place(parse(text.format("pc")), placing.place(parse(text.format("q35"))))
    assert [one.address for one in after] == [",bus=pci.0,addr=0x2", ",bus=pci.0,addr=0x3", ",bus=ide.1,unit=0"]


BUSES = """
    disk = [
        { path = "/a", bus = "scsi" }, { path = "/b", bus = "sata" }, { path = "/c", bus = "nvme" },
        { path = "/d", bus = "scsi" }, { path = "/e" },
    ]
    cdrom = [{}]
"""


def test_a_place_on_each_bus() -> None:
    assert rows(placing.place(parse(BUSES))) == {
        "rng0": ("", ",bus=pcie.0,addr=0x1"),
        "scsi0": ("", ",bus=pcie.0,addr=0x2"),
        "disk0": ("/a", ",bus=scsi0.0,channel=0,scsi-id=0,lun=0"),
        "disk1": ("/b", ",bus=ide.0,unit=0"),
        "disk2": ("/c", ",bus=pcie.0,addr=0x3"),
        "disk3": ("/d", ",bus=scsi0.0,channel=0,scsi-id=1,lun=0"),
        "disk4": ("/e", ",bus=pcie.0,addr=0x4"),
        "cdrom0": ("", ",bus=ide.5,unit=0"),
    }


def test_what_is_taken_out_of_a_bus_moves_nothing() -> None:
    before = placing.place(parse(BUSES))
    fewer = parse('disk = [{ path = "/e" }, { path = "/d", bus = "scsi" }]')
    kept = {name: rows(before)[name] for name in ("rng0", "scsi0", "disk4", "disk3")}
    after = placing.place(fewer, before)
    assert rows(after) == kept
    # Without SCSI disks there is no controller either; where it was is free then.
    none = placing.place(parse('disk = [{ path = "/e" }]'), after)
    assert rows(none) == {name: kept[name] for name in ("rng0", "disk4")}


def test_a_disk_on_another_bus_keeps_its_number_only() -> None:
    before = placing.place(parse('disk = [{ path = "/a" }, { path = "/b" }]'))
    after = placing.place(parse('disk = [{ path = "/a" }, { path = "/b", bus = "scsi" }]'), before)
    moved = {"scsi0": ("", ",bus=pcie.0,addr=0x3"), "disk1": ("/b", ",bus=scsi0.0,channel=0,scsi-id=0,lun=0")}
    assert rows(after) == rows(before) | moved
    back = placing.place(parse('disk = [{ path = "/a" }, { path = "/b" }]'), after)
    assert rows(back) == rows(before)


def test_the_ports_of_sata_are_for_disks_and_drives() -> None:
    disks = ", ".join(f'{{ path = "/{number}", bus = "sata" }}' for number in range(6))
    full = parse(f"disk = [{disks}]")
    assert placing.lacks_place(full, placing.place(full)) is None
    more = parse(f"disk = [{disks}]\ncdrom = [{{}}]")
    with pytest.raises(errors.InvalidDefinition, match=r"cdrom\[0\]: q35 has no place left"):
        hardware.require_places(hardware.assign(None, more, UUID, kvm=False), more, "x")
    # The drive that was there first keeps its port.
    before = placing.place(parse("boot = { kernel = '/k' }\ncdrom = [{}]"))
    lacks = placing.lacks_place(more, placing.place(more, before))
    assert lacks is not None
    assert lacks.id == "disk5"


def test_a_cdrom_drive_on_scsi() -> None:
    found = rows(placing.place(parse('boot = { kernel = "/k" }\ncdrom = [{}, { bus = "scsi" }, { bus = "sata" }]')))
    assert found == {
        "rng0": ("", ",bus=pcie.0,addr=0x1"),
        "scsi0": ("", ",bus=pcie.0,addr=0x2"),
        "cdrom0": ("", ",bus=ide.5,unit=0"),
        "cdrom1": ("", ",bus=scsi0.0,channel=0,scsi-id=0,lun=0"),
        "cdrom2": ("", ",bus=ide.4,unit=0"),
    }


def test_a_record_of_an_older_virtd_and_one_for_it() -> None:
    """Its records say nothing of buses, and it takes no notice of what it doesn't know in ours."""
    old = (
        b'{"uuid":"' + UUID.encode() + b'","machine":"q35","cpu":"max","type":"pc-q35-10.0","model":"base",'
        b'"devices":[{"kind":"rng","number":0,"what":"","bus":"pcie.0","slot":1},'
        b'{"kind":"disk","number":0,"what":"/a","bus":"pcie.0","slot":2}],"schema":1}'
    )
    before = msgspec.json.decode(old, type=Hardware)
    assert hardware.assign(before, DOMAIN, UUID, kvm=False) == before
    after = hardware.assign(before, parse(BUSES), UUID, kvm=False)
    assert (after.type, after.schema) == (before.type, 1)
    assert rows(list(after.devices))["scsi0"] == ("", ",bus=pcie.0,addr=0x2")
    # What a version without buses makes of it: no place that it knows, so the disk gets one.
    again = hardware.assign(msgspec.json.decode(msgspec.json.encode(after), type=Hardware), DOMAIN, UUID, kvm=False)
    assert rows(list(again.devices)) == rows(list(before.devices))


def test_a_serial_number_of_its_own() -> None:
    text = 'disk = [{ path = "/a", bus = "nvme" }, { path = "/b", bus = "nvme" }]'
    before = placing.place(parse(text))
    alone = parse('disk = [{ path = "/b", bus = "nvme" }]')
    (one,) = assembly.drives(alone, UUID, None, placing.place(alone, before))
    assert ",serial=0123456789ab-1," in one.arguments()[-1]
    assert re.fullmatch(drives.SERIAL, assembly.serial_of(UUID, 999))


def test_more_than_there_is_room_for() -> None:
    domain = parse("disk = [" + ", ".join(f'{{ path = "/{number}" }}' for number in range(30)) + "]")
    settled = hardware.assign(None, domain, UUID, kvm=False)
    with pytest.raises(errors.InvalidDefinition, match=r"disk\[29\]: q35 has no place left"):
        hardware.require_places(settled, domain, "x")
    fewer = msgspec.structs.replace(domain, disk=domain.disk[:29])
    hardware.require_places(hardware.assign(settled, fewer, UUID, kvm=False), fewer, "x")


def test_where_nothing_is_known_of_a_machine_qemu_finds_the_places() -> None:
    domain = parse('machine = "microvm"\nboot = { kernel = "/k" }\nnic = [{}]')
    assert [one.address for one in placing.place(domain)] == ["", ""]
    hardware.require_places(hardware.assign(None, domain, UUID, kvm=False), domain, "x")


# The machine


def asking(answers: Mapping[str, Any]) -> hardware.Ask:
    async def ask(name: str, arguments: dict[str, Any]) -> Any:
        answer = answers[arguments.get("property", name)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


# As QEMU 10.0 (trixie) and 11.1 (forky) answer, shortened.
TRIXIE = {
    "type": "pc-q35-10.0-machine",
    "query-cpu-model-expansion": {"model": {"name": "base", "props": {
        "family": 0, "model": 0, "stepping": 0, "model-id": "QEMU TCG CPU version 2.5+", "min-level": 13,
        "sse2": True, "la57": False,
    }}},
    "family": 6, "model": 6, "stepping": 3,
}  # fmt: skip
FORKY = TRIXIE | {"type": "pc-q35-11.1-machine"}
MAX = "base,family=6,min-level=13,model=6,model-id=QEMU TCG CPU version 2.5+,sse2=on,stepping=3"
DOMAIN = parse('disk = [{ path = "/a" }]')


def first_start(domain: model.Domain, answers: Mapping[str, Any]) -> Hardware:
    return asyncio.run(hardware.learn(hardware.assign(None, domain, UUID, kvm=False), asking(answers)))


def options(domain: model.Domain, found: Hardware) -> dict[str, str]:
    argv = command.argv(domain, UUID, command.HostFacts("q"), machine=found.type, cpu=found.model)
    return {name: argv[argv.index(name) + 1] for name in ("-machine", "-cpu")}


def test_a_newer_qemu_changes_nothing() -> None:
    """Started first by trixie's QEMU, where "q35" is pc-q35-10.0, and then by forky's, where it is pc-q35-11.1."""
    settled = hardware.assign(None, DOMAIN, UUID, kvm=False)
    assert options(DOMAIN, settled) == {"-machine": "q35,accel=tcg", "-cpu": "max"}
    before = first_start(DOMAIN, TRIXIE)
    assert before.known
    after = hardware.assign(msgspec.json.decode(msgspec.json.encode(before), type=Hardware), DOMAIN, UUID, kvm=False)
    assert after == before
    assert asyncio.run(hardware.learn(after, asking(FORKY))) == before
    assert options(DOMAIN, after) == {"-machine": "pc-q35-10.0,accel=tcg", "-cpu": MAX}
    renewed = hardware.assign(msgspec.structs.replace(before, renew=True), DOMAIN, UUID, kvm=False)
    assert options(DOMAIN, renewed) == {"-machine": "q35,accel=tcg", "-cpu": "max"}
    newer = asyncio.run(hardware.learn(renewed, asking(FORKY)))
    assert (newer.type, newer.devices, newer.renew) == ("pc-q35-11.1", before.devices, False)


@pytest.mark.parametrize(
    ("text", "kvm", "kept"),
    [
        ("", False, ("pc-q35-10.0", MAX)),
        ('machine = "pc"\n', False, ("", "")),
        ('cpu = "qemu64"\n', False, ("pc-q35-10.0", "")),
        ("", True, ("pc-q35-10.0", "")),  # "host" is asked for by then
    ],
)
def test_a_definition_that_asks_for_something_else(text: str, kvm: bool, kept: tuple[str, str]) -> None:
    before = first_start(DOMAIN, TRIXIE)
    after = hardware.assign(before, parse(f'{text}disk = [{{ path = "/a" }}]'), UUID, kvm=kvm)
    assert (after.type, after.model) == kept


def test_anothers_record_is_nobodys() -> None:
    before = first_start(DOMAIN, TRIXIE)
    other = UUID.replace("0", "9")
    assert hardware.assign(before, DOMAIN, other, kvm=False) == hardware.assign(None, DOMAIN, other, kvm=False)


@pytest.mark.parametrize(
    ("cpu", "answers", "model"),
    [
        ("max", TRIXIE, MAX),
        ("max,-avx2", TRIXIE, f"{MAX},-avx2"),
        ("qemu64,-svm", {}, "qemu64,-svm"),
        ("host", {}, "host"),
        ("max", {"query-cpu-model-expansion": errors.MonitorError("not here")}, "max"),  # 64-bit ARM
        ("max", {"query-cpu-model-expansion": {"model": {"name": "max", "props": {}}}}, "max"),
        ("max", {"query-cpu-model-expansion": "nonsense"}, "max"),
        ("max", TRIXIE | {"family": "6,foo"}, MAX.replace("family=6,", "family=6,,foo,")),
        ("max", TRIXIE | {"family": "\n"}, "max"),
        ("max", TRIXIE | {"family": ["x"]}, "max"),
    ],
)
def test_what_qemu_says_of_a_cpu(cpu: str, answers: dict[str, Any], model: str) -> None:
    found = asyncio.run(hardware.learn(Hardware(UUID, "q35", cpu, type="pc-q35-10.0"), asking(answers)))
    assert found.model == model


@pytest.mark.parametrize("said", [None, "", "q35,accel=kvm-machine", "x" * 100, 7])
def test_a_machine_type_that_is_none(said: object) -> None:
    with pytest.raises(errors.MonitorError, match="its machine is of no type"):
        asyncio.run(hardware.learn(Hardware(UUID, "q35", "max"), asking({"type": said})))


# With a daemon around it


def arguments(world: World, name: str = "web1") -> list[str]:
    with open(f"/proc/{world.units.process(name).pid}/cmdline", "rb") as file:
        return file.read().decode().split("\0")


def machine_of(world: World) -> str:
    words = arguments(world)
    return words[words.index("-machine") + 1].partition(",")[0]


def devices_of(world: World) -> list[str]:
    words = arguments(world)
    return [words[at + 1] for at, word in enumerate(words) if word == "-device"]


@on_loop
async def test_from_the_first_start_to_the_last(world: World) -> None:
    disk = os.path.join(world.paths.root, "disk")
    for name in ("a", "b"):
        with open(f"{disk}{name}", "wb") as file:
            file.truncate(1 << 20)
    more = f'disk = [{{ path = "{disk}a" }}, {{ path = "{disk}b" }}]'
    path = world.paths.hardware("web1")
    async with world.daemon() as host:
        await world.run("web1", more=more)
        assert machine_of(world) == "q35"
        before = devices_of(world)
        info = await host.domains.info("web1")
        assert info["hardware"]["machine"] == "pc-q35-10.0"
        assert [one["id"] for one in info["hardware"]["devices"]] == ["rng0", "disk0", "disk1"]
        await host.domains.stop("web1", by=ROOT)
        await world.run("web1", "newest=11.1", more=f'disk = [{{ path = "{disk}b" }}]')
        assert machine_of(world) == "pc-q35-10.0"
        assert devices_of(world) == [one for one in before if "disk0" not in one]
        assert (await host.domains.upgrade_machine("web1", by=ROOT))["changed"] is True
        assert (await host.domains.upgrade_machine("web1", by=ROOT))["changed"] is False
    async with world.daemon() as host:  # which doesn't take it for forgotten
        info = await host.domains.info("web1")
        assert (info["hardware"]["machine"], info["hardware"]["renew"]) == ("pc-q35-10.0", True)
        await host.domains.stop("web1", by=ROOT)
        await host.domains.start("web1", by=ROOT)
        assert machine_of(world) == "q35"
        assert (await host.domains.info("web1"))["hardware"]["machine"] == "pc-q35-11.1"
        await host.domains.stop("web1", by=ROOT)
        assert os.path.exists(path)
        await host.domains.undefine("web1", by=ROOT)
        assert not os.path.exists(path)


@pytest.mark.parametrize("first", [True, False], ids=["first start", "later start"])
@on_loop
async def test_the_record_is_that_of_the_process_after_every_cut_of_a_start(cuts: Cuts, first: bool) -> None:
    """Nothing ran, and the file is as before; or the file has what the unit was started with."""
    for root, patch in cuts:
        with contextlib.closing(World(root, patch)) as world:
            disk = str(root / "disk")
            with open(disk, "wb") as file:
                file.truncate(1 << 20)
            path = world.paths.hardware("web1")
            more = f'disk = [{{ path = "{disk}" }}]'
            before = None
            async with world.daemon() as host:
                if first:
                    await world.define("web1", more=more)
                else:
                    await world.run("web1")
                    await host.domains.stop("web1", by=ROOT)
                    before = hardware.read(path)
                    await world.define("web1", "newest=11.1", more)
                await cuts.cut(world, host.domains.start("web1", by=ROOT))
            async with world.daemon() as host:
                await host.domains.driver.certain()
                machine = host.domains.driver.machines["web1"]
                where = cuts.where
                if not machine.alive:
                    found = hardware.read(path)
                    # An undone start may leave its devices there, and gives up nothing of what was there before.
                    kept = [one and (one.machine, one.type, one.model) for one in (found, before)]
                    assert kept[0] == kept[1], where
                    continue
                # The first start, or the daemon after it, asks QEMU; the record in /run has the same in the end.
                await until(
                    lambda machine=machine, path=path: (
                        (kept := machine.hardware.running) is not None and kept.known and kept == hardware.read(path)
                    ),
                    where,
                )
                found = hardware.read(path)
                assert found is not None
                assert (found.machine, found.type) == ("q35", "pc-q35-10.0"), where
                assert machine_of(world) == ("q35" if first else found.type), where
                assert [one.id for one in found.devices] == ["rng0", "disk0"], where
                given = [f"{device}," for device in devices_of(world)]
                for one in found.devices:
                    assert any(f"={one.id}," in device and f"{one.address}," in device for device in given), given
                await host.domains.stop("web1", by=ROOT)
                assert hardware.read(path) == found, where
    assert any(step.startswith("start virtd-qemu-web1") for step in cuts.seen)


@on_loop
async def test_an_older_qemu_without_the_machine(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "newest=11.1")
        await host.domains.stop("web1", by=ROOT)
        await world.define("web1", "oldest")
        with pytest.raises(errors.StartFailed, match="had so far") as caught:
            await host.domains.start("web1", by=ROOT)
        assert "virtdctl upgrade-machine web1" in str(caught.value.hint)
        await host.domains.upgrade_machine("web1", by=ROOT)
        await host.domains.start("web1", by=ROOT)
        assert (await host.domains.info("web1"))["hardware"]["machine"] == "pc-q35-10.0"
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_a_guest_of_an_older_virtd(world: World) -> None:
    """It runs, and nothing is on record: what it has is put there, and it has that at its next start."""
    async with world.daemon() as host:
        await world.run("web1")
        machine = host.domains.driver.machines["web1"]
        assert machine.record is not None
        machine.save(data={key: value for key, value in machine.record.data.items() if key != "hardware"})
    os.unlink(world.paths.hardware("web1"))
    async with world.daemon() as host:
        machine = host.domains.driver.machines["web1"]
        await until(lambda: machine.hardware.on_record() is not None)
        await host.domains.stop("web1", by=ROOT)
        await world.run("web1", "newest=11.1")
        assert machine_of(world) == "pc-q35-10.0"
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_a_record_that_is_damaged(world: World) -> None:
    path = world.paths.hardware("web1")
    async with world.daemon() as host:
        await world.run("web1")
        for damage in ("{", ""):  # in parts, and gone
            with open(path, "w") as file:
                file.write(damage)
            if not damage:
                os.unlink(path)
            (told,) = (await host.check_all(repair=False, by=ROOT))["differences"]
            assert (told["kind"], told["object"], bool(told["repair"])) == ("hardware", "qemu/web1", True)
            (told,) = (await host.check_all(repair=True, by=ROOT))["differences"]
            assert told["repaired"]
            assert (await host.check_all(repair=False, by=ROOT))["differences"] == []
        await host.domains.stop("web1", by=ROOT)
        with open(path, "w") as file:
            file.write("{")
    async with world.daemon() as host:
        with pytest.raises(errors.HostError, match="What hardware web1 has isn't known") as caught:
            await host.domains.start("web1", by=ROOT)
        assert "virtdctl upgrade-machine web1" in str(caught.value.hint)
        assert (await host.check_all(repair=True, by=ROOT))["differences"][0]["repaired"] is False
        assert (await host.domains.upgrade_machine("web1", by=ROOT))["changed"] is True
        await host.domains.start("web1", by=ROOT)
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_what_cannot_be_written_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, _found: Hardware) -> None:
        raise errors.HostError(f"Cannot write {path}: No space left on device")

    monkeypatch.setattr("virtd.drivers.qemu.guest.LINK_AGAIN", 0.01)
    async with world.daemon() as host:
        with monkeypatch.context() as patch:
            patch.setattr(hardware, "write", full)
            await world.run("web1")
            assert "No space left" in (await host.domains.info("web1"))["problems"][0]["text"]
        await until(lambda: host.domains.driver.machines["web1"].problems == {})
        assert (await host.domains.info("web1"))["hardware"]["machine"] == "pc-q35-10.0"
        await host.domains.stop("web1", by=ROOT)
        await host.domains.start("web1", by=ROOT)
        assert machine_of(world) == "pc-q35-10.0"
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_an_undefine_that_fails_leaves_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = files.remove

    def refuse(path: str) -> bool:
        if path.endswith(".toml"):
            raise errors.HostError(f"Cannot remove {path}: Read-only file system")
        return remove(path)

    async with world.daemon() as host:
        await world.run("web1")
        await host.domains.stop("web1", by=ROOT)
        before = hardware.read(world.paths.hardware("web1"))
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", refuse)
            with pytest.raises(errors.HostError, match="Read-only"):
                await host.domains.undefine("web1", by=ROOT)
        assert hardware.read(world.paths.hardware("web1")) == before is not None
        await host.domains.undefine("web1", by=ROOT)
        assert not os.path.exists(world.paths.hardware("web1"))
