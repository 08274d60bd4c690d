# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd-machined is told, with a real dbus-daemon and a stand-in for machined."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.doubles.private_bus import PrivateBus, private_bus
from tests.doubles.whole_host import until
from virtd.host import machined
from virtd.host.machined import MACHINED, Registrar, name_of
from virtd.systemd.bus import Bus, MethodCall, Var

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from virtd.host import Host
    from virtd.systemd.units import Units

pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

UUID = "6f1c7a52-0c5e-4b53-9d5c-000000000001"


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


class Machined:
    """As much of machined as is called."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.machines: dict[str, tuple[str, int]] = {}
        self.calls: list[str] = []
        bus.serve(self.answer)

    def answer(self, call: MethodCall) -> None:
        self.calls.append(call.member)
        match call.member:
            case "RegisterMachine":
                name, identity, service, kind, leader, root = call.args
                assert (bytes(identity).hex(), service, root) == (UUID.replace("-", ""), "virtd", "")
                if name in self.machines:
                    return call.error(f"{MACHINED}.MachineExists", "exists")
                self.machines[name] = (kind, leader)
                call.reply("o", f"/m/{name.replace('-', '_')}")
            case "UnregisterMachine":
                if self.machines.pop(call.args[0], None) is None:
                    return call.error(f"{MACHINED}.NoSuchMachine", "none")
                call.reply()
            case "GetMachine":
                if call.args[0] not in self.machines:
                    return call.error(f"{MACHINED}.NoSuchMachine", "none")
                call.reply("o", f"/m/{call.args[0].replace('-', '_')}")
            case "GetAll":
                name = call.path.removeprefix("/m/").replace("_", "-")
                call.reply("a{sv}", {"Leader": Var("u", self.machines[name][1])})


class Driver:
    def __init__(self, name: str, items: list[dict[str, Any]]) -> None:
        self.name = name
        self._items = {item["name"]: item for item in items}
        self.machines = {name: Named(name) for name in self._items}

    def describe_named(self, name: str) -> dict[str, Any]:
        return self._items[name]


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


class World:
    """A host that publishes what it is told to."""

    def __init__(self, *items: dict[str, Any]) -> None:
        self.listener: Callable[[str, dict[str, Any]], None] = lambda _event, _item: None
        self.drivers = [
            Driver(name, [item for item in items if item["driver"] == name]) for name in ("network", "qemu", "lxc")
        ]

    def subscribe(self, listener: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        self.listener = listener
        return lambda: None


class FakeUnits:
    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def version(self) -> int:
        return 257


def item(driver: str, pid: int | None, state: str = "running") -> dict[str, Any]:
    return {"driver": driver, "name": "web1", "uuid": UUID, "pid": pid, "state": state}


@contextlib.asynccontextmanager
async def running(private: PrivateBus, world: World) -> AsyncIterator[Bus]:
    """A registry at work; the bus is one that a machined may come up on."""
    client, service = await Bus.open(private.address), await Bus.open(private.address)
    task = asyncio.create_task(Registrar(cast("Host", world), cast("Units", FakeUnits(client))).run())
    try:
        yield service
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
        await service.close()


def test_names_differ_by_driver_and_fit() -> None:
    assert (name_of("qemu", "web1", UUID), name_of("lxc", "web1", UUID)) == ("qemu-web1", "lxc-web1")
    long = name_of("lxc", "a" * 64, UUID)
    assert (len(long), long[-9:]) == (64, "-6f1c7a52")
    assert name_of("lxc", "a-", UUID) == "lxc-a"


def test_what_runs_is_told_when_machined_comes(private: PrivateBus) -> None:
    """It comes late, is told all, then each change once; what starts isn't anything yet."""

    async def main() -> None:
        world = World(item("qemu", 10), item("network", 5), item("lxc", 20, "starting"))
        async with running(private, world) as bus:
            await asyncio.sleep(0.1)
            fake = Machined(bus)
            await bus.own_name(MACHINED)
            await until(lambda: fake.machines == {"qemu-web1": ("vm", 10)})
            world.listener("changed", item("lxc", 20))
            await until(lambda: "lxc-web1" in fake.machines)
            world.listener("changed", item("lxc", 21))  # it has rebooted
            await until(lambda: fake.machines.get("lxc-web1") == ("container", 21))
            told = len(fake.calls)
            world.listener("changed", item("lxc", 21, "paused"))
            world.listener("changed", item("qemu", None, "crashed"))
            await until(lambda: fake.machines == {"lxc-web1": ("container", 21)})
            assert fake.calls[told:] == ["UnregisterMachine"]

    asyncio.run(main())


def test_what_machined_remembers_is_not_told_twice(private: PrivateBus) -> None:
    """And what it remembers wrongly is put right."""

    async def main() -> None:
        world = World(item("qemu", 10), item("lxc", 20))
        service = await Bus.open(private.address)
        fake = Machined(service)
        fake.machines = {"qemu-web1": ("vm", 10), "lxc-web1": ("container", 7)}
        await service.own_name(MACHINED)
        async with running(private, world):
            await until(lambda: fake.machines == {"qemu-web1": ("vm", 10), "lxc-web1": ("container", 20)})
            assert fake.calls.count("UnregisterMachine") == 1
            await service.release_name(MACHINED)
            fake.machines.clear()
            await service.own_name(MACHINED)
            await until(lambda: fake.machines == {"qemu-web1": ("vm", 10), "lxc-web1": ("container", 20)})
        await service.close()

    asyncio.run(main())


def test_a_machined_that_does_not_answer_is_tried_again(private: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machined, "LIMIT", 0.1)
    monkeypatch.setattr(machined, "RETRY", 0.1)

    async def main() -> None:
        service = await Bus.open(private.address)
        fake = Machined(service)
        answer, service_calls = fake.answer, list[str]()
        service.serve(lambda call: service_calls.append(call.member))
        await service.own_name(MACHINED)
        async with running(private, World(item("qemu", 10))):
            await until(lambda: len(service_calls) >= 2)
            service.serve(answer)
            await until(lambda: fake.machines == {"qemu-web1": ("vm", 10)})
        await service.close()

    asyncio.run(main())
