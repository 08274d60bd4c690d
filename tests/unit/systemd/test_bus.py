# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtd.systemd.bus against a real dbus-daemon, with the real pydbus and gi."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.private_bus import PrivateBus, private_bus
from virtd import errors
from virtd.systemd.bus import DBUS, DISCONNECTED, Bus, BusError, MethodCall, Var
from virtd.systemd.bus.signals import Signals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# PyGObject 3.42's importer is of a kind that Python 3.11 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

SERVICE = "org.example.Service"
TARGET = (SERVICE, "/x", "org.example")


@pytest.fixture(scope="module")
def shared_bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


def serve(call: MethodCall) -> None:
    match call.member:
        case "Echo":
            call.reply(call.signature, *call.args)
        case "Repr":
            call.reply("s", repr(call.args))
        case "Write":
            fd, text = call.args
            os.write(fd, text.encode())
            os.close(fd)
            call.reply()
        case "Dictionary":
            call.reply("a{sv}", {"a": Var("as", ["b"]), "c": Var("a{sv}", {"d": Var("u", 1)})})
        case "Fail":
            call.error("org.example.Error.Broken", "it is 100%s broken")
        case "Silence":
            pass


@contextlib.asynccontextmanager
async def pair(bus: PrivateBus) -> AsyncIterator[tuple[Bus, Bus]]:
    """A client, and a service that owns SERVICE."""
    client, service = await Bus.open(bus.address), await Bus.open(bus.address)
    try:
        service.serve(serve)
        await service.own_name(SERVICE)
        yield client, service
    finally:
        await client.close()
        await service.close()


def resident() -> int:
    """kB of memory that this process has in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * (os.sysconf("SC_PAGESIZE") // 1024)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("virtd.systemd.bus, virtd.systemd.units", ("gi", "pydbus")),
        # What a restart waits for, READY=1 being before D-Bus.
        ("virtd.daemon, virtd.drivers.qemu.driver", ("gi", "pydbus", "virtd.systemd.bus", "virtd.systemd.units")),
    ],
)
def test_what_comes_before_the_bus_is_imported_without_it(imported: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {imported}; print(*(name for name in {absent!r} if name in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []


@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ("", ()),
        ("s", ("grüße",)),
        ("sa(su)b", ("x", [("y", 1), ("z", 2)], True)),
        ("a{sas}", ({"k": ["v", "w"]},)),
        ("aybnqiuxtd", ([1, 2], False, -1, 1, -2, 2, -(2**40), 2**63, 0.5)),
    ],
)
def test_values_pass_both_ways(shared_bus: PrivateBus, signature: str, values: tuple[Any, ...]) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            assert await client.call(*TARGET, "Echo", signature, values) == values

    asyncio.run(main())


def test_variants(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            assert await client.call(*TARGET, "Dictionary") == ({"a": ["b"], "c": {"d": 1}},)
            seen = await client.call(*TARGET, "Repr", "a(sv)", ([("a", Var("t", 7)), ("b", Var("as", ["c"]))],))
            assert seen == ("([('a', 7), ('b', ['c'])],)",)

    asyncio.run(main())


def test_of_a_large_table_only_what_is_asked_for_is_unpacked(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            rows = [(f"row {number}", number, "x" * number) for number in range(100)]
            table = await client.table(*TARGET, "Echo", "a(sus)", (rows,))
            assert table.rows((0, 1, 2)) == rows
            assert table.rows((1,), {"row 7", "row 70", "row 700"}) == [(7,), (70,)]
            with pytest.raises(BusError) as caught:
                await client.table(*TARGET, "Fail")
            assert caught.value.name == "org.example.Error.Broken"

    asyncio.run(main())


def test_descriptors_pass(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            read, write = os.pipe()
            try:
                await client.call(*TARGET, "Write", "hs", (0, "through the pipe"), fds=(write,))
            finally:
                os.close(write)
            # The end comes only when every copy of the other end is closed: GDBus's too.
            with open(read) as file:
                assert file.read() == "through the pipe"

    asyncio.run(main())


def test_an_error_keeps_its_name(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            with pytest.raises(BusError, match="it is 100%s broken") as caught:
                await client.call(*TARGET, "Fail")
            assert caught.value.name == "org.example.Error.Broken"
            with pytest.raises(BusError) as caught:
                await client.call("org.example.Nobody", "/x", "org.example", "Echo")
            assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"

    asyncio.run(main())


def test_calls_overlap(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, service):
            waiting: list[MethodCall] = []

            def answer_all_at_fifty(call: MethodCall) -> None:
                waiting.append(call)
                if len(waiting) == 50:
                    # In the opposite order, so that replies have to find their calls.
                    for each in reversed(waiting):
                        each.reply("u", *each.args)

            service.serve(answer_all_at_fifty)
            calls = [client.call(*TARGET, "Count", "u", (number,)) for number in range(50)]
            assert await asyncio.gather(*calls) == [(number,) for number in range(50)]

    asyncio.run(main())


def test_a_call_can_time_out_or_be_cancelled(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            with pytest.raises(errors.TimedOut, match=r"org\.example\.Silence"):
                await client.call(*TARGET, "Silence", timeout=0.05)
            task = asyncio.create_task(client.call(*TARGET, "Silence"))
            await client.call(*TARGET, "Echo")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not client._pending
            assert await client.call(*TARGET, "Echo", "s", ("still there",)) == ("still there",)

    asyncio.run(main())


def test_without_a_service_there_is_nothing_to_call(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, service):
            service.serve(None)
            with pytest.raises(BusError) as caught:
                await client.call(*TARGET, "Echo")
            assert caught.value.name == "org.freedesktop.DBus.Error.UnknownMethod"
            assert await client.call(SERVICE, "/", "org.freedesktop.DBus.Peer", "Ping") == ()

    asyncio.run(main())


def test_signals_count_only_from_their_sender(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, service):
            stranger = await Bus.open(shared_bus.address)
            got: list[tuple[str, str, str, tuple[Any, ...]]] = []
            unsubscribe = await client.subscribe(
                SERVICE, "org.example", "Happened", "/x", lambda *seen: got.append(seen)
            )
            # The broadcast reaches the client once its rule matches the stranger too, as somebody else's might.
            also = await client.subscribe(None, "org.example", None, None, lambda *_: None)
            stranger.emit("/x", "org.example", "Happened", "s", "forged")
            service.emit("/y", "org.example", "Happened", "s", "elsewhere")
            service.emit("/x", "org.example", "Other", "s", "another")
            service.emit("/x", "org.example", "Happened", "s", "true")
            # Messages of one sender keep their order, so what was sent before the reply is here.
            await stranger.call(*TARGET, "Echo")
            await client.call(stranger.unique_name, "/", "org.freedesktop.DBus.Peer", "Ping")
            await client.call(*TARGET, "Echo")
            assert got == [("/x", "org.example", "Happened", ("true",))]
            await unsubscribe()
            await also()
            service.emit("/x", "org.example", "Happened", "s", "later")
            await client.call(*TARGET, "Echo")
            assert len(got) == 1
            await stranger.close()

    asyncio.run(main())


def test_a_subscription_outlives_the_sender(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        client = await Bus.open(shared_bus.address)
        got: list[Any] = []
        # Nobody has the name yet, and later somebody else has it.
        await client.subscribe(SERVICE, "org.example", "Happened", None, lambda *seen: got.append(seen[3]))
        for text in ("first", "second"):
            service = await Bus.open(shared_bus.address)
            service.serve(serve)
            await service.own_name(SERVICE)
            service.emit("/x", "org.example", "Happened", "s", text)
            await client.call(*TARGET, "Echo")
            await service.close()
        await client.close()
        assert got == [("first",), ("second",)]

    asyncio.run(main())


def test_a_name_is_held(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, service):
            with pytest.raises(errors.Exists):
                await client.own_name(SERVICE)
            # With every flag that a thief can set: allow replacement, replace, do not queue.
            (answer,) = await client.call(
                "org.freedesktop.DBus", "/", "org.freedesktop.DBus", "RequestName", "su", (SERVICE, 7)
            )
            assert answer == 3
            await service.release_name(SERVICE)
            await client.own_name(SERVICE)

    asyncio.run(main())


def test_the_bus_goes_away() -> None:
    async def main() -> None:
        with private_bus() as bus:
            client = await Bus.open(bus.address)
            other = await Bus.open(bus.address)
            closed = asyncio.Event()
            client.on_closed(closed.set)
            call = asyncio.create_task(client.call(other.unique_name, "/x", "org.example", "Silence"))
            other.serve(serve)
            await asyncio.sleep(0)
            bus.process.kill()
            await closed.wait()
            with pytest.raises(BusError) as caught:
                await call
            assert caught.value.name == DISCONNECTED
            with pytest.raises(BusError):
                await client.call(*TARGET, "Echo")
            client.emit("/x", "org.example", "Happened")
            await client.close()
            await client.close()
            await other.close()

    asyncio.run(main())


def test_there_is_no_bus() -> None:
    async def main() -> None:
        with pytest.raises(errors.HostError, match="no D-Bus at unix:path=/nonexistent"):
            await Bus.open("unix:path=/nonexistent")

    asyncio.run(main())


def test_nothing_is_left_behind(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with pair(shared_bus) as (client, _):
            await client.call(*TARGET, "Echo")
        descriptors = len(os.listdir("/proc/self/fd"))
        threads = threading.active_count()
        for _ in range(10):
            async with pair(shared_bus) as (client, _):
                await client.call(*TARGET, "Echo")
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert threading.active_count() <= threads

    asyncio.run(main())


CLOSINGS = """
import asyncio, sys
from virtd.systemd.bus import Bus

async def main():
    client = await Bus.open(sys.argv[1])
    await client.subscribe("org.example", "org.example", "Happened", None, lambda *_: None)
    for _ in range(500):
        bus = await Bus.open(sys.argv[1])
        await bus.own_name("org.example")
        bus.emit("/x", "org.example", "Happened", "s", "text")
        await bus.close()
    await client.close()

asyncio.run(main())
"""


def test_a_close_waits_for_no_lock(shared_bus: PrivateBus) -> None:
    """In a process of its own: one that stands still in GLib with the GIL can't even fail."""
    subprocess.run([sys.executable, "-c", CLOSINGS, shared_bus.address], check=True, timeout=120)


def test_calls_leak_nothing(shared_bus: PrivateBus) -> None:
    """2,000 calls, answered in this very process; where PyGObject leaks, it is 3 kB for each."""

    async def main() -> None:
        async with pair(shared_bus) as (client, _):

            async def calls(number: int) -> None:
                for _ in range(number):
                    await client.call(*TARGET, "Repr", "sa{sv}", ("x" * 1000, {"y": Var("u", 1)}))

            await calls(1000)
            gc.collect()
            before = resident()
            await calls(2000)
            gc.collect()
            assert resident() - before < 200

    asyncio.run(main())


def test_an_owner_that_changes_while_it_is_asked_for() -> None:
    """The signal may be handled before whoever waits for the answer goes on: PID 1 has re-executed itself."""
    heard: list[str] = []

    class Changed:
        def __init__(self, sender: str, member: str) -> None:
            self.get_sender = lambda: sender
            self.get_path = lambda: "/a"
            self.get_interface = lambda: DBUS if sender == DBUS else "a.B"
            self.get_member = lambda: member

    async def call(method: str, _signature: str, *_arguments: Any) -> tuple[Any, ...]:
        if method == "GetNameOwner":
            signals.receive(Changed(DBUS, "NameOwnerChanged"), lambda _message: ("a.b", ":1", ":2"))
        return (":1",)

    signals = Signals(call)
    asyncio.run(signals.subscribe("a.b", "a.B", "C", "/a", lambda *_: heard.append("C")))
    signals.receive(Changed(":2", "C"), lambda _message: ())
    assert heard == ["C"]
