# SPDX-License-Identifier: LGPL-2.1-or-later
"""CD-ROM drives whose image doesn't exist: the guest starts, and whoever looks sees that the drive is empty."""

from __future__ import annotations

import os

import pytest

from tests.doubles.whole_host import ROOT, World, on_loop
from virtd import errors
from virtd.drivers.qemu import media
from virtd.messages import Message
from virtd.model import domain as model


def drives(world: World) -> list[str]:
    """What QEMU was given as CD-ROM drives."""
    with open(f"/proc/{world.units.process('web1').pid}/cmdline", "rb") as file:
        return [word for word in file.read().decode().split("\0") if word.startswith("ide-cd,")]


@on_loop
async def test_it_starts_with_an_empty_drive(world: World) -> None:
    there, gone = (os.path.join(world.paths.root, name) for name in ("there.iso", "gone.iso"))
    with open(there, "wb") as file:
        file.truncate(1 << 20)
    more = f'cdrom = [{{ path = "{gone}" }}, {{ path = "{there}" }}]'
    text = f"cdrom[0] is empty, no such file: {gone}"
    async with world.daemon() as host:
        await world.run("web1", more=more)
        before = drives(world)
        assert [",drive=" in drive for drive in before] == [False, True]
        info = await host.domains.info("web1")
        assert (info["cdroms"], info["disks"], info["pending"]) == ([None, there], [there], False)
        assert [problem["text"] for problem in info["problems"]] == [text]
        assert "a drive may be empty" in info["problems"][0]["hint"]
        assert len(world.told(Message.MEDIUM_MISSING)) == 1
    async with world.daemon() as host:  # the next one knows of it, and doesn't repeat itself
        info = await host.domains.info("web1")
        assert [problem["text"] for problem in info["problems"]] == [text]
        assert info["cdroms"] == [None, there]
        assert len(world.told(Message.MEDIUM_MISSING)) == 1
        await host.domains.stop("web1", by=ROOT)
        assert (await host.status())["problems"] == []
        assert (await host.domains.info("web1"))["cdroms"] == [gone, there]
        os.rename(there, gone)
        await host.domains.start("web1", by=ROOT)
        after = drives(world)
        assert [",drive=" in drive for drive in after] == [True, False]
        assert [drive.replace(",drive=cd0", "") for drive in after] == [
            drive.replace(",drive=cd1", "") for drive in before
        ], "the drives are the same ones, in the same places"
        await host.domains.stop("web1", by=ROOT)


def test_which_drives_can_be_empty() -> None:
    gone = 'cdrom = [{ path = "/no/a.iso" }, { path = "/no/b.iso", bus = "scsi" }, { path = "/etc/passwd/c.iso" }]'
    for machine, found in (("q35", ["cdrom[0]", "cdrom[1]", "cdrom[2]"]), ("virt", ["cdrom[1]"])):
        domain = model.parse(f'name = "a"\nmemory = "1G"\nmachine = "{machine}"\n{gone}', "x")
        assert list(media.missing(domain)) == found
        left = media.without(domain, media.missing(domain))
        assert [cdrom.path is None for cdrom in left.cdrom] == [f"cdrom[{index}]" in found for index in range(3)]


@on_loop
async def test_a_machine_whose_drives_cannot_be_empty(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", more='machine = "virt"\ncdrom = [{ path = "/srv/gone.iso" }]')
        with pytest.raises(errors.InvalidDefinition, match=r"cdrom\[0\].path: no such file: /srv/gone.iso"):
            await host.domains.start("web1", by=ROOT)
