# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus front end and those who mean it no good, over a bus: floods, callers that leave, text that is none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.private_bus import PrivateBus, private_bus
from tests.unit.api.test_dbus_api import WEB, serving
from virtd import errors
from virtd.api import door
from virtd.api.domain_objects import DOMAIN
from virtd.api.introspection import MANAGER, OBJECT_MANAGER, PEER
from virtd.systemd.bus import Bus, BusError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = "/org/virtd1"

# As in test_dbus_api.
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")


@pytest.fixture(scope="module")
def shared_bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        yield bus


def test_text_that_is_none_costs_nobody_anything(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            host.add("web2", reason="image \udcff.img")
            host.add("web3", pid=1 << 70)
            host.change("web2", reason="another \udcfe")
            (objects,) = await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects")
            assert objects[f"{ROOT}/domain/web2"][DOMAIN]["Reason"] == "another \\xfe"
            assert WEB in objects
            (info,) = await client.call(f"{ROOT}/domain/web2", f"{DOMAIN}.Info")
            assert info["reason"] == "another \\xfe"
            heard = await client.signals()
            assert [event[2] for event in heard].count("InterfacesAdded") >= 1

            async def fail(**_: Any) -> Any:
                raise errors.HostError("no \udcff")

            host.reload = fail  # type: ignore[method-assign]
            with pytest.raises(BusError, match=r"no \\xff"):
                await client.call(ROOT, f"{MANAGER}.Reload")

    asyncio.run(main())


def test_what_costs_much_is_found_out_once(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        for uid, times in ((1000, 1), (0, 3)):
            async with serving(shared_bus, uid=uid) as (host, client):
                for _ in range(3):
                    assert (await client.call(ROOT, f"{MANAGER}.Check"))[1] == 2
                assert len(host.asked) == times

    asyncio.run(main())


def test_a_wait_ends_when_its_caller_leaves_the_bus(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus) as (host, _client):
            cancelled = asyncio.Event()

            async def wait(*_: Any) -> Any:
                try:
                    await host.forever.wait()
                finally:
                    cancelled.set()

            host.domains.wait = wait  # type: ignore[assignment]
            caller = await Bus.open(shared_bus.address)
            call = asyncio.create_task(caller.call("org.virtd1", WEB, DOMAIN, "Wait", "asd", (["crashed"], 0.0)))
            await asyncio.sleep(0.2)
            await caller.close()
            await asyncio.gather(call, return_exceptions=True)
            async with asyncio.timeout(20):
                await cancelled.wait()

    asyncio.run(main())


def test_a_flood_is_refused_and_root_gets_through(shared_bus: PrivateBus) -> None:
    async def main() -> None:
        async with serving(shared_bus, uid=1000) as (host, client):
            root = await Bus.open(shared_bus.address)

            async def wait(*_: Any) -> Any:
                await host.forever.wait()

            host.domains.wait = wait  # type: ignore[assignment]
            calls = [
                asyncio.create_task(client.call(WEB, f"{DOMAIN}.Wait", "asd", ["crashed"], 0.0)) for _ in range(100)
            ]
            done, waiting = await asyncio.wait(calls, timeout=1)
            assert len(waiting) == door.SENDER
            assert all("LimitsExceeded" in getattr(task.exception(), "name", "") for task in done)
            await root.call("org.virtd1", ROOT, PEER, "Ping")
            (rows,) = await root.call("org.virtd1", ROOT, MANAGER, "List")
            assert len(rows) == 1
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await root.close()

    asyncio.run(main())


def test_strangers_signals_end_in_the_other_thread(shared_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        listener, stranger = await Bus.open(shared_bus.address), await Bus.open(shared_bus.address)
        seen: list[Any] = []
        link = listener._link
        receive = link._receive

        def note(message: Any) -> None:
            seen.append(message)
            receive(message)

        monkeypatch.setattr(link, "_receive", note)
        gio = stranger.codec.gio
        for _ in range(100):
            message = gio.DBusMessage.new_signal("/x", "org.example", "Noise")
            message.set_destination(listener.unique_name)
            stranger.send(message)
        await stranger.flush()
        await listener.flush()
        assert len([message for message in seen if message.get_interface() == "org.example"]) == 0
        await stranger.close()
        await listener.close()

    asyncio.run(main())
