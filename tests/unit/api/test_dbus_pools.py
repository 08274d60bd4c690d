# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools, volumes and jobs on D-Bus, over a host that is made up, on a dbus-daemon that is real."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tests.doubles.private_bus import PrivateBus
from tests.unit.api.test_dbus_api import FakeHost, serving, shared_bus
from virtd.api.dbus import ROOT
from virtd.api.introspection import OBJECT_MANAGER, PROPERTIES
from virtd.api.pool_objects import POOL, POOL_MANAGER
from virtd.errors import InvalidDefinition
from virtd.host import Caller, WithDescriptors
from virtd.replies.storage import Downloading, Uploading
from virtd.systemd.bus import BusError

__all__ = ["shared_bus"]

pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")

PATH = f"{ROOT}/pool/default"
ITEM: dict[str, Any] = {
    "name": "default",
    "driver": "storage",
    "uuid": "u",
    "state": "active",
    "reason": "started by root",
    "since": "2026-01-01T00:00:00Z",
    "autostart": True,
    "type": "directory",
    "path": "/srv/p",
    "capacity": 10 << 30,
    "allocation": 1 << 30,
    "available": 9 << 30,
}
JOB = {"job": "job-1", "verb": "import", "state": "running", "progress": 42.5, "error": "", "pid": None}


class FakePools:
    """One pool, and a note of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.item = dict(ITEM)

    async def listing(self) -> list[dict[str, Any]]:
        return [self.item]

    async def info(self, name: str) -> dict[str, Any]:
        return self.item | {"persistent": True, "problems": []}

    async def start(self, name: str, *, by: Caller) -> dict[str, Any]:
        self.asked.append(("start", name, by.name))
        return {"name": name, "changed": False}


class FakeVolumes:
    """Each call is answered with a job, and noted."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def listing(self, pool: str) -> list[dict[str, Any]]:
        return [{"name": "web1", "capacity": 1 << 40, "job": None}]

    async def snapshots(self, pool: str, name: str) -> list[dict[str, Any]]:
        return [{"id": "1", "name": "before", "at": 7, "state": 0}]

    async def create(self, pool: str, name: str, size: str | None = None, **more: Any) -> dict[str, Any]:
        self.asked.append(("create", pool, name, size, more.get("format")))
        return {"job": ""}

    async def import_(self, pool: str, name: str, file: str | None = None, **more: Any) -> dict[str, Any]:
        if "source_format" not in more:
            raise InvalidDefinition("image", "from", "expected the format of /x")
        self.asked.append(("import", pool, name, file, more["source_format"], more.get("format"), more["by"].name))
        return {"job": "job-1"}

    async def upload(
        self,
        pool: str,
        name: str,
        *,
        format: str | None = None,  # noqa: A002
        size: int | None = None,
        resume: bool = False,
        by: Caller,
    ) -> WithDescriptors:
        self.asked.append(("upload", pool, name, format, size, resume))
        read, write = os.pipe2(os.O_CLOEXEC)
        self.read = read
        return WithDescriptors(Uploading(pool=pool, volume=name, job="job-1", offset=5 << 30), [write])

    async def uploaded(self, job: str, *, by: Caller) -> dict[str, Any]:
        with open(self.read, "rb") as pipe:
            self.asked.append(("uploaded", job, pipe.read()))  # to its end: nobody else has it open
        return {"job": ""}

    async def download(self, pool: str, name: str, *, by: Caller) -> WithDescriptors:
        fd = os.memfd_create(name)
        os.write(fd, b"content")
        return WithDescriptors(Downloading(pool=pool, volume=name, format=None), [fd])

    async def jobs(self) -> list[dict[str, Any]]:
        return [JOB]

    async def wait(self, job: str, timeout: float | None) -> dict[str, Any]:
        return JOB | {"job": job, "state": "done", "progress": 100.0}

    async def cancel(self, job: str, *, by: Caller) -> dict[str, Any]:
        self.asked.append(("cancel", job))
        return {"job": job, "changed": True}


class Host(FakeHost):
    """With storage."""

    def __init__(self) -> None:
        super().__init__()
        self.drivers = ("storage",)
        self.pools = FakePools()
        self.volumes = FakeVolumes()


def test_pools_have_objects(shared_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.api.test_dbus_api.FakeHost", Host)

    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            assert isinstance(host, Host)

            def tell(event: str, item: dict[str, Any]) -> None:
                for listener in host.listeners:
                    listener(event, dict(item))

            (shown,) = await client.call(PATH, f"{PROPERTIES}.GetAll", "s", POOL)
            assert (shown["State"], shown["Capacity"], shown["Autostart"]) == ("active", 10 << 30, True)
            (managed,) = await client.call(ROOT, f"{OBJECT_MANAGER}.GetManagedObjects")
            assert managed[PATH][POOL]["Path"] == "/srv/p"
            assert (await client.call(PATH, f"{POOL}.Info"))[0]["persistent"] is True
            assert await client.call(PATH, f"{POOL}.Start") == (False,)
            assert host.pools.asked == [("start", "default", "root")]
            assert await client.call(PATH, f"{POOL}.ListVolumes") == ([{"name": "web1", "capacity": 1 << 40}],)
            (snapshots,) = await client.call(PATH, f"{POOL}.ListSnapshots", "s", "web1")
            assert snapshots == [{"id": "1", "name": "before", "at": 7, "state": 0}]
            # "" is what isn't given.
            assert await client.call(PATH, f"{POOL}.CreateVolume", "sss", "v", "1G", "") == ("",)
            assert await client.call(PATH, f"{POOL}.ImportVolume", "ssss", "v", "/x", "vmdk", "") == ("job-1",)
            assert await client.call(PATH, f"{POOL}.ImportVolume", "ssss", "v", "", "raw", "raw") == ("job-1",)
            with pytest.raises(BusError, match="expected the format"):
                await client.call(PATH, f"{POOL}.ImportVolume", "ssss", "v", "/x", "", "")
            (jobs,) = await client.call(f"{ROOT}/pool", f"{POOL_MANAGER}.ListJobs")
            assert jobs == [{"job": "job-1", "verb": "import", "state": "running", "progress": 42.5, "error": ""}]
            (job,) = await client.call(f"{ROOT}/pool", f"{POOL_MANAGER}.WaitJob", "sd", "job-1", 0.0)
            assert (job["state"], job["progress"]) == ("done", 100.0)
            assert await client.call(f"{ROOT}/pool", f"{POOL_MANAGER}.CancelJob", "s", "job-1") == (True,)
            assert host.volumes.asked == [
                ("create", "default", "v", "1G", None),
                ("import", "default", "v", "/x", "vmdk", None, "root"),
                ("import", "default", "v", None, "raw", "raw", "root"),
                ("cancel", "job-1"),
            ]
            tell("changed", ITEM | {"state": "inactive", "capacity": None})
            tell("removed", {"name": "default", "driver": "storage"})
            heard = [(member, args) for _path, _interface, member, args in await client.signals()]
            assert [member for member, _args in heard] == ["PropertiesChanged", "InterfacesRemoved"]
            assert heard[0][1][1] == {"State": "inactive", "Capacity": 0}

    asyncio.run(main())


def test_volumes_are_streamed(shared_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.api.test_dbus_api.FakeHost", Host)

    async def main() -> None:
        async with serving(shared_bus) as (host, client):
            assert isinstance(host, Host)
            job, fd, offset = await client.call(PATH, f"{POOL}.UploadVolume", "sstb", "v", "", 0, False)
            with open(fd, "wb") as pipe:
                pipe.write(b"all of it")
            assert (job, offset) == ("job-1", 5 << 30)
            assert await client.call(f"{ROOT}/pool", f"{POOL_MANAGER}.Uploaded", "s", job) == ("",)
            kind, fd = await client.call(PATH, f"{POOL}.DownloadVolume", "s", "v")
            assert (kind, os.pread(fd, 100, 0)) == ("", b"content")
            os.close(fd)
            assert host.volumes.asked == [
                ("upload", "default", "v", None, None, False), ("uploaded", "job-1", b"all of it"),
            ]  # fmt: skip

    asyncio.run(main())


def test_only_root_streams(shared_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.api.test_dbus_api.FakeHost", Host)

    async def main() -> None:
        async with serving(shared_bus, uid=1000) as (host, client):
            assert isinstance(host, Host)
            with pytest.raises(BusError, match="may not call UploadVolume"):
                await client.call(PATH, f"{POOL}.UploadVolume", "sstb", "v", "", 0, False)
            with pytest.raises(BusError, match="may not call DownloadVolume"):
                await client.call(PATH, f"{POOL}.DownloadVolume", "s", "v")
            assert host.volumes.asked == []

    asyncio.run(main())
