# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be asked of virtd, by any front end: definitions, reading, waiting, logs and consoles."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import to_builtins

from tests.doubles.whole_host import ROOT, SLOTS, Killed, World, on_loop, until
from virtd import errors
from virtd.api import idl
from virtd.drivers.lxc import driver as containers
from virtd.drivers.network import driver as networks
from virtd.host import Caller, WithDescriptors
from virtd.host.domains import Domains
from virtd.messages import Message
from virtd.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtd.host import Host

UUID = "0123abcd-4567-89ab-cdef-0123456789ab"
ANN = Caller(uid=0, pid=os.getppid(), name="ann")


def path_of(world: World, name: str) -> Path:
    return Path(world.paths.definition("qemu", name))


def replied(method: str) -> set[str]:
    """The names in a method's reply, as the interface declares them."""
    found = re.search(rf"^method {method}\([^)]*\) -> \(([^)]*)\)", idl.text("org.virtd1"), re.MULTILINE)
    assert found is not None
    return {item.strip().partition(":")[0] for item in found[1].split(",")}


# Definitions


@on_loop
async def test_define_and_redefine(world: World) -> None:
    async with world.daemon() as host:
        events: list[tuple[str, str]] = []
        host.subscribe(lambda event, item: events.append((event, item["name"])))
        first = await world.define("web1")
        assert set(first) == replied("Define")
        assert (first["created"], first["path"]) == (True, str(path_of(world, "web1")))
        # A uuid was made and written down, and the definition is as a person wrote it otherwise.
        assert path_of(world, "web1").read_text() == f'uuid = "{first["uuid"]}"\n' + world.text("web1")
        assert await host.domains.dump(first["uuid"].upper()) == path_of(world, "web1").read_text()
        again = await world.define("web1", more="vcpus = 2")
        assert (again["created"], again["uuid"]) == (False, first["uuid"])
        assert events == [("added", "web1"), ("changed", "web1")]
    async with world.daemon() as host:
        info = await host.domains.info("web1")
        assert (info["uuid"], info["vcpus"], info["state"]) == (first["uuid"], 2, "stopped")


@on_loop
async def test_check_changes_nothing(world: World) -> None:
    async with world.daemon() as host:
        result = await host.domains.define(world.text("web1"), "stdin", check=True, by=ROOT)
        assert set(result) == replied("Define")
        assert result["created"] is True
        assert not path_of(world, "web1").exists()
        assert await host.domains.listing() == []
        with pytest.raises(errors.InvalidDefinition, match=r"^stdin: vcpus: expected integer, got string$"):
            await host.domains.define(world.text("web1", more='vcpus = "x"'), "stdin", check=True, by=ROOT)


@on_loop
async def test_a_bad_definition_leaves_the_old_one(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        before = path_of(world, "web1").read_text()
        with pytest.raises(errors.InvalidDefinition):
            await world.define("web1", more="vcpu = 2")
        assert path_of(world, "web1").read_text() == before
        assert (await host.domains.info("web1"))["vcpus"] == 1


@pytest.mark.parametrize("spelling", [UUID, UUID.upper(), UUID.replace("-", "")])
@on_loop
async def test_a_uuid_is_one_domains(world: World, spelling: str) -> None:
    async with world.daemon() as host:
        await world.define("web1", more=f'uuid = "{spelling}"')
        assert (await host.domains.listing())[0]["uuid"] == UUID
        with pytest.raises(errors.Exists, match=f"{UUID} is the uuid of domain web1"):
            await world.define("web2", more=f'uuid = "{UUID}"')
        with pytest.raises(errors.Exists, match=f"exists with another uuid, {UUID}"):
            await world.define("web1", more=f'uuid = "{UUID[:-1]}0"')
        # The same definition again is no conflict.
        assert (await world.define("web1", more=f'uuid = "{UUID}"'))["created"] is False


@on_loop
async def test_definitions_written_by_hand(world: World) -> None:
    path_of(world, "web1").write_text(world.text("web1"))
    path_of(world, "web2").write_text(world.text("web2", more=f'uuid = "{UUID.upper()}"'))
    path_of(world, "web3").write_text(world.text("web3", more=f'uuid = "{UUID}"'))
    path_of(world, "web4").write_text(world.text("web5"))
    path_of(world, "web6").write_bytes(b"\xff\xfe")
    path_of(world, "web7").mkdir()
    async with world.daemon() as host:
        assert [item["name"] for item in await host.domains.listing()] == ["web1", "web2"]
        uuid = (await host.domains.info("web1"))["uuid"]
        assert len(uuid) == 36
        problems = {problem["object"]: problem["text"] for problem in (await host.status())["problems"]}
        assert set(problems) == {"qemu/web3", "qemu/web4", "qemu/web6", "qemu/web7"}
        assert f"{UUID} is the uuid of domain web2" in problems["qemu/web3"]
        assert 'expected "web4", as the file is called, got "web5"' in problems["qemu/web4"]
        assert len(world.told(Message.DEFINITION_PROBLEM)) == 4
        assert (await host.domains.start("web1", by=ROOT))["changed"] is True
    async with world.daemon() as host:
        # What was made up once stays.
        assert (await host.domains.info("web1"))["uuid"] == uuid


@on_loop
async def test_reload(world: World) -> None:
    async with world.daemon() as host:
        for name in ("web1", "web2", "web3"):
            await world.define(name)
        pid = (await host.domains.start("web2", by=ROOT))["pid"]
        await host.domains.start("web3", by=ROOT)
        assert to_builtins(await host.reload(by=ROOT)) == {"changed": [], "problems": []}
        uuid = (await host.domains.info("web1"))["uuid"]
        # Renamed, mended for the worse, removed.
        path_of(world, "new1").write_text(path_of(world, "web1").read_text().replace("web1", "new1"))
        path_of(world, "web1").unlink()
        path_of(world, "web2").write_text("vcpus = -1")
        path_of(world, "web3").unlink()
        result = await host.reload(by=ROOT)
        assert set(result) == replied("Reload")
        assert sorted(result["changed"]) == ["new1", "web1", "web3"]
        assert [problem["object"] for problem in result["problems"]] == ["qemu/web2"]
        assert (await host.domains.info("new1"))["uuid"] == uuid
        # The guests didn't notice, and the one without a definition goes when it ends.
        assert (await host.domains.info("web2"))["pid"] == pid
        assert (await host.domains.info("web3"))["persistent"] is False
        with pytest.raises(errors.NotFound, match="has no definition"):
            await host.domains.dump("web3")
        await host.domains.stop("web3", by=ROOT)
        assert [item["name"] for item in await host.domains.listing()] == ["new1", "web2"]
        assert not os.path.exists(world.paths.record("qemu", "web3"))
        # Mended.
        path_of(world, "web2").write_text(world.text("web2"))
        assert (await host.reload(by=ROOT))["problems"] == []


@on_loop
async def test_undefine(world: World) -> None:
    async with world.daemon() as host:
        with pytest.raises(errors.NotFound, match="There is no domain web1"):
            await host.domains.undefine("web1", by=ROOT)
        await world.run("web1")
        with pytest.raises(errors.InvalidState, match="Cannot undefine web1: it is running") as caught:
            await host.domains.undefine("web1", by=ROOT)
        assert str(caught.value.hint) == "Stop it first: virtdctl stop web1."
        await host.domains.stop("web1", by=ROOT)
        assert to_builtins(await host.domains.undefine("web1", by=ROOT)) == {"name": "web1"}
        assert not path_of(world, "web1").exists()
        assert not os.path.exists(world.paths.record("qemu", "web1"))
        assert await host.domains.listing() == []


@on_loop
async def test_autostart_is_set_in_the_file(world: World) -> None:
    text = '# mine\nname = "web1"\nmemory = "64M"\nautostart = false # for now\n[boot]\nkernel = "/boot/vmlinuz"\n'
    async with world.daemon() as host:
        await host.domains.define(text, "x", check=False, by=ROOT)
        before = path_of(world, "web1").read_text()
        assert to_builtins(await host.domains.set_autostart("web1", True, by=ROOT)) == {
            "name": "web1",
            "changed": True,
        }
        assert to_builtins(await host.domains.set_autostart("web1", True, by=ROOT)) == {
            "name": "web1",
            "changed": False,
        }
        # One word changed; comments and order are the person's.
        assert path_of(world, "web1").read_text() == before.replace("autostart = false", "autostart = true")
        assert (await host.domains.info("web1"))["autostart"] is True
        assert to_builtins(await host.domains.set_autostart("web1", False, by=ROOT)) == {
            "name": "web1",
            "changed": True,
        }
        assert path_of(world, "web1").read_text() == before


@on_loop
async def test_autostart_where_the_file_says_nothing_of_it(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        await host.domains.set_autostart("web1", True, by=ROOT)
        assert host.domains.driver.machines["web1"].definition.autostart is True  # type: ignore[union-attr]


@on_loop
async def test_autostart_of_one_that_runs_is_no_change_that_waits(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        await host.domains.set_autostart("web1", True, by=ROOT)
        info = await host.domains.info("web1")
        assert (info["autostart"], info["pending"]) == (True, False)
    async with world.daemon() as host:
        assert (await host.domains.info("web1"))["pending"] is False
        await host.domains.stop("web1", by=ROOT)


# Reading


@on_loop
async def test_info_and_status(world: World) -> None:
    async with world.daemon() as host:
        pid = await world.run("web1")
        info = await host.domains.info("web1")
        listed = (await host.domains.listing())[0]
        assert {"name", "driver", "uuid", "state", "reason", "pid", "since", "autostart", "waits", "id"} == set(
            listed
        )
        assert dict(listed).items() <= dict(info).items()
        assert {"unit", "slots", "exit", "definition_path", "pending", "memory", "vcpus", "disks", "monitor"} <= set(
            info
        )
        assert (info["exit"], info["pending"], info["memory"]) == (None, False, 64 << 20)
        assert sorted(info["slots"]) == SLOTS
        status = await host.status()
        assert status["budget"]["used"] == 5
        assert status["domains"]["running"] == 1
        assert (status["problems"], status["degraded"]) == ([], [])
        assert status["pid"] == os.getpid() != pid


@on_loop
async def test_the_ids_of_running_guests_are_distinct(world: World) -> None:
    async with world.daemon() as host:
        for name in ("web1", "web2"):
            await world.run(name)
        await host.domains.stop("web1", by=ROOT)
        await host.domains.start("web1", by=ROOT)
        assert [item["id"] for item in await host.domains.listing()] == [3, 2]
    async with world.daemon() as host:
        await world.run("web3")
        assert [item["id"] for item in await host.domains.listing()] == [3, 2, 4]


@on_loop
async def test_wait(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        assert (await host.domains.wait("web1", ["stopped", "crashed"], 0.0))["state"] == "stopped"
        with pytest.raises(errors.TimedOut, match=r"web1 is stopped after 0\.05 s, not running"):
            await host.domains.wait("web1", ["running"], 0.05)
        with pytest.raises(errors.InvalidState, match="There is no state asleep"):
            await host.domains.wait("web1", ["asleep"], None)
        waiting = asyncio.ensure_future(host.domains.wait("web1", ["running"], None))
        await host.domains.start("web1", by=ROOT)
        assert (await waiting)["state"] == "running"
        assert host._listeners == []


@on_loop
async def test_a_listener_that_fails_harms_nobody(world: World) -> None:
    async with world.daemon() as host:
        seen: list[str] = []

        def broken(_event: str, _item: Reply) -> None:
            raise RuntimeError

        host.subscribe(broken)
        host.subscribe(lambda event, _item: seen.append(event))
        await world.run("web1")
        await host.domains.stop("web1", by=ROOT)
        assert seen[0] == "added"
        assert "changed" in seen
        assert seen[-1] == "ended"


@on_loop
async def test_before_systemd_can_be_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-Bus isn't there yet, and a guest ended while we were away: reading waits a little and is then answered."""
    monkeypatch.setattr("virtd.host.objects.DOUBT", 0.1)
    monkeypatch.setattr(Domains.find, "__defaults__", (0.1,))
    async with world.daemon():
        await world.run("web1")
    world.units.process("web1").kill()
    world.units.process("web1").wait()
    async with world.daemon(reconcile=False) as host:
        assert [item["name"] for item in await host.domains.listing()] == ["web1"]
        with pytest.raises(errors.Busy, match="doesn't know yet"):
            await host.domains.start("web1", by=ROOT)
        monkeypatch.setattr(Domains.find, "__defaults__", (20.0,))
        waiting = asyncio.ensure_future(host.domains.info("web1"))
        await host.reconcile()
        assert (await waiting)["state"] == "crashed"


@pytest.mark.parametrize("wake", [lambda host: host.containers, lambda host: host.drivers.networks])
@on_loop
async def test_a_driver_is_reconciled_once(
    world: World, monkeypatch: pytest.MonkeyPatch, wake: Callable[[Host], Any]
) -> None:
    """Also one that nobody needed before, be it woken by an operation or by another driver.

    A second time would take what an operation has begun since for what a crash has cut off, and roll it back.
    """
    done: list[str] = []

    async def reconcile(_driver: Any) -> None:
        done.append("reconcile")

    for kind in (containers.Driver, networks.Driver):
        monkeypatch.setattr(kind, "restore", lambda _driver: done.append("restore"))
        monkeypatch.setattr(kind, "reconcile", reconcile)
    async with world.daemon(reconcile=False) as host:
        wake(host)
        await asyncio.sleep(0)
        assert done == ["restore"]
        await host.reconcile()
        assert done == ["restore", "reconcile"]
    done.clear()
    async with world.daemon() as host:
        wake(host)
        wake(host)
        await until(lambda: "reconcile" in done)
        assert done == ["restore", "reconcile"]


# Logs


async def follow(world: World, file: str | None = None, offset: int | None = None, **more: Any) -> tuple[Any, bytes]:
    """One reply to Follow, and what its descriptor holds from there on."""
    assert world.host is not None
    which, lines, wait = more.get("log", "console"), more.get("lines"), more.get("wait", False)
    reply = await world.host.domains.follow("web1", which, file, offset, lines, wait=wait)
    assert isinstance(reply, WithDescriptors)
    assert set(reply.value) == replied("Follow")
    data = b""
    for fd in reply.fds:
        data = os.pread(fd, 1 << 20, reply.value["offset"])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"a reader writes nothing")
        os.close(fd)
    return reply.value, data


@on_loop
async def test_follow(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        with pytest.raises(errors.NotFound, match="has no log yet"):
            await follow(world)
        with pytest.raises(errors.InvalidState, match="There is no log video"):
            await follow(world, log="video")
        await host.domains.start("web1", by=ROOT)
        world.type("web1", "echo one\necho two\necho three")
        await until(lambda: world.console("web1") == "one\ntwo\nthree\n")
        assert (await follow(world, lines=2))[1] == b"two\nthree\n"
        assert (await follow(world, lines=-1))[1] == b"one\ntwo\nthree\n"
        end, data = await follow(world)
        assert (data, end["more"], end["ended"], end["state"]) == (b"", False, False, "running")
        # Waiting at the end: woken by the next line, in the same file, so without a descriptor.
        waiting = asyncio.ensure_future(follow(world, end["file"], end["offset"], wait=True))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        world.type("web1", "echo four")
        more, data = await waiting
        assert (more["file"], more["offset"], more["more"], data) == (end["file"], end["offset"], True, b"")
    async with world.daemon():
        # After a restart the same question has the same answer.
        assert (await follow(world, end["file"], end["offset"], wait=True))[0] == more
        waiting = asyncio.ensure_future(follow(world, end["file"], end["offset"] + len("four\n"), wait=True))
        await asyncio.sleep(0.05)
        world.type("web1", "poweroff")
        last, _ = await waiting
        assert (last["ended"], last["more"]) == (True, False)
        # And when it is over: all of the log, and its end.
        assert (await follow(world, lines=-1))[1] == b"one\ntwo\nthree\nfour\n"


@on_loop
async def test_following_over_rotations(world: World) -> None:
    world.limits = type(world.limits)(max_size=1 << 10, backups=100)
    async with world.daemon():
        await world.run("web1", "print=1000")
        await until(lambda: "line 999\n" in world.console("web1"))
        place, _ = await follow(world, lines=-1)
        text, fd, files = b"", -1, 0
        while place["more"]:
            assert world.host is not None
            domains = world.host.domains
            reply = await domains.follow("web1", "console", place["file"], place["offset"], None, wait=False)
            if fd < 0:  # the first one again, since `follow` has closed it
                name = next(log for log in Path(world.paths.log, "qemu").iterdir() if log.name != "web1.log"
                            and f"{log.stat().st_dev}:{log.stat().st_ino}" == place["file"])  # fmt: skip
                fd = os.open(name, os.O_RDONLY)
            if reply.fds:
                os.close(fd)
                (fd,) = reply.fds
                files += 1
            place = dict(reply.value)
            data = os.pread(fd, 300, place["offset"])
            text += data
            place["offset"] += len(data)
        os.close(fd)
        assert text == b"".join(b"line %d\n" % number for number in range(1000))
        assert files > 3


# Consoles


@on_loop
async def test_one_writer_at_a_time(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        with pytest.raises(errors.InvalidState, match="Cannot attach to the console of web1: it is stopped"):
            await anext(host.domains.open_console("web1", by=ANN))
        await host.domains.start("web1", by=ROOT)
        first = host.domains.open_console("web1", by=ANN)
        opened = await anext(first)
        assert isinstance(opened, WithDescriptors)
        assert set(opened.value) <= replied("OpenConsole")
        os.write(opened.fds[0], b"echo typed\n")
        os.close(opened.fds[0])
        await until(lambda: world.console("web1") == "typed\n")
        with pytest.raises(errors.Busy, match=rf"in use by ann \(PID {ANN.pid}\)") as caught:
            await anext(host.domains.open_console("web1", by=ROOT))
        assert "--force" in str(caught.value.hint)
        # Taken over by force: the first is told, and its leaving doesn't take the second one's place away.
        second = host.domains.open_console("web1", force=True, by=ROOT)
        os.close((await anext(second)).fds[0])  # type: ignore[union-attr]
        assert to_builtins(await anext(first)) == {"name": "web1", "event": "taken-over", "by": "root"}
        await first.aclose()  # type: ignore[attr-defined]
        with pytest.raises(errors.Busy, match="in use by root"):
            await anext(host.domains.open_console("web1", by=ANN))
        world.type("web1", "poweroff")
        assert to_builtins(await anext(second)) == {"name": "web1", "event": "ended", "by": None}
        with pytest.raises(StopAsyncIteration):
            await anext(second)


@on_loop
async def test_a_console_outlives_the_daemon(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        console = host.domains.open_console("web1", by=ANN)
        opened = await anext(console)
        assert isinstance(opened, WithDescriptors)
        pipe, token = opened.fds[0], opened.value["token"]
    with pytest.raises(Killed):
        await console.aclose()  # type: ignore[attr-defined]
    # It can be typed on with nobody there ...
    os.write(pipe, b"echo meanwhile\n")
    async with world.daemon() as host:
        await until(lambda: world.console("web1") == "meanwhile\n")
        # ... it is kept for the one who has the token ...
        with pytest.raises(errors.Busy, match="in use by ann"):
            await anext(host.domains.open_console("web1", by=ROOT))
        again = host.domains.open_console("web1", token=token, by=ANN)
        reopened = await anext(again)
        assert isinstance(reopened, WithDescriptors)
        assert reopened.value["token"] == token
        os.close(reopened.fds[0])
        await again.aclose()  # type: ignore[attr-defined]
        # ... and given up, it is free.
        assert world.record("web1").data["console"] is None
        other = host.domains.open_console("web1", by=ROOT)
        os.close((await anext(other)).fds[0])  # type: ignore[union-attr]
    with pytest.raises(Killed):
        await other.aclose()  # type: ignore[attr-defined]
    # Later than that after a restart, nobody waits for those who didn't come back.
    monkeypatch.setattr("virtd.guests.console.GRACE", 0.0)
    async with world.daemon() as host:
        late = host.domains.open_console("web1", by=ANN)
        os.close((await anext(late)).fds[0])  # type: ignore[union-attr]
        await late.aclose()  # type: ignore[attr-defined]
    os.close(pipe)


@pytest.mark.parametrize("what", ["record", "definition"])
@on_loop
async def test_an_undefine_that_is_refused_changes_nothing(
    make_world: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    world = make_world()
    async with world.daemon() as host:
        await world.run("web1")
        await host.domains.stop("web1", by=ROOT)
        before = await host.domains.info("web1"), world.record("web1")
        refused = world.paths.record("qemu", "web1") if what == "record" else world.paths.definition("qemu", "web1")
        real = os.unlink

        def refuse(path: str, **kwargs: Any) -> None:
            if path == refused:
                raise OSError(30, "Read-only file system")
            real(path, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(errors.HostError, match="Cannot remove"):
                await host.domains.undefine("web1", by=ROOT)
        assert (await host.domains.info("web1"), world.record("web1")) == before
        assert (await host.check_all(repair=False, by=ROOT))["differences"] == []
        await host.domains.undefine("web1", by=ROOT)
        assert await host.domains.listing() == []


@on_loop
async def test_a_definition_that_is_gone_takes_its_domain_along(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the record can't be removed: fsck does that later."""
    async with world.daemon() as host:
        await world.run("web1")
        await host.domains.stop("web1", by=ROOT)

        def refuse(_name: str) -> None:
            raise errors.HostError("read-only")

        os.unlink(world.paths.definition("qemu", "web1"))
        with monkeypatch.context() as patch:
            patch.setattr(host.domains.driver.records, "remove", refuse)
            await host.reload(by=ROOT)
        assert await host.domains.listing() == []
        rows = (await host.check_all(repair=True, by=ROOT))["differences"]
        assert [(row["object"], row["kind"], row["repaired"]) for row in rows] == [("qemu/web1", "record", True)]


@on_loop
async def test_a_record_that_could_not_be_written_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtd.objects.persistent.SAVE_AGAIN", 0.01)
    async with world.daemon() as host:
        await world.run("web1")
        machine = host.domains.driver.machines["web1"]

        def refuse(_record: object) -> None:
            raise errors.HostError("full")

        with monkeypatch.context() as patch:
            patch.setattr(machine.shared.records, "save", refuse)
            await host.domains.suspend("web1", by=ROOT)
            assert machine.problems["record"].text == "full"
            assert world.record("web1").state == "running"
        await until(lambda: world.record("web1").state == "paused")
        await until(lambda: machine.problems == {})
        await host.domains.stop("web1", by=ROOT)


@on_loop
async def test_slots_are_told_while_one_is_put_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        store = host.services.store
        get = store.get
        monkeypatch.setattr(store, "get", lambda name: -1 if name == "qemu/web1/log" else get(name))
        told = {row["name"]: row["what"] for row in await host.slots()}
        assert told["qemu/web1/log"] == ""
        assert told["qemu/web1/console.log"].endswith("web1.console.log")
