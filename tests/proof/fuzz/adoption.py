# SPDX-License-Identifier: LGPL-2.1-or-later
"""A start of the daemon that finds such a record: it says what is wrong with it, and starts; the object is described.

The first byte says which driver's it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from typing import TYPE_CHECKING, Any, cast

import msgspec

from virtd import journal
from virtd.children.child import Services
from virtd.drivers.loader import MODULES, Drivers
from virtd.fdstore import Store
from virtd.logs.pump import Pump
from virtd.model.settings import Log, Settings
from virtd.paths import Paths

if TYPE_CHECKING:
    from virtd.objects.inventory import Inventory

DRIVERS = tuple(sorted(MODULES))
BRIEF = 150


def _seed(driver: str, name: str = "web1", **changes: Any) -> bytes:
    record = {
        "driver": driver, "name": name, "uuid": "6f9619ff-8b86-d011-b42d-00c04fc964ff", "state": "running",
        "reason": "started", "since": "2026-11-01T00:00:00.000000Z", "schema": 1, "id": 3,
        "unit": f"virtd-{driver}-{name}.service", "invocation_id": "00", "main_pid": 4000000, "main_start": 5,
        "boot_id": "b", "slots": {f"{driver}/{name}/stderr": "9:12"}, "data": {}, "exit": None,
    }  # fmt: skip
    return bytes([DRIVERS.index(driver)]) + msgspec.json.encode(record | changes)


_DOMAIN = 'name = "web1"\nmemory = "64M"\n[boot]\nkernel = "/k"\n'
_CONTAINER = 'name = "web1"\nrootfs = "/srv/web1"\n'
_NETWORK = 'name = "web1"\n[ipv4]\naddress = "10.9.0.1/24"\n'
SEEDS = (
    _seed(
        "qemu",
        data={
            "definition": _DOMAIN, "parsed_by": "0", "parsed": {"name": "web1"},
            "stderr": {"file": "1:2", "offset": 3},
            "request": {"verb": "stop", "by": "root", "at": "2026"}, "owners": [["/a", 0, 0]], "macs": [["a", "b"]],
            "console": {"token": "a", "by": "root"}, "volumes": [["p", "v"]],
        },
    ),
    # Once nobody could ask about any such object.
    *(_seed(driver, state=state, data={"definition": {"a": 1}}) for driver, state in
      (("qemu", "running"), ("lxc", "running"), ("network", "active"), ("storage", "active"))),
    # A newer version's state, or a damaged one, cost the whole listing.
    *(_seed(driver, state="unheard of") for driver in ("qemu", "lxc", "network", "storage")),
    _seed("storage", "job-1", state="unheard of"),
    _seed("qemu", state="crashed", main_pid=0, exit={"cause": "oom", "at": "2026", "signal": "SIGKILL"}),
    _seed("lxc", data={"definition": _CONTAINER, "root": "/srv/web1", "ids": [100000, 65536], "macs": [["a", "b"]]}),
    _seed("lxc", data={"definition": _CONTAINER, "macs": [["a", ",", "b"], 3, [1, 2]]}),
    _seed("lxc", data={"definition": _CONTAINER, "macs": 5}),
    _seed("network", state="active", data={"definition": _NETWORK, "rules": "a", "bridge": "b", "ports": []}),
    _seed("storage", state="active", data={"definition": 'name = "web1"\npath = "/srv"\n'}),
    _seed(
        "storage", "web1", state="running",
        data={"task": {"verb": "import", "pool": "p", "volume": "v", "by": "root", "meta": None}},
    ),
)  # fmt: skip
WORDS = (
    b'"definition":', b'"parsed":', b'"stderr":', b'"file":', b'"offset":', b'"request":', b'"root":', b'"ids":',
    b'"macs":', b'"task":', b'"meta":', b'"console":', b'"rules":', b'"volumes":', b'"running"', b'"starting"',
    b'"stopped"', b'"crashed"', b'"active"', b'"inactive"', b'"paused"', b'"waiting"', b'"done"', b'"verb":',
)  # fmt: skip


def target(data: bytes) -> None:
    if data:
        asyncio.run(_adopt(DRIVERS[data[0] % len(DRIVERS)], data[1:]))


async def _adopt(name: str, raw: bytes) -> None:
    said = journal.send
    journal.send = lambda *_args, **_fields: None
    logging.disable()
    try:
        with tempfile.TemporaryDirectory() as root:
            await _restore(Paths(root), name, raw)
    finally:
        journal.send = said
        logging.disable(logging.NOTSET)


async def _restore(paths: Paths, name: str, raw: bytes) -> None:
    loop = asyncio.get_running_loop()
    for directory in (f"{paths.etc}/{name}", f"{paths.run}/{name}", f"{paths.log}/{name}", paths.lib):
        os.makedirs(directory)
    stem = "job-web1" if b'"task"' in raw else "web1"
    with open(paths.record(name, stem), "wb") as file:
        file.write(raw.replace(b'"name":"web1"', f'"name":"{stem}"'.encode()) if stem != "web1" else raw)
    store = Store({}, None)
    pump = Pump(loop.call_soon_threadsafe)
    services = Services(paths, store, pump, Log(), _no_units)
    drivers = Drivers(services, Settings(), lambda _driver: lambda _event, _name: None, lambda made: made.restore())
    driver = cast("Inventory[Any, Any]", drivers.get(name))
    try:
        driver.restore_records()
        driver.load_definitions()
        for one in driver.objects.values():
            # Replies are JSON.
            msgspec.json.encode(driver.describe(one))
            if (fully := getattr(driver, "describe_fully", None)) is not None:
                msgspec.json.encode(fully(one))
        for job in getattr(driver, "jobs", ()):
            msgspec.json.encode(job.describe())
        driver.counts()
        driver.live()
    finally:
        await asyncio.gather(*(one.close() for one in drivers))
        pump.close()
        store.close()


async def _no_units() -> Any:
    raise AssertionError("the first step of a start asks nobody")
