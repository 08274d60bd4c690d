# SPDX-License-Identifier: LGPL-2.1-or-later
"""A driver that isn't virtd's own shows wherever virtd's do: virtdctl, Varlink and D-Bus."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import toydriver
from tests.doubles.private_bus import private_bus
from tests.doubles.whole_host import ROOT, World, on_loop, until
from tests.unit.api.test_dbus_api import Client as Caller
from tests.unit.api.test_varlink import Client
from virtd.api import dbus, varlink
from virtd.api.introspection import PROPERTIES
from virtd.cli import main
from virtd.systemd.bus import Bus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtd.host import Host

pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")  # of gi

PROGRAM = """import sys
print('hello', flush=True)
for line in sys.stdin:
    print(line, end='', flush=True)
"""
# virtdctl in a process of its own, which has to know the noun.
CONSOLE = """import sys
from virtd.cli import main
main.NOUNS["toy"] = ("tests.toydriver.cli", "")
sys.exit(main.main())
"""
TOP = Path(__file__).resolve().parents[2]
TREE = Path(toydriver.__file__).parent
TOY = "org.virtd1.Toy"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    toydriver.register(monkeypatch)
    world = World(tmp_path, monkeypatch)
    for base in (world.paths.etc, world.paths.run, world.paths.log):
        os.makedirs(f"{base}/toy")
    monkeypatch.setattr(varlink, "caller_of", lambda _connection: ROOT)
    yield world
    world.close()


def definition(tmp_path: Path) -> str:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nprint('hello', flush=True)\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"
    )
    return f'name = "one"\ncommand = ["{sys.executable}", "-I", "-S", "{program}"]\n'


async def console(path: str, name: str, typed: bytes) -> None:
    """`virtdctl toy console`, with `typed` and the escape sequence coming from a terminal, until it ends."""
    master, slave = os.openpty()
    command = [sys.executable, "-c", CONSOLE, "toy", "console", name, f"--address={path}"]
    process = await asyncio.create_subprocess_exec(*command, cwd=TOP, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""

    async def expect(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += await asyncio.to_thread(os.read, master, 4096)

    try:
        async with asyncio.timeout(60):
            await expect(b"Connected to toy one.")
            os.write(master, typed)
            await expect(typed.strip())
            os.write(master, b"\x1d")
            assert await process.wait() == 0, seen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(master)


@on_loop
async def test_virtdctl_and_varlink(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "v.sock")
    file = tmp_path / "one.toml"
    file.write_text(definition(tmp_path))

    async def virtdctl(*words: str) -> str:
        """What it prints; it has to be content."""
        status = await asyncio.to_thread(main.main, [f"--address={path}", *words])
        out, err = capfd.readouterr()
        assert status == 0, err
        return out

    async with world.daemon() as host:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(5)
            server = varlink.Server(host, listener)
            server.start()
            client = Client(path)
            try:
                await virtdctl("toy", "define", str(file))
                await virtdctl("toy", "start", "one")
                await until(lambda: world.console("one", "toy") == "hello\n")
                assert "running" in await virtdctl("toy", "list")
                (row,) = json.loads(await virtdctl("toy", "list", "--json"))
                assert (row["driver"], row["state"]) == ("toy", "running")
                assert "virtd-toy-one.service" in await virtdctl("toy", "info", "one")
                assert await virtdctl("toy", "log", "one") == "hello\n"
                assert json.loads(await virtdctl("fsck", "--json"))["differences"] == []
                assert json.loads(await virtdctl("status", "--json"))["objects"]["toy"]["running"] == 1
                description = await client.call("org.varlink.service.GetInterfaceDescription", {"interface": TOY})
                assert description is not None
                assert description["parameters"]["description"].startswith("# Toys.")
                begun = await client.call("org.virtd1.Subscribe", {}, more=True)
                assert begun is not None
                await console(path, "one", b"typed\n")
                assert await asyncio.to_thread(world.console, "one", "toy") == "hello\ntyped\n"
                await virtdctl("toy", "stop", "one")
                change = await client.receive()
                assert change is not None
                about = change["parameters"]
                assert (about["kind"], about["name"], about["state"]) == ("toy", "one", "stopping")
                assert "stopped by" in await virtdctl("toy", "info", "one")
            finally:
                client.close()
                await server.close()


@on_loop
async def test_dbus(world: World, tmp_path: Path) -> None:
    with private_bus() as private:
        async with world.daemon() as host:
            await host.supervised("toy").define(definition(tmp_path), "test", check=False, by=ROOT)
            service, connection = await Bus.open(private.address), await Bus.open(private.address)
            server = dbus.Server(host, service)
            try:
                await server.start()
                server._callers[connection.unique_name] = ROOT
                await _calls(host, Caller(connection))
            finally:
                await server.close()
                await connection.close()
                await service.close()


async def _calls(host: Host, caller: Any) -> None:
    one = f"{dbus.ROOT}/toy/one"
    (xml,) = await caller.call(one, "org.freedesktop.DBus.Introspectable.Introspect")
    assert f'<interface name="{TOY}">' in xml
    assert await caller.call(one, f"{TOY}.Start") == (True,)
    (seen,) = await caller.call(one, f"{PROPERTIES}.GetAll", "s", TOY)
    assert (seen["Driver"], seen["State"], seen["Unit"]) == ("toy", "running", "virtd-toy-one.service")
    assert await caller.call(one, f"{TOY}.Stop") == (True,)
    (objects,) = await caller.call(dbus.ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects")
    assert objects[one][TOY]["State"] == "stopped"
    assert (await host.supervised("toy").info("one"))["exit"]["cause"] == "stop"


def test_it_is_small() -> None:
    """What a driver takes, with its model, its noun and all of its front ends."""
    lines = sum(len(path.read_text().splitlines()) for path in TREE.iterdir() if path.is_file())
    assert lines <= 250, lines
