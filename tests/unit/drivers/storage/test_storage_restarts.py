# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of volumes when the daemon is killed at each step of an operation on them."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles import fake_qemu_img
from tests.doubles.whole_host import ROOT, SteppingOs, World, on_loop, until
from virtd import errors
from virtd.children.child import Child
from virtd.drivers.storage import prerequisites as storage_host
from virtd.host import Host
from virtd.records import Record, Records
from virtd.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.doubles.cuts import Cuts


DATA = b"what a guest has written" * 3000


class Children(list[Child]):
    """All children, so that the files that a killed daemon had open can be closed, as its end would do."""

    def __call__(self, *args: Any) -> Child:
        self.append(Child(*args))
        return self[-1]

    adopt = staticmethod(Child.adopt)

    def follow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("job", "launching"):
            monkeypatch.setattr(f"virtd.drivers.storage.{module}.Child", self)

    def close(self) -> None:
        for child in self:
            for file in (child.console, child.stderr):
                if file is not None:
                    file.close()
        self.clear()


@contextlib.contextmanager
def hosted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with storage in it, and a pool "p"."""
    world = World(directory, monkeypatch)
    for top in (world.paths.etc, world.paths.run, world.paths.log):
        os.makedirs(f"{top}/storage")
    (directory / "pool").mkdir(mode=0o755)
    with open(f"{world.paths.etc}/storage/p.toml", "w") as file:
        file.write(f'name = "p"\npath = "{directory}/pool"\n')
    for module in ("place", "entries", "unfinished"):
        monkeypatch.setattr(f"virtd.drivers.storage.{module}.os", SteppingOs(world))
    monkeypatch.setattr(storage_host, "program", lambda _name, _package: fake_qemu_img.__file__)
    try:
        yield world
    finally:
        world.close()


async def settled(host: Host) -> None:
    """Wait until no job is in progress any more, except those that wait for a client."""
    await host.volumes.driver.certain()
    await until(lambda: all(j.over.is_set() or j.state == "waiting" for j in host.volumes.driver.jobs))


async def done(host: Host, answer: Reply) -> None:
    """Wait until the job of an answer is over, and raise the error that it ended with."""
    if answer["job"]:
        job = host.volumes.driver.jobs.find(answer["job"])
        await job.over.wait()
        if job.data.error:
            raise errors.HostError(job.data.error)


async def create(host: Host, name: str = "new") -> None:
    await done(host, await host.volumes.create("p", name, "60000", token="t", by=ROOT))


async def create_qcow2(host: Host) -> None:
    await done(host, await host.volumes.create("p", "new", "1G", format="qcow2", token="t", by=ROOT))


async def clone(host: Host) -> None:
    await done(host, await host.volumes.clone("p", "source", "new", token="t", by=ROOT))


async def import_(host: Host) -> None:
    file = f"{host.pools.driver.find('p').present.path}/../image"
    await done(host, await host.volumes.import_("p", "new", file, source_format="raw", token="t", by=ROOT))


async def upload(host: Host) -> None:
    found = await host.volumes.upload("p", "new", size=len(DATA), token="t", by=ROOT)
    (fd,) = found.fds
    try:
        os.pwrite(fd, DATA, 0)
    finally:
        os.close(fd)
    await done(host, await host.volumes.uploaded(found.value["job"], by=ROOT))


async def delete(host: Host) -> None:
    with contextlib.suppress(errors.NotFound):  # as virtdctl takes it, of a call that it has to repeat
        await done(host, await host.volumes.delete("p", "source", by=ROOT))


async def resize(host: Host) -> None:
    await done(host, await host.volumes.resize("p", "source", str(len(DATA) + 4096), token="t", by=ROOT))


async def resize_qcow2(host: Host) -> None:
    await done(host, await host.volumes.resize("p", "image", "2G", token="t", by=ROOT))


async def wipe(host: Host) -> None:
    await done(host, await host.volumes.wipe("p", "source", token="t", by=ROOT))


async def adopt(host: Host) -> None:
    await done(host, await host.volumes.import_("p", "foreign", source_format="qcow2", token="t", by=ROOT))


# What each makes: a volume's content when it is there at all, which nobody may ever see in part.
MAKES: dict[str, tuple[Callable[[Host], Awaitable[None]], bytes]] = {
    "create": (create, bytes(60416)),
    "create-qcow2": (create_qcow2, fake_qemu_img.header(1 << 30)),
    "clone": (clone, DATA),
    "import": (import_, DATA),
    "upload": (upload, DATA),
}
CHANGES: dict[str, Callable[[Host], Awaitable[None]]] = {
    "delete": delete,
    "resize": resize,
    "resize-qcow2": resize_qcow2,
    "wipe": wipe,
    "adopt": adopt,
}


async def prepare(host: Host, directory: Path) -> None:
    await host.pools.start("p", by=ROOT)
    for path in ("pool/source", "image"):
        (directory / path).write_bytes(DATA)
    await done(host, await host.volumes.import_("p", "source", source_format="raw", by=ROOT))
    await done(host, await host.volumes.create("p", "image", "1G", format="qcow2", by=ROOT))
    (directory / "pool/foreign").write_bytes(fake_qemu_img.header(1 << 30))


def nothing_unfinished(world: World, pool: Path) -> None:
    """No slot, no unit, no unfinished volume, and no record of a volume that doesn't exist."""
    assert world.slots() == []
    assert world.units.units == {}
    assert os.listdir(pool / ".virtd/new") == []
    known = {name.removesuffix(".json") for name in os.listdir(pool / ".virtd") if name != "new"}
    assert known <= set(os.listdir(pool)), known
    for name in os.listdir(f"{world.paths.run}/storage"):
        record = json.loads((pool / f"../run/virtd/storage/{name}").read_bytes())
        assert (record["unit"], record["slots"]) == ("", {}), name
    assert os.listdir(f"{world.paths.log}/storage") == []


async def each_step(
    cuts: Cuts,
    work: Callable[[Host], Awaitable[None]],
    cut: Callable[[Path], None],
    after: Callable[[World, Path, Host], Awaitable[None]],
) -> list[str]:
    """Cut `work` off at each step; `cut` checks what is left, and `after` what the next daemon makes of it."""
    for root, patch in cuts:
        children = Children()
        with hosted(root, patch) as world:
            pool = root / "pool"
            children.follow(patch)
            async with world.daemon() as host:
                await prepare(host, root)
                await cuts.cut(world, work(host))
            children.close()
            try:
                cut(pool)
                async with world.daemon() as host:
                    await settled(host)
                    await after(world, pool, host)
            except BaseException as exc:
                exc.add_note(cuts.where)
                raise
    return cuts.seen


@pytest.mark.parametrize("verb", MAKES)
@on_loop
async def test_killed_at_every_step_of_making_a_volume(cuts: Cuts, verb: str) -> None:
    """A reader sees all of it or nothing; the next daemon finishes or removes it; the same call then succeeds."""
    work, content = MAKES[verb]

    def cut(pool: Path) -> None:
        if (pool / "new").exists():
            assert (pool / "new").read_bytes() == content
            assert (pool / ".virtd/new.json").exists(), "a volume of which nobody knows the format"

    async def after(world: World, pool: Path, host: Host) -> None:
        cut(pool)
        listed = {volume["name"]: volume for volume in await host.volumes.listing("p")}
        assert set(listed) - {"new"} == {"source", "image", "foreign"}
        assert all(volume["trouble"] == "" for volume in listed.values())
        if verb == "upload" and "new" not in listed:
            # Its client may be there yet, and go on. One that isn't gives it up.
            for job in await host.volumes.jobs():
                if job["state"] == "waiting" and int(pool.parent.name) % 2:
                    await host.volumes.cancel(job["job"], by=ROOT)
        if verb != "upload" or "new" not in listed:  # whose client has nothing more to ask for
            await work(host)
        assert (pool / "new").read_bytes() == content
        assert (pool / "source").read_bytes() == DATA
        nothing_unfinished(world, pool)

    seen = await each_step(cuts, work, cut, after)
    assert len(seen) > 8, seen
    assert any(step.startswith("link") for step in seen), seen


@pytest.mark.parametrize("verb", CHANGES)
@on_loop
async def test_killed_at_every_step_of_changing_a_volume(cuts: Cuts, verb: str) -> None:
    """It is unchanged, or changed, or known to be damaged; the same call then succeeds."""
    work = CHANGES[verb]
    sizes = {
        "resize": ("source", {len(DATA), -(-(len(DATA) + 4096) // 512) * 512}),
        "resize-qcow2": ("image", {1 << 30, 2 << 30}),
    }

    def cut(pool: Path) -> None:
        """Nothing can be checked without a daemon."""

    async def after(world: World, pool: Path, host: Host) -> None:
        listed = {volume["name"]: volume for volume in await host.volumes.listing("p")}
        if verb in sizes:
            name, allowed = sizes[verb]
            assert listed[name]["capacity"] in allowed
            assert (pool / "source").read_bytes()[: len(DATA)] == DATA
        if verb == "delete" and "source" in listed:
            assert listed["source"]["format"] == "raw"
        if verb == "wipe" and (pool / "source").read_bytes() not in (DATA, bytes(len(DATA))):
            assert "wiped" in listed["source"]["trouble"]
        if verb == "adopt":
            assert listed["foreign"]["format"] in (None, "qcow2")
        await work(host)
        listed = {volume["name"]: volume for volume in await host.volumes.listing("p")}
        assert all(volume["trouble"] == "" for volume in listed.values())
        if verb == "delete":
            assert set(listed) == {"image", "foreign"}
        if verb in sizes:
            assert listed[sizes[verb][0]]["capacity"] == max(sizes[verb][1])
        if verb == "wipe":
            assert (pool / "source").read_bytes() == bytes(len(DATA))
        if verb == "adopt":
            assert listed["foreign"]["format"] == "qcow2"
        nothing_unfinished(world, pool)
        for name in listed:
            assert os.stat(pool / name).st_mode & 0o777 == 0o640 or (name, verb) == ("foreign", verb)

    seen = await each_step(cuts, work, cut, after)
    assert len(seen) > 2, seen


@on_loop
async def test_a_pools_stop_that_cannot_be_put_on_record_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in spite of a full /run, and that is on record as soon as there is room."""
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)
    with hosted(tmp_path, monkeypatch) as world:
        async with world.daemon() as host:
            await host.pools.start("p", by=ROOT)
            pool = host.volumes.driver.pools["p"]
            save = Records.save
            with monkeypatch.context() as full:

                def refuse(records: Records, record: Record) -> None:
                    if record.state == "inactive":
                        raise errors.HostError(f"Cannot write {record.name}: No space left on device")
                    save(records, record)

                full.setattr(Records, "save", refuse)
                await host.pools.stop("p", by=ROOT)
                info = await host.pools.info("p")
                assert (info["state"], [problem["text"] for problem in info["problems"]]) == (
                    "inactive", ["Cannot write p: No space left on device"],
                )  # fmt: skip
                assert world.record("p", "storage").state == "stopping"
            await until(pool.on_record.is_set)
            assert world.record("p", "storage").state == "inactive"
            assert (await host.pools.info("p"))["problems"] == []


@on_loop
async def test_a_job_that_systemd_cannot_be_told_of_is_put_away_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus broke off: the result counts at once, and the rest is put away once the bus is back."""
    monkeypatch.setattr("virtd.children.ending.AGAIN", 0.01)
    children = Children()
    children.follow(monkeypatch)
    refused: list[str] = []

    def step(what: str) -> None:
        if what.startswith("collect ") and world.units.units and len(refused) < 3:
            refused.append(what)
            raise errors.HostError("the D-Bus connection was closed")

    (tmp_path / "host").mkdir()
    with hosted(tmp_path / "host", monkeypatch) as world:
        async with world.daemon() as host:
            await prepare(host, tmp_path / "host")
            monkeypatch.setattr(world.units, "step", step)
            work, content = MAKES["clone"]
            await work(host)
            assert (tmp_path / "host/pool/new").read_bytes() == content
            await until(lambda: len(refused) == 3 and not world.units.units)
            nothing_unfinished(world, tmp_path / "host/pool")
    children.close()


@on_loop
async def test_pools_are_not_what_is_looked_at_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that need it have a method of that name, which must not be something else in others."""
    (tmp_path / "host").mkdir()
    with hosted(tmp_path / "host", monkeypatch) as world:
        async with world.daemon() as host:
            await prepare(host, tmp_path / "host")
            await host.look()


@on_loop
async def test_an_upload_whose_check_did_not_begin_waits_for_its_client_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "host").mkdir()
    image = fake_qemu_img.header(1 << 20)
    with hosted(tmp_path / "host", monkeypatch) as world:
        async with world.daemon() as host:
            await prepare(host, tmp_path / "host")
            found = await host.volumes.upload("p", "new", format="qcow2", size=len(image), token="t", by=ROOT)
            os.pwrite(found.fds[0], image, 0)
            os.close(found.fds[0])
            world.units.refuse = errors.HostError("the D-Bus connection was closed")
            with pytest.raises(errors.HostError, match="closed"):
                await host.volumes.uploaded(found.value["job"], by=ROOT)
            assert host.volumes.driver.jobs.find(found.value["job"]).state == "waiting"
            world.units.refuse = None
            await done(host, await host.volumes.uploaded(found.value["job"], by=ROOT))
            assert (tmp_path / "host/pool/new").read_bytes() == image
            nothing_unfinished(world, tmp_path / "host/pool")


@on_loop
async def test_the_backing_volume_of_an_uploaded_image_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon that finishes an upload need not be the one that looked at the image."""
    (tmp_path / "host").mkdir()
    image = fake_qemu_img.header(1 << 20, b"source")
    with hosted(tmp_path / "host", monkeypatch) as world:
        async with world.daemon() as host:
            await prepare(host, tmp_path / "host")
            found = await host.volumes.upload("p", "new", format="qcow2", size=len(image), token="t", by=ROOT)
            os.pwrite(found.fds[0], image, 0)
            os.close(found.fds[0])
            answer = await host.volumes.uploaded(found.value["job"], by=ROOT)
            task = world.record(answer["job"], "storage").data["task"]
            assert task["meta"]["backing"] == {"pool": "p", "volume": "source", "format": "raw"}
            await done(host, answer)
            backing = (await host.volumes.info("p", "new"))["backing"]
            assert (backing.pool, backing.volume) == ("p", "source")
