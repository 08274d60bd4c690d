# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of networks over restarts and crashes of the daemon. tests/live/test_networks.py has real parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.doubles.fake_kernel import FakeKernel
from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd import errors
from virtd.drivers.network import firewall, guard, isolation, prerequisites, prober, server
from virtd.drivers.network.obstacles import Obstacle
from virtd.drivers.network.ports import Ground
from virtd.fdstore import NotifyFailed, Store
from virtd.messages import Message
from virtd.objects.protocol import Problem
from virtd.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.doubles.cuts import Cuts
    from virtd.host import Host


SLOTS = [f"network/lab/{slot}" for slot in ("console.log", "log", "stderr", "stdin", "stdout")]
UNIT = "virtd-network-lab.service"


class Site(NamedTuple):
    """A host with the kernel's part of networks in it."""

    world: World
    kernel: FakeKernel

    @classmethod
    def make(cls, root: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
        world = World(root, monkeypatch)
        for directory in (world.paths.etc, world.paths.run, world.paths.log, world.paths.lib):
            os.makedirs(f"{directory}/network")
        monkeypatch.setattr(prerequisites, "dnsmasq", lambda _settings: "/usr/sbin/dnsmasq")
        # What dnsmasq says would be on record at any moment: steps have to come in the same order each time.
        monkeypatch.setattr("virtd.drivers.network.driver.Driver.grown", lambda _driver, _key: None)
        return cls(world, FakeKernel(world, root, monkeypatch))

    async def define(self, head: str = "", more: str = "") -> Reply:
        assert self.world.host is not None
        return await self.world.host.networks.define(text(head, more), "test", check=False, by=ROOT)

    async def info(self) -> Reply:
        assert self.world.host is not None
        return await self.world.host.networks.info("lab")

    def pid(self) -> int:
        return self.world.units.process("lab", "network").pid

    def whole(self, info: Reply, where: str) -> None:
        """Every piece of an active network is there, once, and is the one that the record tells of."""
        bridge = self.kernel.sysfs / "vd-lab"
        assert [path.name for path in self.kernel.sysfs.iterdir()] == ["vd-lab"], where
        assert (bridge / "address").read_text().startswith("56:44:"), where
        assert (bridge / "flags").read_text() == "0x1003\n", where
        assert [str(address.address) for address in self.kernel.addresses["vd-lab"]] == ["10.7.0.1"], where
        assert list(self.kernel.tables) == list(self.kernel.bridge_tables) == ["virtd-lab"], where
        assert list(self.world.units.units) == [UNIT], where
        assert (info["pid"], self.world.units.units[UNIT].state().running) == (self.pid(), True), where
        assert self.world.slots() == SLOTS, where
        assert info["problems"] == [], where
        assert self.world.host is not None
        running = self.world.host.networks.driver.nets["lab"].running
        assert running is not None
        assert self.kernel.routing == isolation.wanted(running), where

    def nothing(self, where: str) -> None:
        """No piece of it is left."""
        assert list(self.kernel.sysfs.iterdir()) == [], where
        assert self.kernel.tables == self.kernel.bridge_tables == {}, where
        assert self.kernel.routing == set(), where
        assert self.world.units.units == {}, where
        assert self.world.slots() == [], where
        assert not os.path.exists(self.world.paths.runtime("network", "lab")), where


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site.make(tmp_path, monkeypatch)
    yield site
    site.world.close()


def text(head: str = "", more: str = "") -> str:
    return f'name = "lab"\n{head}\n[ipv4]\naddress = "10.7.0.1/24"\n{more}\n'


HOST = '[[host]]\nmac = "52:54:00:00:00:01"\nname = "web1"\nipv4 = "10.7.0.9"\n'
FORWARD = '[[forward]]\nport = 80\nto = "10.7.0.9"\n'


async def crash_everywhere(
    cuts: Cuts,
    operation: Callable[[Host], Awaitable[Any]],
    *,
    active: bool,
    spoilt: bool = False,
    before: Callable[[Site], None] = lambda _site: None,
    then: Callable[[Site, str], None] = lambda _site, _where: None,
) -> list[str]:
    """Kill the daemon before every visible step of `operation`; each time the network is whole, or not there at all.

    `before` is done to the host first, and `then` looks at what is special about the operation. `spoilt`: what
    `before` did is reported, and mended by a start only.
    """
    for root, patch in cuts:
        site = Site.make(root, patch)
        world = site.world
        with contextlib.closing(world):
            async with world.daemon() as host:
                await site.define()
                if active:
                    await host.networks.start("lab", by=ROOT)
                before(site)
                await cuts.cut(world, operation(host))
            async with world.daemon() as host:
                where = cuts.where
                if "lab" in host.networks.driver.nets:
                    info = await site.info()
                    then(site, where)
                    if spoilt:
                        assert info["state"] == "active", where
                    elif info["state"] == "active":
                        site.whole(info, where)
                        # The rules are those of the definition that the record says is in force.
                        net = host.networks.driver.nets["lab"]
                        assert net.running is not None
                        assert not await net.rules.lost(net.running), where
                    else:
                        assert (info["state"], info["problems"]) == ("inactive", []), where
                        site.nothing(where)
                    changed = (await host.networks.start("lab", by=ROOT))["changed"]
                    assert spoilt or changed is (info["state"] == "inactive"), where
                    site.whole(await site.info(), where)
                    await host.networks.stop("lab", force=False, by=ROOT)
                    site.nothing(where)
                    await host.networks.undefine("lab", by=ROOT)
                site.nothing(where)
                left = [f"{world.paths.etc}/network", f"{world.paths.run}/network", f"{world.paths.lib}/network"]
                assert [name for directory in left for name in os.listdir(directory)] == [], where
                assert (await host.status())["problems"] == [], where
    return cuts.seen


@on_loop
async def test_killed_at_every_step_of_an_undefine(cuts: Cuts) -> None:
    """Leases included: those of a network that there isn't any more would be the next one's of that name."""
    seen = await crash_everywhere(
        cuts, lambda host: host.networks.undefine("lab", by=ROOT), active=False,
        before=lambda site: os.mkdir(f"{site.world.paths.lib}/network/lab"),
    )  # fmt: skip
    assert {"remove lab.toml", "rmtree lab"} <= set(seen)


@on_loop
async def test_killed_at_every_step_of_a_repair(cuts: Cuts) -> None:
    """Somebody has deleted the bridge and the rules; what one daemon has left unmended, the next mends."""

    def spoil(site: Site) -> None:
        os.rename(site.kernel.sysfs / "vd-lab", site.world.paths.root + "/lost")
        site.kernel.tables.clear()

    seen = await crash_everywhere(
        cuts,
        lambda host: host.networks.start("lab", by=ROOT),
        active=True,
        before=spoil,
        spoilt=True,
    )
    assert {"add_bridge vd-lab", "nft virtd-lab", f"stop {UNIT}", f"start {UNIT}"} <= set(seen)


@pytest.mark.parametrize(
    ("head", "more", "step"),
    [
        ("", HOST + FORWARD, "nft virtd-lab"),
        ('mode = "isolated"', "", "add rule 4 900 vd-lab "),
        ('domain = "lab.internal"', "", f"start {UNIT}"),
        ('dnsmasq = ["fail"]', "", f"start {UNIT}"),  # which it doesn't take: the old one is begun again
    ],
)
@on_loop
async def test_killed_at_every_step_of_a_reload(cuts: Cuts, head: str, more: str, step: str) -> None:
    """dnsmasq has read what is in force, whichever of the two definitions that is."""

    def change(site: Site) -> None:
        path = site.world.paths.definition("network", "lab")
        with open(path) as file:
            uuid = file.readline()
        with open(path, "w") as file:
            file.write(uuid + text(head, more))

    def as_it_says(site: Site, where: str) -> None:
        assert site.world.host is not None
        net = site.world.host.networks.driver.nets["lab"]
        assert net.running is not None
        read = site.world.units.units[UNIT].started_at
        config = net.server.files.config
        with open(config) as file:
            assert ("domain=lab.internal" in file.read()) is (net.running.domain is not None), where
        assert os.stat(config).st_mtime <= read, f"{where}: dnsmasq has read another file than this"

    seen = await crash_everywhere(
        cuts, lambda host: host.reload(by=ROOT), active=True, before=change, then=as_it_says
    )
    assert step in seen


# Rules


@on_loop
async def test_the_rules_of_many_networks_come_back_at_once(site: Site) -> None:
    """In one transaction; one that is refused, or is busy, doesn't keep the others from theirs."""
    kernel = site.kernel
    async with site.world.daemon() as host:
        for number, name in enumerate(("lab", "one", "two")):
            define = text().replace('"lab"', f'"{name}"').replace("10.7.0", f"10.7.{number}")
            await host.networks.define(define, "test", check=False, by=ROOT)
            await host.networks.start(name, by=ROOT)
        nets = host.networks.driver.nets
        everything = ["virtd-lab", "virtd-one", "virtd-two"]

        async def restore() -> list[str]:
            site.world.steps = []
            await host.networks.driver._guard.restore_rules(set(nets), why="by a test")
            return [step for step in site.world.steps if step.startswith("nft")]

        assert await restore() == []
        kernel.tables.clear()
        assert await restore() == ["nft virtd-lab virtd-one virtd-two"]
        assert sorted(kernel.tables) == everything
        (told,) = site.world.told(Message.NETWORK_RULES_RESTORED)
        assert told["VIRTD_NAME"] == "lab one two"
        kernel.tables.clear()
        kernel.refused = "virtd-one"
        assert len(await restore()) == 4
        assert sorted(kernel.tables) == ["virtd-lab", "virtd-two"]
        assert [name for name, net in nets.items() if "rules" in net.problems] == ["one"]
        kernel.refused = ""
        kernel.tables.clear()
        async with nets["two"].exclusive("be busy with"):
            restoring = asyncio.create_task(restore())
            await until(lambda: sorted(kernel.tables) == everything[:2])
        assert await restoring == ["nft virtd-lab virtd-one", "nft virtd-two"]
        assert sorted(kernel.tables) == everything
        assert not any(net.problems for net in nets.values())


@on_loop
async def test_rules_that_are_flushed_again_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it was seen how the kernel has them: that there are none isn't how they ought to be."""
    kernel, replace = site.kernel, firewall.replace
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        nets = host.networks.driver.nets

        def flushed(*grounds: Ground) -> list[firewall.Marks]:
            replace(*grounds)
            kernel.tables.clear()
            kernel.bridge_tables.clear()
            return [firewall.mark(ground.network.name) for ground in grounds]

        kernel.tables.clear()
        with monkeypatch.context() as patch:
            patch.setattr(firewall, "replace", flushed)
            await host.networks.driver._guard.restore_rules(set(nets), why="by a test")
        assert kernel.tables == {}
        await host.networks.driver._guard.restore_rules(set(nets), why="by a test")
        site.whole(await site.info(), "after the second flush")


@on_loop
async def test_other_peoples_rules_are_looked_at_now_and_then(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change, but not after each of many; and the last one is never passed over."""
    for module in (prober, guard):
        monkeypatch.setattr(module, "QUIET", 0.001)
    monkeypatch.setattr(prober, "PAUSE", 0.0)
    monkeypatch.setattr(prober, "AGAIN", (0.001,))
    looks: list[str] = []
    found: list[Obstacle] = []

    def find(ground: Ground, _over: object) -> list[Obstacle]:
        looks.append(ground.network.name)
        return list(found)

    monkeypatch.setattr(prober, "_find", find)
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        driver = host.networks.driver
        net, looking, touched = driver.nets["lab"], driver._prober, driver._guard._touched

        async def looked(times: int) -> None:
            await until(lambda: len(looks) == times and looking._running is None)
            looking._next = 0.0  # the pause is over

        await until(lambda: looks and looking._running is None)
        looks[1:] = []
        monkeypatch.setattr(prober, "PAUSE", 1000.0)
        found.append(Obstacle(Problem("dropped", "nft ..."), unheard=False))
        touched("filter")
        await looked(2)
        assert [one["hint"] for one in (await site.info())["problems"]] == ["nft ..."]
        found.clear()
        touched("filter")
        await looked(3)
        assert net.problems == {}
        looking._next = float("inf")
        for _ in range(20):
            touched("filter")
            await asyncio.sleep(0.001)
        assert len(looks) == 3
        assert looking._doubtful == {"lab"}
        assert looking._running is not None
        looking._running.cancel()
        await until(lambda: looking._running is None)
        looking._next = 0.0
        looking.doubt([])
        await looked(4)
        # Neither our own tables nor a probe's are a reason to look.
        for table in ("virtd_probe", "virtd-lab"):
            touched(table)
        await asyncio.sleep(0.05)
        assert len(looks) == 4
        # What goes away without a word is looked for again all the same.
        monkeypatch.setattr(prober, "PAUSE", 0.0)
        found.append(Obstacle(Problem("dropped by legacy iptables"), unheard=True))
        looking.doubt(["lab"])
        await until(lambda: net.problems)
        found.clear()
        await until(lambda: not net.problems)
        # What drops packets comes without a word as well, where there is legacy iptables at all.
        await until(lambda: looking._running is None)
        looks.clear()
        await host.look()
        assert (looking._running is None, looks) == (True, [])
        (site.kernel.sysfs.parent / "proc/net").mkdir(parents=True, exist_ok=True)
        names = site.kernel.sysfs.parent / "proc/net/ip_tables_names"
        names.write_text("filter\n")
        await host.look()
        await until(lambda: len(looks) > 2)
        found.append(Obstacle(Problem("dropped by legacy iptables"), unheard=True))
        await until(lambda: net.problems)
        names.unlink()


@on_loop
async def test_what_was_found_is_told_by_the_next_daemon(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; and nobody looks again unless somebody's rules have changed meanwhile."""
    monkeypatch.setattr(prober, "QUIET", 0.001)
    looks: list[str] = []

    def find(ground: Ground, _over: object) -> list[Obstacle]:
        looks.append(ground.network.name)
        return [Obstacle(Problem("dropped", "nft ..."), unheard=False)]

    monkeypatch.setattr(prober, "_find", find)
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        await until(lambda: looks and host.networks.driver.nets["lab"].data.get("obstacles"))
    looks.clear()
    for changed in (False, True):
        site.kernel.generation += changed
        async with site.world.daemon() as host:
            await until(lambda host=host: host.networks.driver.nets["lab"].problems)
            assert [one["text"] for one in (await site.info())["problems"]] == ["dropped"]
            await host.networks.driver.certain()
            if changed:
                await until(lambda: looks)
            assert len(looks) == changed
            assert host.networks.driver._prober._doubtful == set()
    # Nonsense in the record is nothing that was found.
    for nonsense in (7, {}, {"found": 7}, {"found": [[1]], "generation": 2}, {"found": [["a", "b", 1]]}):
        net = host.networks.driver.nets["lab"]
        assert net.record is not None
        net.record.data["obstacles"] = nonsense
        assert prober._is_same(net, site.kernel.generation) is False


# A dnsmasq that dies


@on_loop
async def test_the_pauses_before_a_dnsmasq_that_dies_is_started_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ever longer ones, and the network says which; one that has run for a while begins with the shortest again."""
    monkeypatch.setattr(server, "BACKOFF", (0.001, 0.002, 0.003, 0.004))
    said: list[str] = []
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]

        def listen(event: str, item: Reply) -> None:
            if item["driver"] == "network" and "server" in net.problems:
                said.append(str(net.problems["server"].hint))

        host.subscribe(listen)

        async def die() -> None:
            pid = site.pid()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: UNIT in site.world.units.units and site.pid() != pid and net.server.alive)
            await until(lambda: "server" not in net.problems)

        for _ in range(5):
            await die()
        assert [hint.split(" s.")[0] for hint in said] == [
            f"It is started again in {pause}" for pause in ("0.002", "0.003", "0.004", "0.004", "0.004")
        ]
        info = await site.info()
        assert info["reason"] == "dnsmasq was killed by SIGKILL and was started again"
        site.whole(info, "after its deaths")
        assert len(site.world.told(Message.NETWORK_SERVER_ENDED)) == 5
        monkeypatch.setattr(server, "STEADY", 0.0)
        await die()
        assert said[-1].startswith("It is started again in 0.001 s.")


@on_loop
async def test_a_dnsmasq_that_cannot_be_started_again_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /run, for example. It is tried again until it can, whichever daemon does it."""
    monkeypatch.setattr(server, "BACKOFF", (0.01,))
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        pid = site.pid()
        with monkeypatch.context() as full:
            full.setattr(type(net.shared.records), "save", _refuse)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: "server" in net.problems and "No space left" in net.problems["server"].text)
            info = await site.info()
            assert (info["state"], info["pid"]) == ("active", None)
            assert {problem["text"] for problem in info["problems"]} == {
                "dnsmasq can't be started again: Cannot write lab: No space left on device",
                "Cannot write lab: No space left on device",  # how far its words are in the journal
            }
        await until(lambda: net.server.alive and "server" not in net.problems)
        site.whole(await site.info(), "when there was room")
        assert site.pid() != pid


@on_loop
async def test_slots_that_systemd_has_dropped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """FileDescriptorStoreMax= lowered: dnsmasq is taken back without its slots; one that dies then waits for room."""
    monkeypatch.setattr(server, "BACKOFF", (0.01,))
    pid1 = site.world.pid1
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        pid = site.pid()
    pid1.store_max = 2
    assert len(pid1.names()) == 5
    for entry in pid1.entries:
        os.close(entry.fd)
    pid1.entries.clear()
    async with site.world.daemon() as host:
        net = host.networks.driver.nets["lab"]
        info = await site.info()
        assert (info["state"], info["pid"]) == ("active", pid)
        assert [problem["text"].split(" of ")[0] for problem in info["problems"]] == [
            f"Slot network/lab/{slot}" for slot in ("stdin", "stdout", "stderr")
        ]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "server" in net.problems and "no room for 5" in net.problems["server"].text)
        assert list(net.problems) == ["server"]  # what it says from now on won't be lost
    pid1.store_max = 1000
    async with site.world.daemon() as host:
        net = host.networks.driver.nets["lab"]
        await until(lambda: net.server.alive and not net.problems)
        site.whole(await site.info(), "when there was room")
        await host.networks.stop("lab", force=False, by=ROOT)
        site.nothing("after its stop")


@on_loop
async def test_slots_that_could_not_be_dropped_are_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the daemon, as soon as systemd takes messages again, or by the next one."""

    def refuse(_store: Store) -> None:
        raise NotifyFailed("the service manager accepted no message")

    for restarted in (False, True):
        async with site.world.daemon() as host:
            if not restarted:
                await site.define()
            await host.networks.start("lab", by=ROOT)
            with monkeypatch.context() as patch:
                patch.setattr(Store, "tidy", refuse)
                await host.networks.stop("lab", force=False, by=ROOT)
            assert (await site.info())["state"] == "inactive"
            assert site.world.slots() == SLOTS
            if not restarted:
                assert host.services.store.untidy()
                host.services.store.tidy()
                assert site.world.slots() == []
    async with site.world.daemon():
        assert site.world.slots() == []
        assert (await site.info())["state"] == "inactive"


@on_loop
async def test_a_stop_that_cannot_be_put_on_record_is_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /run doesn't keep it from being stopped, and the next daemon knows as soon as there is room."""
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        with monkeypatch.context() as full:
            full.setattr(type(net.shared.records), "save", _refuse)
            await host.networks.stop("lab", force=False, by=ROOT)
            site.nothing("after its stop")
            info = await site.info()
            assert (info["state"], [problem["text"] for problem in info["problems"]]) == (
                "inactive", ["Cannot write lab: No space left on device"],
            )  # fmt: skip
        await until(net.on_record.is_set)
        assert (await site.info())["problems"] == []
    async with site.world.daemon():
        assert (await site.info())["state"] == "inactive"
        site.nothing("with the next daemon")


def _refuse(_records: Any, record: Any) -> None:
    raise errors.HostError(f"Cannot write {record.name}: No space left on device")


@on_loop
async def test_a_stop_that_is_held_up_is_finished(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus broke off at that very moment, say: who asked is told, and needn't ask again."""
    monkeypatch.setattr("virtd.drivers.network.net.STOP_AGAIN", 0.01)
    tries: list[str] = []

    def step(what: str) -> None:
        if what.startswith("stop "):
            tries.append(what)
            if len(tries) < 4:
                raise errors.HostError("the D-Bus connection was closed")

    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        monkeypatch.setattr(site.world.units, "step", step)
        with pytest.raises(errors.HostError, match="was closed"):
            await host.networks.stop("lab", force=False, by=ROOT)
        info = await site.info()
        assert info["state"] == "stopping"
        assert [problem["text"] for problem in info["problems"]] == [
            "It isn't stopped yet: the D-Bus connection was closed"
        ]
        net = host.networks.driver.nets["lab"]
        await until(lambda: net.state.value == "inactive")
        assert len(tries) == 4
        assert (await site.info())["problems"] == []
        site.nothing("after its stop")


@on_loop
async def test_how_far_the_journal_has_its_words_is_on_record(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when there was no room for it at first: else it would have them twice, and fsck a difference."""
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)
    async with site.world.daemon() as host:
        await site.define()
        await host.networks.start("lab", by=ROOT)
        net = host.networks.driver.nets["lab"]
        assert net.record is not None
        with monkeypatch.context() as full:
            full.setattr(type(net.shared.records), "save", _refuse)
            net.keep(data=net.record.data | {"stderr": {"file": "1:2", "offset": 3}})
            assert "No space left" in (await site.info())["problems"][0]["text"]
        await until(net.on_record.is_set)
        assert site.world.record("lab", "network").data["stderr"] == {"file": "1:2", "offset": 3}
        assert (await site.info())["problems"] == []
