# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what: the same for both front ends, and an authority that takes its time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.doubles.whole_host import on_loop, until
from tests.unit.api.test_dbus_api import WEB, shared_bus
from tests.unit.api.test_dbus_api import serving as on_dbus
from tests.unit.api.test_varlink import ANN, ROOT, Client
from tests.unit.api.test_varlink import serving as on_varlink
from virtd import errors
from virtd.api import idl, interfaces, kinds
from virtd.api.limits import ALL_RUNNING
from virtd.host import Caller
from virtd.host.access import Access, Right
from virtd.systemd.bus import BusError

__all__ = ["shared_bus"]

# PyGObject 3.42's importer is of a kind that Python 3.11 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

VARLINK = [f"{interface}.{name}" for interface in interfaces.MODULES for name in interfaces.methods(interface)]
DBUS = [
    (interface, name, method)
    for interface, its in kinds.members(kinds.load().values()).items()
    for name, method in its.methods.items()
]
# What a value has on Varlink, by its type on D-Bus.
KINDS = {"s": "string", "b": "bool", "d": "float", "i": "int", "t": "int", "as": "string"}


class Slow:
    """An authority that answers when it is told what."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, Right]] = []
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.given_up = 0

    async def allows(self, by: Caller, operation: str, right: Right) -> bool:
        self.asked.append((by.uid, operation, right))
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.given_up += 1
            raise


# The table


def test_what_others_than_root_may_call() -> None:
    """Whoever adds an operation, or gives one another right, changes this list as well."""
    found = {right: {name for name in VARLINK if interfaces.operation(name).right is right} for right in Right}
    assert {name.removeprefix("org.virtd1.") for name in found[Right.LOOK]} == {
        *["Status", "List", "Info", "Dump", "Check", "Slots", "Wait", "Subscribe"],
        *["Container.List", "Container.Info", "Container.Dump", "Container.Wait"],
        *["Network.List", "Network.Info", "Network.Dump", "Network.Leases", "Pool.List", "Pool.Info", "Pool.Dump"],
        *["Volume.List", "Volume.Info", "Volume.Snapshots", "Volume.Jobs", "Volume.Await"],
    }
    assert {name.removeprefix("org.virtd1.") for name in found[Right.OVERHEAR]} == {
        "Follow", "OpenConsole", "Container.Follow", "Container.OpenConsole",
    }  # fmt: skip


def test_each_method_of_the_bus_is_an_operation() -> None:
    for _, _, method in DBUS:
        assert method.operation in VARLINK or method.operation.startswith("org.freedesktop.DBus.")


def test_root_may_do_everything_and_others_may_look() -> None:
    access = Access()
    for right in Right:
        assert access.allows(ROOT, "org.virtd1.Explode", right)
        if right is Right.LOOK:
            assert access.allows(ANN, "org.virtd1.Explode", right)
        else:
            with pytest.raises(errors.AccessDenied, match="ann may not call Explode"):
                access.allows(ANN, "org.virtd1.Explode", right)


@on_loop
async def test_both_front_ends_go_by_the_right_of_the_operation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, shared_bus: Any
) -> None:
    table = interfaces.methods("org.virtd1")
    monkeypatch.setitem(table, "Info", table["Info"]._replace(right=Right.CHANGE))
    async with on_varlink(tmp_path, monkeypatch, ANN) as world:
        with world.client() as client:
            reply = await client.call("org.virtd1.Info", {"name": "a"})
            assert reply is not None
            assert reply["error"] == "org.virtd1.AccessDenied"
            assert not world.host.calls
    async with on_dbus(shared_bus, uid=1000) as (host, bus):
        with pytest.raises(BusError, match="may not call Info"):
            await bus.call(WEB, "org.virtd1.Domain.Info")
        assert not host.asked


def test_a_method_of_the_bus_takes_what_its_operation_does() -> None:
    """Every argument is a parameter of that type; together with the object's name they are all that must be given."""
    for interface, name, method in DBUS:
        place, _, operation = method.operation.rpartition(".")
        if place not in interfaces.MODULES:
            continue
        known = {parameter.name: parameter for parameter in idl.methods(place)[operation]}
        taken = dict(method.takes.sources)
        for source, signature in taken.items():
            assert KINDS[signature] == known[source].kind, (interface, name, source)
            assert known[source].many == signature.startswith("a")
        required = {parameter.name for parameter in known.values() if not parameter.optional}
        own = {"pool" if place == "org.virtd1.Volume" else "name"} if not interface.endswith("Manager") else set()
        assert required == ({source for source in taken if not known[source].optional} | own), (interface, name)


# An authority


@on_loop
async def test_who_waits_for_an_authority_holds_nobody_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More callers wait than may have a call answered at a time; others are answered meanwhile."""
    async with on_varlink(tmp_path, monkeypatch, ANN) as world:
        slow = Slow()
        world.host.access = Access(slow)
        waiting: list[Client] = []
        try:
            for count in range(1, ALL_RUNNING + 2):
                waiting.append(Client(world.path))
                await waiting[-1].send({"method": "org.virtd1.Start", "parameters": {"name": "a"}})
                await until(lambda count=count: len(slow.asked) == count)
            with world.client() as another:
                world.host.answers["listing"] = []
                assert await another.call("org.virtd1.List") == {"parameters": {"objects": []}}
            assert [call[0] for call in world.host.calls] == ["listing"]
            slow.answer.set_result(True)
            for client in waiting:
                assert "error" not in (await client.receive() or {"error": "hung up"})
            assert slow.asked[0] == (ANN.uid, "org.virtd1.Start", Right.CHANGE)
        finally:
            for client in waiting:
                client.close()


@on_loop
async def test_an_authority_is_not_asked_further_when_the_caller_is_gone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_varlink(tmp_path, monkeypatch, ANN) as world:
        slow = Slow()
        world.host.access = Access(slow)
        with world.client() as client:
            await client.send({"method": "org.virtd1.Start", "parameters": {"name": "a"}})
            await until(lambda: slow.asked)
        await until(lambda: slow.given_up == 1)
        await until(lambda: not world.server.clients.count(ANN.uid))
        assert not world.host.calls


@on_loop
async def test_an_authority_may_say_no_or_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_varlink(tmp_path, monkeypatch, ANN) as world:
        world.host.access = Access(Slow(), patience=0.01)
        with world.client() as client:
            reply = await client.call("org.virtd1.Stop", {"name": "a"})
            assert reply is not None
            assert reply["error"] == "org.virtd1.AccessDenied"
            assert "Nobody has allowed ann to call Stop" in reply["parameters"]["message"]
            refusing = Slow()
            refusing.answer.set_result(False)
            world.host.access = Access(refusing)
            reply = await client.call("org.virtd1.OpenConsole", {"name": "a"}, more=True)
            assert reply is not None
            assert reply["error"] == "org.virtd1.AccessDenied"
        assert not world.host.calls


@on_loop
async def test_an_authority_is_asked_on_the_bus_too(shared_bus: Any) -> None:
    async with on_dbus(shared_bus, uid=1000) as (host, bus):
        slow = Slow()
        host.access = Access(slow)
        call = asyncio.create_task(bus.call(WEB, "org.virtd1.Domain.Start"))
        await until(lambda: slow.asked)
        assert not host.asked
        slow.answer.set_result(True)
        assert await call == (True,)
        assert [asked[0] for asked in host.asked] == ["start"]
