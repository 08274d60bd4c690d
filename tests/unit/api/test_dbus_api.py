# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus front end over a host that is made up, on a dbus-daemon that is real."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.private_bus import PrivateBus, private_bus
from virtd import __version__, errors
from virtd.api import domain_objects, interfaces
from virtd.api.dbus import NAME, ROOT, Server, path_of
from virtd.api.domain_objects import DOMAIN
from virtd.api.introspection import INTROSPECTABLE, MANAGER, OBJECT_MANAGER, PROPERTIES
from virtd.host import Caller
from virtd.host.access import Access, Right
from virtd.systemd.bus import DBUS, DBUS_PATH, Bus, BusError, Var
from virtd.systemd.state import StartFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

# PyGObject 3.42's importer is of a kind that Python 3.11 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

WEB = "/org/virtd1/domain/web1"


class FakeNetworks:
    """The same for networks."""

    def __init__(self) -> None:
        self.nets: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[Any, ...]] = []

    async def listing(self) -> list[dict[str, Any]]:
        return [self.nets[name] for name in sorted(self.nets)]

    async def info(self, name: str) -> dict[str, Any]:
        return self.nets[name] | {"users": ["qemu/web1"], "pending": False}

    async def leases(self, name: str) -> list[dict[str, Any]]:
        return [{"address": "192.168.7.2", "mac": "52:54:00:00:00:01", "name": None, "expires": None}]

    async def start(self, name: str, *, by: Caller) -> dict[str, Any]:
        self.asked.append(("start", name, by.name))
        return {"name": name, "changed": True}

    async def stop(self, name: str, *, force: bool, by: Caller) -> dict[str, Any]:
        self.asked.append(("stop", name, force))
        return {"name": name, "changed": False}

    async def define_default(self, *, by: Caller) -> dict[str, Any]:
        return {"name": "default", "uuid": "u", "created": True, "path": "/p", "warnings": []}


NET = {
    "name": "lab",
    "driver": "network",
    "uuid": "uuid-of-lab",
    "state": "active",
    "reason": "started by root",
    "pid": 42,
    "since": "2026-01-01T00:00:00Z",
    "autostart": True,
    "mode": "nat",
    "bridge": "vd-lab",
    "ipv4": "192.168.7.1/24",
    "ipv6": None,
}


class FakeHost:
    """Has domains, and notes what it is asked for."""

    def __init__(self) -> None:
        self.networks = FakeNetworks()
        self.access = Access()
        self.drivers: tuple[str, ...] = ()
        self.known: dict[str, dict[str, Any]] = {}
        self.exits: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.domains = self
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self.forever = asyncio.Event()

    def add(self, name: str, **changes: Any) -> None:
        self.known[name] = {
            "name": name,
            "driver": "qemu",
            "uuid": f"uuid-of-{name}",
            "state": "stopped",
            "reason": "never started",
            "pid": None,
            "since": None,
            "autostart": False,
            "id": None,
        } | changes
        self.publish("added", name)

    def change(self, name: str, event: str = "changed", **changes: Any) -> None:
        self.known[name] = self.known[name] | changes
        self.publish(event, name)

    def remove(self, name: str) -> None:
        del self.known[name]
        self.publish("removed", name)

    def publish(self, event: str, name: str) -> None:
        for listener in self.listeners:
            listener(event, dict(self.known.get(name, {"name": name, "driver": "qemu"})))

    def subscribe(self, callback: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    async def status(self) -> dict[str, Any]:
        return {"version": "1", "pid": 7, "recovered": {"ms": 1.5, "adopted": ["a"]}, "problems": [{"text": "t"}]}

    async def listing(self) -> list[dict[str, Any]]:
        return [self.known[name] for name in sorted(self.known)]

    async def info(self, name: str) -> dict[str, Any]:
        return self.known[name] | {"unit": f"virtd-qemu-{name}.service", "exit": self.exits.get(name), "vnc": None}

    async def dump(self, name: str) -> str:
        return f'name = "{name}"\n'

    async def wait(self, name: str, states: list[str], timeout: float | None) -> dict[str, Any]:
        await self.forever.wait()
        return self.known[name]

    async def define(self, text: str, source: str, *, check: bool, by: Caller) -> dict[str, Any]:
        if "[[" in text:
            raise errors.InvalidDefinition(source, "memory", "expected a size", hint='Say "256M"')
        self.asked.append(("define", text, source, check, by))
        return {"name": "n", "uuid": "u", "created": True, "path": "/p", "warnings": ["w"]}

    async def check_all(self, *, repair: bool, by: Caller | None) -> dict[str, Any]:
        self.asked.append(("check_all", repair, by))
        return {"differences": [{"kind": "slot", "object": "qemu/a", "text": "t", "repaired": repair}], "objects": 2}

    async def reload(self, *, by: Caller) -> dict[str, Any]:
        return {"changed": ["a"], "problems": [{"object": "qemu/b", "text": "bad", "hint": ""}]}

    async def shutdown(self, name: str, timeout: float | None, *, by: Caller) -> dict[str, Any]:
        return self._asked("shutdown", name, timeout, by)

    async def kill(self, name: str, signum: int, *, by: Caller) -> dict[str, Any]:
        return self._asked("kill", name, signum, by)

    async def reboot(self, name: str, *, force: bool, timeout: float | None, by: Caller) -> dict[str, Any]:
        return self._asked("reboot", name, force, timeout, by)

    async def set_autostart(self, name: str, enable: bool, *, by: Caller) -> dict[str, Any]:
        return self._asked("set_autostart", name, enable, by)

    async def start(self, name: str, *, by: Caller) -> dict[str, Any]:
        return self._asked("start", name, by)

    async def stop(self, name: str, *, by: Caller) -> dict[str, Any]:
        return self._asked("stop", name, by)

    async def suspend(self, name: str, *, by: Caller) -> dict[str, Any]:
        raise errors.InvalidState(f"Cannot suspend {name}: it is stopped", hint="Start it first.")

    async def resume(self, name: str, *, by: Caller) -> dict[str, Any]:
        raise StartFailed("a subclass of an error crosses as its parent")

    async def undefine(self, name: str, *, by: Caller) -> dict[str, Any]:
        self.remove(name)
        return {"name": name}

    def _asked(self, *what: Any) -> dict[str, Any]:
        if self.known[what[1]]["uuid"] == "bug":
            raise ZeroDivisionError
        self.asked.append(what)
        return {"name": what[1], "changed": True, "pid": 1}


class Client:
    """A connection that calls org.virtd1, and hears its signals."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.heard: list[tuple[Any, ...]] = []

    async def call(self, path: str, method: str, signature: str = "", *args: Any) -> tuple[Any, ...]:
        interface, _, member = method.rpartition(".")
        return await self.bus.call(NAME, path, interface, member, signature, args)

    async def signals(self) -> list[tuple[Any, ...]]:
        """What has been heard since the last time."""
        # Messages of one sender keep their order, so what it sent before this reply is here.
        await self.call("/", f"{INTROSPECTABLE}.Introspect")
        heard, self.heard = self.heard, []
        return heard


@pytest.fixture(scope="module")
def shared_bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


@contextlib.asynccontextmanager
async def serving(bus: PrivateBus, *, uid: int = 0) -> AsyncIterator[tuple[FakeHost, Client]]:
    """A served host with the domain web1, and a client that passes for a user."""
    host = FakeHost()
    host.add("web1")
    service, connection = await Bus.open(bus.address), await Bus.open(bus.address)
    server = Server(host, service)  # type: ignore[arg-type]
    try:
        await server.start()
        server._callers[connection.unique_name] = Caller(uid=uid, pid=1, name="root" if uid == 0 else "somebody")
        client = Client(connection)
        for interface in (PROPERTIES, OBJECT_MANAGER, DOMAIN):
            await connection.subscribe(NAME, interface, None, None, lambda *seen: client.heard.append(seen))
        yield host, client
    finally:
        await server.close()
        assert not host.listeners
        await connection.close()
        await service.close()


def test_properties_are_read(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            assert await client.call(WEB, f"{PROPERTIES}.GetAll", "s", DOMAIN) == (
                {
                    "Name": "web1",
                    "Driver": "qemu",
                    "Uuid": "uuid-of-web1",
                    "Unit": "virtd-qemu-web1.service",
                    "State": "stopped",
                    "Reason": "never started",
                    "Since": "",
                    "Pid": 0,
                    "Id": -1,
                    "Autostart": False,
                    "Exit": {},
                },
            )
            host.exits["web1"] = {
                "code": None,
                "signal": 9,
                "cause": "killed",
                "at": "2026-01-01T00:00:00Z",
                "by": None,
            }
            assert await client.call(WEB, f"{PROPERTIES}.Get", "ss", DOMAIN, "Exit") == (
                {"signal": 9, "cause": "killed", "at": "2026-01-01T00:00:00Z"},
            )
            assert await client.call(ROOT, f"{PROPERTIES}.GetAll", "s", "") == (
                {"Version": __version__, "Domains": 1, "Running": 0},
            )

    asyncio.run(main())


def test_reading_methods(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus, uid=1000) as (host, client):
            host.add("a-b.c", state="running", pid=77, reason="started")
            assert await client.call(ROOT, f"{MANAGER}.List") == (
                [
                    ("a-b.c", "/org/virtd1/domain/a_2db_2ec", "uuid-of-a-b.c", "running", 77, "started"),
                    ("web1", WEB, "uuid-of-web1", "stopped", 0, "never started"),
                ],
            )
            assert await client.call(ROOT, f"{MANAGER}.Status") == (
                {"version": "1", "pid": 7, "recovered": {"ms": 1.5, "adopted": ["a"]}, "problems": [{"text": "t"}]},
            )
            assert (await client.call(path_of("a-b.c"), f"{DOMAIN}.Info"))[0]["pid"] == 77
            assert await client.call(WEB, f"{DOMAIN}.Dump") == ('name = "web1"\n',)
            host.forever.set()
            assert await client.call(WEB, f"{DOMAIN}.Wait", "asd", ["stopped"], 1.0) == ("stopped",)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "asked"),
    [
        (("Start",), ("start", "web1")),
        (("Stop",), ("stop", "web1")),
        (("Shutdown", "d", 2.5), ("shutdown", "web1", 2.5)),
        (("Shutdown", "d", 0.0), ("shutdown", "web1", None)),
        (("Kill", "i", 9), ("kill", "web1", 9)),
        (("Reboot", "b", True), ("reboot", "web1", True, None)),
        (("SetAutostart", "b", True), ("set_autostart", "web1", True)),
    ],
)
def test_changing_methods_reach_the_host(
    shared_bus: PrivateBus, call: tuple[Any, ...], asked: tuple[Any, ...]
) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            method, *args = call
            answer = await client.call(WEB, f"{DOMAIN}.{method}", *args)
            assert answer == (() if method == "Kill" else (True,))
            assert host.asked == [(*asked, Caller(uid=0, pid=1, name="root"))]

    asyncio.run(main())


def test_define_and_reload(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            answer = await client.call(ROOT, f"{MANAGER}.Define", "ssb", "text", "x.toml", True)
            assert answer == ("n", "u", True, "/p", ["w"])
            assert host.asked[0][:4] == ("define", "text", "x.toml", True)
            assert await client.call(ROOT, f"{MANAGER}.Reload") == (
                ["a"],
                [{"object": "qemu/b", "text": "bad", "hint": ""}],
            )

    asyncio.run(main())


def test_check_and_repair(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            row = {"kind": "slot", "object": "qemu/a", "text": "t"}
            assert await client.call(ROOT, f"{MANAGER}.Check") == ([row | {"repaired": False}], 2)
            assert await client.call(ROOT, f"{MANAGER}.Repair") == ([row | {"repaired": True}], 2)
            root = Caller(uid=0, pid=1, name="root")
            assert host.asked == [("check_all", False, root), ("check_all", True, root)]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "call", "name", "text"),
    [
        (WEB, ("Suspend",), "org.virtd1.Error.InvalidState", "it is stopped. Start it first."),
        (WEB, ("Resume",), "org.virtd1.Error.StartFailed", "crosses as its parent"),
        ("/org/virtd1/domain/no", ("Start",), "org.freedesktop.DBus.Error.UnknownObject", "no object"),
        ("/org/virtd1/domain/we_62", ("Start",), "org.freedesktop.DBus.Error.UnknownObject", "no object"),
        ("/elsewhere", ("Start",), "org.freedesktop.DBus.Error.UnknownObject", "no object"),
        (ROOT, ("Start",), "org.freedesktop.DBus.Error.UnknownInterface", "no interface org.virtd1.Domain"),
        (WEB, ("Fly",), "org.freedesktop.DBus.Error.UnknownMethod", "no method Fly"),
        (WEB, ("Kill", "s", "9"), "org.freedesktop.DBus.Error.InvalidArgs", r"takes \(i\), not \(s\)"),
    ],
)
def test_errors_have_names(shared_bus: PrivateBus, path: str, call: tuple[Any, ...], name: str, text: str) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (_, client):
            with pytest.raises(BusError, match=text) as caught:
                await client.call(path, f"{DOMAIN}.{call[0]}", *call[1:])
            assert caught.value.name == name

    asyncio.run(main())


def test_a_wrong_definition_says_where(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (_, client):
            with pytest.raises(BusError) as caught:
                await client.call(ROOT, f"{MANAGER}.Define", "ssb", "[[", "x.toml", False)
            assert caught.value.name == "org.virtd1.Error.InvalidDefinition"
            assert caught.value.message == 'x.toml: memory: expected a size. Say "256M"'

    asyncio.run(main())


def test_a_bug_is_answered_and_loud(shared_bus: PrivateBus, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            host.add("worm", uuid="bug")
            with pytest.raises(BusError, match="This is a bug in virtd"):
                await client.call(path_of("worm"), f"{DOMAIN}.Start")

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("Start", ()),
        ("Stop", ()),
        ("Suspend", ()),
        ("Resume", ()),
        ("UpgradeMachine", ()),
        ("RemoveState", ()),
        ("Undefine", ()),
        ("Kill", ("i", 9)),
        ("Shutdown", ("d", 0.0)),
        ("Reboot", ("b", False)),
        ("SetAutostart", ("b", True)),
    ],
)
def test_changing_is_for_root(shared_bus: PrivateBus, method: str, args: tuple[Any, ...]) -> None:
    async def main() -> None:
        async with serving(shared_bus, uid=1000) as (host, client):
            with pytest.raises(BusError, match=f"somebody may not call {method}") as caught:
                await client.call(WEB, f"{DOMAIN}.{method}", *args)
            assert caught.value.name == "org.virtd1.Error.AccessDenied"
            assert not host.asked
            assert "web1" in host.known

    asyncio.run(main())


def test_every_changing_method_asks_who_calls() -> None:
    """The one above has them all: a method that is added later must be added there, too."""
    listed = {
        "Start", "Stop", "Suspend", "Resume", "Undefine", "Kill", "Shutdown", "Reboot", "SetAutostart",
        "UpgradeMachine", "RemoveState",
    }  # fmt: skip
    methods = domain_objects.MEMBERS.methods.items()
    changing = {name for name, method in methods if interfaces.operation(method.operation).right is not Right.LOOK}
    assert changing == listed


def test_the_bus_says_who_calls(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, _):
            unknown = await Bus.open(shared_bus.address)
            with (
                contextlib.nullcontext() if os.getuid() == 0 else pytest.raises(BusError, match="may not call Start")
            ):
                await unknown.call(NAME, WEB, DOMAIN, "Start")
                assert host.asked == [("start", "web1", Caller(uid=0, pid=os.getpid(), name="root"))]
            await unknown.close()

    asyncio.run(main())


def test_changes_are_told(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            host.change("web1", state="running", pid=5, id=1, since="t1", reason="started")
            host.change("web1", reason="resumed")
            host.change("web1")
            assert await client.signals() == [
                (
                    WEB,
                    PROPERTIES,
                    "PropertiesChanged",
                    (DOMAIN, {"State": "running", "Pid": 5, "Id": 1, "Since": "t1", "Reason": "started"}, ["Exit"]),
                ),
                (ROOT, PROPERTIES, "PropertiesChanged", (MANAGER, {"Running": 1}, [])),
                (WEB, PROPERTIES, "PropertiesChanged", (DOMAIN, {"Reason": "resumed"}, [])),
            ]
            host.exits["web1"] = {"code": 0, "signal": None, "cause": "shutdown"}
            host.change("web1", "ended", state="stopped", pid=None, id=None, since="t2", reason="shut down")
            assert await client.signals() == [
                (
                    WEB,
                    PROPERTIES,
                    "PropertiesChanged",
                    (
                        DOMAIN,
                        {"State": "stopped", "Pid": 0, "Id": -1, "Since": "t2", "Reason": "shut down"},
                        ["Exit"],
                    ),
                ),
                (ROOT, PROPERTIES, "PropertiesChanged", (MANAGER, {"Running": 0}, [])),
                (WEB, DOMAIN, "Ended", ({"code": 0, "cause": "shutdown"},)),
            ]

    asyncio.run(main())


def test_objects_come_and_go(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            host.add("db")
            path = path_of("db")
            added, counted = await client.signals()
            assert added[:3] == (ROOT, OBJECT_MANAGER, "InterfacesAdded")
            (everything,) = await client.call(path, f"{PROPERTIES}.GetAll", "s", DOMAIN)
            assert added[3] == (path, {DOMAIN: everything})
            assert counted[3] == (MANAGER, {"Domains": 2}, [])
            (managed,) = await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects")
            assert managed[path] == {DOMAIN: everything}
            assert set(managed) == {path, WEB}
            await client.call(path, f"{DOMAIN}.Undefine")
            removed, counted = await client.signals()
            assert removed[2] == "InterfacesRemoved"
            assert removed[3][0] == path
            assert DOMAIN in removed[3][1]
            assert counted[3] == (MANAGER, {"Domains": 1}, [])
            assert set((await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects"))[0]) == {WEB}

    asyncio.run(main())


def test_properties_refuse(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (_, client):
            for path, member, args, name in (
                (WEB, "Get", ("ss", DOMAIN, "Nonsense"), "UnknownProperty"),
                (WEB, "Get", ("ss", MANAGER, "Version"), "UnknownInterface"),
                (WEB, "GetAll", ("s", "org.example"), "UnknownInterface"),
                (WEB, "Set", ("ssv", DOMAIN, "Autostart", Var("b", True)), "PropertyReadOnly"),
                ("/org", "GetAll", ("s", ""), "UnknownInterface"),
            ):
                with pytest.raises(BusError) as caught:
                    await client.call(path, f"{PROPERTIES}.{member}", *args)
                assert caught.value.name == f"org.freedesktop.DBus.Error.{name}"
            assert await client.call(WEB, f"{PROPERTIES}.GetAll", "s", INTROSPECTABLE) == ({},)

    asyncio.run(main())


def test_the_tree_can_be_walked(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (_, client):

            async def walk(path: str) -> dict[str, ET.Element]:
                (xml,) = await client.call(path, f"{INTROSPECTABLE}.Introspect")
                node = ET.fromstring(xml)
                found = {path: node}
                for child in node.findall("node"):
                    found |= await walk(f"{path.rstrip('/')}/{child.get('name')}")
                return found

            tree = await walk("/")
            assert list(tree) == [
                "/",
                "/org",
                ROOT,
                f"{ROOT}/domain",
                WEB,
                f"{ROOT}/network",
                f"{ROOT}/container",
                f"{ROOT}/pool",
            ]
            # What is described is what there is.
            (values,) = await client.call(WEB, f"{PROPERTIES}.GetAll", "s", DOMAIN)
            described = tree[WEB].find(f"interface[@name='{DOMAIN}']")
            assert described is not None
            assert {item.get("name") for item in described.findall("property")} == set(values)
            kill = described.find("method[@name='Kill']/arg")
            assert kill is not None
            assert kill.attrib == {"name": "signal", "type": "i", "direction": "in"}

    asyncio.run(main())


def test_networks_have_objects(shared_bus: PrivateBus) -> None:
    lab, interface = f"{ROOT}/network/lab", "org.virtd1.Network"

    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            networks = host.networks
            networks.nets["lab"] = NET
            for listener in host.listeners:
                listener("added", dict(NET))
            assert await client.call(lab, f"{PROPERTIES}.GetAll", "s", interface) == (
                {
                    "Name": "lab",
                    "Driver": "network",
                    "Uuid": "uuid-of-lab",
                    "State": "active",
                    "Reason": "started by root",
                    "Since": "2026-01-01T00:00:00Z",
                    "Pid": 42,
                    "Autostart": True,
                    "Mode": "nat",
                    "Bridge": "vd-lab",
                    "Addresses": ["192.168.7.1/24"],
                },
            )
            ((lease,),) = await client.call(lab, f"{interface}.Leases")
            assert lease == {"address": "192.168.7.2", "mac": "52:54:00:00:00:01"}
            assert (await client.call(lab, f"{interface}.Info"))[0]["users"] == ["qemu/web1"]
            assert await client.call(lab, f"{interface}.Start") == (True,)
            assert await client.call(lab, f"{interface}.Stop", "b", True) == (False,)
            assert networks.asked == [("start", "lab", "root"), ("stop", "lab", True)]
            default = await client.call(f"{ROOT}/network", "org.virtd1.NetworkManager.DefineDefault")
            assert default == ("default", "u", True, "/p", [])
            (managed,) = await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects")
            assert managed[lab][interface]["State"] == "active"
            for listener in host.listeners:
                listener("removed", {"name": "lab", "driver": "network"})
            heard = [(member, args[0]) for _path, _interface, member, args in await client.signals()]
            assert heard == [("InterfacesAdded", lab), ("InterfacesRemoved", lab)]

    asyncio.run(main())


def test_a_bus_that_is_lost(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        with private_bus() as bus:
            host = FakeHost()
            host.add("web1")
            service = await Bus.open(bus.address)
            closed = asyncio.Event()
            service.on_closed(closed.set)
            server = Server(host, service)  # type: ignore[arg-type]
            await server.start()
            bus.process.kill()
            await closed.wait()
            host.change("web1", state="running")
            await server.close()
            await service.close()
        # The same host, on the next bus.
        again = await Bus.open(shared_bus.address)
        server = Server(host, again)  # type: ignore[arg-type]
        await server.start()
        (answer,) = await again.call(NAME, WEB, PROPERTIES, "Get", "ss", (DOMAIN, "State"))
        assert answer == "running"
        await server.close()
        await again.close()

    asyncio.run(main())


def test_ending_answers_everybody(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        host = FakeHost()
        host.add("web1")
        service, client = await Bus.open(shared_bus.address), await Bus.open(shared_bus.address)
        server = Server(host, service)  # type: ignore[arg-type]
        await server.start()
        waiting = asyncio.create_task(client.call(NAME, WEB, DOMAIN, "Wait", "asd", (["running"], 0.0)))
        await client.call(NAME, "/", INTROSPECTABLE, "Introspect")
        # These are sent, and nobody has looked at them yet, when the end begins.
        late = [asyncio.create_task(client.call(NAME, WEB, DOMAIN, "Dump")) for _ in range(20)]
        await asyncio.sleep(0)
        await server.close()
        await service.close()
        answers = await asyncio.gather(*late, return_exceptions=True)
        # Each was answered, or was too late for this run and is left for the one that activation starts.
        unknown = "org.freedesktop.DBus.Error.ServiceUnknown"
        for answer in answers:
            assert answer == ('name = "web1"\n',) or (isinstance(answer, BusError) and answer.name == unknown), answer
        with pytest.raises(BusError, match="virtd is shutting down") as caught:
            await waiting
        assert caught.value.name == "org.virtd1.Error.Disconnected"
        await client.close()

    asyncio.run(main())


def test_the_name_is_taken(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus):
            other = await Bus.open(shared_bus.address)
            server = Server(FakeHost(), other)  # type: ignore[arg-type]
            with pytest.raises(errors.Exists):
                await server.start()
            await server.close()
            (owner,) = await other.call(DBUS, DBUS_PATH, DBUS, "NameHasOwner", "s", (NAME,))
            assert owner is True
            await other.close()

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("busctl") is None, reason="busctl is not installed")
def test_busctl_reads_it(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, _):
            host.add("a-b")

            async def busctl(*args: str) -> str:
                process = await asyncio.create_subprocess_exec(
                    "busctl", f"--address={shared_bus.address}", "--no-pager", *args, stdout=asyncio.subprocess.PIPE
                )
                out, _ = await process.communicate()
                assert process.returncode == 0
                return out.decode()

            tree = await busctl("tree", "--list", NAME)
            assert tree.split()[-6:] == [
                f"{ROOT}/container",
                f"{ROOT}/domain",
                f"{ROOT}/domain/a_2db",
                WEB,
                f"{ROOT}/network",
                f"{ROOT}/pool",
            ]
            lines = (await busctl("introspect", NAME, WEB)).splitlines()
            state = next(line.split() for line in lines if line.startswith(".State"))
            assert state == [".State", "property", "s", '"stopped"', "emits-change"]
            assert await busctl("call", NAME, WEB, DOMAIN, "Dump") == r's "name = \"web1\"\n"' + "\n"

    asyncio.run(main())


def test_calls_leak_nothing(shared_bus: PrivateBus) -> None:
    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * (os.sysconf("SC_PAGESIZE") // 1024)

    async def main() -> None:
        async with serving(shared_bus) as (host, client):

            async def calls(number: int) -> None:
                for _ in range(number):
                    await client.call(WEB, f"{PROPERTIES}.GetAll", "s", DOMAIN)
                    await client.call(WEB, f"{DOMAIN}.Kill", "i", 9)
                    host.asked.clear()

            await calls(500)
            before = resident()
            await calls(1000)
            assert resident() - before < 200

    asyncio.run(main())
