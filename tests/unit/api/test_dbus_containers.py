# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers on D-Bus: their whole life, over a real host with a stand-in for LXC, on a dbus-daemon that is real."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.api.test_dbus_api import Client, shared_bus
from tests.unit.drivers.lxc.test_container_restarts import Site
from virtd.api.dbus import NAME, ROOT, Server
from virtd.api.introspection import OBJECT_MANAGER, PROPERTIES
from virtd.host import Caller
from virtd.systemd.bus import Bus, BusError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.doubles.private_bus import PrivateBus

__all__ = ["shared_bus"]

pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

CONTAINER, MANAGER = "org.virtd1.Container", "org.virtd1.ContainerManager"
PATH = f"{ROOT}/container/web1"


def test_a_whole_life(shared_bus: PrivateBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch)
    text = f'name = "web1"\nrootfs = "{site.root}"\nprivileged = true\n'

    async def main() -> None:
        async with site.world.daemon() as host:
            service, connection = await Bus.open(shared_bus.address), await Bus.open(shared_bus.address)
            server = Server(host, service)
            try:
                await server.start()
                server._callers[connection.unique_name] = Caller(uid=0, pid=1, name="root")
                client = Client(connection)
                for interface in (PROPERTIES, OBJECT_MANAGER, CONTAINER):
                    await connection.subscribe(NAME, interface, None, None, lambda *seen: client.heard.append(seen))
                await life(client)
                # Whoever isn't root looks on.
                server._callers[connection.unique_name] = Caller(uid=1000, pid=1, name="somebody")
                await undefined_by_root_only(client)
                server._callers[connection.unique_name] = Caller(uid=0, pid=1, name="root")
                await client.call(PATH, f"{CONTAINER}.Undefine")
                _, _, member, (path, interfaces) = (await client.signals())[-1]
                assert (member, path) == ("InterfacesRemoved", PATH)
                assert CONTAINER in interfaces
            finally:
                await server.close()
                await connection.close()
                await service.close()

    async def state(client: Client) -> str:
        (value,) = await client.call(PATH, f"{PROPERTIES}.Get", "ss", CONTAINER, "State")
        return str(value)

    async def do(client: Client, member: str, signature: str = "", *args: Any) -> tuple[Any, ...]:
        return await client.call(PATH, f"{CONTAINER}.{member}", signature, *args)

    async def life(client: Client) -> None:
        arguments = (text, "web1.toml", False)
        name, _, created, path, warnings = await client.call(
            f"{ROOT}/container", f"{MANAGER}.Define", "ssb", *arguments
        )
        assert (name, created, warnings) == ("web1", True, [])
        with open(path) as file:
            assert text in file.read()
        with pytest.raises(BusError, match="rootfs"):
            await client.call(f"{ROOT}/container", f"{MANAGER}.Define", "ssb", 'name = "x"\n', "x", False)
        (managed,) = await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects")
        assert managed[PATH][CONTAINER]["State"] == "stopped"
        with pytest.raises(BusError, match="Cannot freeze web1"):
            await do(client, "Freeze")
        assert await do(client, "Start") == (True,)
        assert await do(client, "Start") == (False,)
        (shown,) = await client.call(PATH, f"{PROPERTIES}.GetAll", "s", CONTAINER)
        assert (shown["State"], shown["Unit"]) == ("running", "virtd-lxc-web1.service")
        assert "Addresses" in shown  # this host's own: there is no network namespace here
        assert await do(client, "Info") != ({},)
        assert text in (await do(client, "Dump"))[0]
        assert await do(client, "Freeze") == (True,)
        assert await state(client) == "paused"
        assert await do(client, "Thaw") == (True,)
        assert await do(client, "Wait", "asd", ["running"], 5.0) == ("running",)
        assert await do(client, "Reboot", "d", 20.0) == (True,)
        (again,) = await client.call(PATH, f"{PROPERTIES}.Get", "ss", CONTAINER, "Pid")
        assert again not in (0, shown["Pid"])
        assert await do(client, "SetAutostart", "b", True) == (True,)
        await client.signals()
        assert await do(client, "Shutdown", "d", 20.0) == (True,)
        *_, ended = [args for _, _, member, args in await client.signals() if member == "Ended"]
        assert (ended[0]["cause"], ended[0]["by"]) == ("shutdown", "root")
        (exit_,) = await client.call(PATH, f"{PROPERTIES}.Get", "ss", CONTAINER, "Exit")
        assert exit_ == ended[0]
        assert await do(client, "Start") == (True,)
        await do(client, "Kill", "i", int(signal.SIGKILL))
        *_, ended = [args for _, _, member, args in await client.signals() if member == "Ended"]
        assert (ended[0]["cause"], ended[0]["signal"]) == ("killed", "SIGKILL")
        assert await do(client, "Start") == (True,)
        assert await do(client, "Stop") == (True,)
        assert await state(client) == "stopped"

    async def undefined_by_root_only(client: Client) -> None:
        assert await state(client) == "stopped"
        assert (await do(client, "Info"))[0]["state"] == "stopped"
        for member, signature, args in (("Start", "", ()), ("Undefine", "", ()), ("SetAutostart", "b", (False,))):
            with pytest.raises(BusError, match=f"may not call {member}"):
                await do(client, member, signature, *args)

    try:
        asyncio.run(main())
    finally:
        site.world.close()
