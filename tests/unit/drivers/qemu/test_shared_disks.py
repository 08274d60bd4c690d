# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that several guests write to at the same time: only if all of them say so."""

from __future__ import annotations

import os

import pytest

from tests.doubles.whole_host import ROOT, World, on_loop
from virtd import errors
from virtd.drivers.qemu import twins
from virtd.model import domain as model
from virtd.objects.conflicts import Holding, Kind


@pytest.mark.parametrize(
    ("mine", "theirs", "both"),
    [
        ("readonly", "readonly", True),
        ("shared", "shared", True),
        ("shared", "readonly", False),
        ("readonly", "shared", False),
        ("shared", "", False),
        ("", "shared", False),
        ("readonly", "", False),
        ("", "", False),
    ],
)
def test_who_goes_with_whom(mine: str, theirs: str, both: bool) -> None:
    one, other = (
        Holding(Kind.IMAGE, (1, 2), shared=bool(word), writes=word != "readonly") for word in (mine, theirs)
    )
    assert one.goes_with(other) is both


@on_loop
async def test_two_guests_that_share_and_one_that_does_not(world: World) -> None:
    disk = os.path.join(world.paths.root, "disk")
    with open(disk, "wb") as file:
        file.truncate(1 << 20)

    def more(options: str) -> str:
        return f'disk = [{{ path = "{disk}"{options} }}]'

    async with world.daemon() as host:
        await world.run("web1", more=more(", shared = true"))
        await world.run("web2", more=more(", shared = true"))
        for options in ("", ", readonly = true"):
            await world.define("web3", more=more(options))
            with pytest.raises(errors.Busy, match=f"{disk} is in use by domain web[12]") as caught:
                await host.domains.start("web3", by=ROOT)
            assert "shared in both" in str(caught.value.hint)
        await host.domains.stop("web1", by=ROOT)
    async with world.daemon() as host:  # the next one knows it from the record
        with pytest.raises(errors.Busy, match=f"{disk} is in use by domain web2"):
            await host.domains.start("web3", by=ROOT)
        await host.domains.start("web1", by=ROOT)
        for name in ("web1", "web2"):
            await host.domains.stop(name, by=ROOT)
        await world.define("web3", more=more(""))
        await host.domains.start("web3", by=ROOT)
        with pytest.raises(errors.Busy, match=f"{disk} is in use by domain web3"):
            await host.domains.start("web1", by=ROOT)
        await host.domains.stop("web3", by=ROOT)


def test_no_warning_of_a_disk_that_both_share(tmp_path: object) -> None:
    disk, link = f"{tmp_path}/disk", f"{tmp_path}/link"
    with open(disk, "wb"):
        os.link(disk, link)

    def parse(path: str, options: str) -> model.Domain:
        return model.parse(f'name = "a"\nmemory = "1G"\ndisk = [{{ path = "{path}"{options} }}]', "x")

    shared = ", shared = true"
    assert twins.warnings(parse(disk, shared), [parse(link, shared)]) == []
    assert len(twins.warnings(parse(disk, shared), [parse(link, "")])) == 1
