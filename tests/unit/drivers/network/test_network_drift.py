# SPDX-License-Identifier: LGPL-2.1-or-later
"""What differs of a network, and for how long it is put back. tests/live/test_network_drift.py asks a real kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.doubles.whole_host import ROOT, on_loop
from tests.unit.drivers.network.test_network_restarts import Site
from virtd.drivers.network import upkeep
from virtd.drivers.network.kernel import Way
from virtd.drivers.network.upkeep import LIMIT, PAUSE, WINDOW, Patience
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site.make(tmp_path, monkeypatch)
    yield site
    site.world.close()


def file(name: str, text: str) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        (site.kernel.sysfs / "vd-lab" / name).write_text(f"{text}\n")

    return change


CHANGES: dict[str, Callable[[Site], None]] = {
    "vd-lab: down": file("flags", "0x1002"),
    "vd-lab: MTU 1400 instead of 1500": file("mtu", "1400"),
    "vd-lab: no alias virtd network lab": file("ifalias", "mine"),
    "vd-lab: MAC address 02:00:00:00:00:01 instead of ": file("address", "02:00:00:00:00:01"),
    "vd-lab: no address 10.7.0.1/24": lambda site: site.kernel.addresses["vd-lab"].clear(),
}


@pytest.mark.parametrize("said", CHANGES)
@on_loop
async def test_what_is_changed_is_put_back(site: Site, said: str) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        site.world.messages.clear()
        await host.look()
        assert site.world.messages == []
        CHANGES[said](site)
        await host.look()
        (told,) = site.world.told(Message.NETWORK_PUT_BACK)
        assert said in told["text"]
        assert told["VIRTD_NAME"] == "lab"
        info = await site.info()
        assert info["problems"] == []
        assert len(site.world.messages) == 1
        assert [str(one.address) for one in site.kernel.addresses["vd-lab"]] == ["10.7.0.1"]
        assert not (await host.networks.start("lab", by=ROOT))["changed"]
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_a_route_that_wins_is_a_problem_until_it_goes(site: Site) -> None:
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        for route in (Way("10.7.0.0/25", "tun0", 254), Way("", "tun0", 52)):
            site.kernel.routes["10.7.0.254"] = route
            await host.look()
            await host.look()
            (problem,) = (await site.info())["problems"]
            assert "through tun0" in problem["text"]
            assert "ip route get 10.7.0.254" in problem["hint"]
            site.kernel.routes.clear()
            await host.look()
            assert (await site.info())["problems"] == []
        assert len(site.world.told(Message.NETWORK_BRIDGE_LOST)) == 2
        await host.networks.stop("lab", force=False, by=ROOT)


@on_loop
async def test_what_is_changed_again_and_again_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "Patience", lambda: Patience(lambda: 0.0))
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        for _ in range(LIMIT + 3):
            file("mtu", "1400")(site)
            await host.look()
        assert len(site.world.told(Message.NETWORK_PUT_BACK)) == LIMIT
        (problem,) = (await host.status())["problems"]
        assert "MTU 1400 instead of 1500 (put back 5 times" in problem["text"]
        # A person has it put back at once.
        await host.networks.start("lab", by=ROOT)
        assert (await host.status())["problems"] == []
        await host.networks.stop("lab", force=False, by=ROOT)


def test_patience_ends_later_each_time() -> None:
    now = 0.0
    patience = Patience(lambda: now)
    for round_ in range(3):
        for _ in range(LIMIT):
            assert patience.spared == frozenset()
            patience.did("a")
        assert patience.spared == {"a"}
        now += PAUSE * 2**round_ - 1
        assert patience.spared == {"a"}
        now += 1
    for _ in range(10 * LIMIT):  # seldom
        patience.did("b")
        now += WINDOW / 2
    assert patience.spared == frozenset()
