# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that stand still by themselves: which disk, why, since when; a problem until they go on or have ended."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from tests.doubles.whole_host import ROOT, World, on_loop, until
from virtd import errors
from virtd.drivers.qemu import standstill
from virtd.drivers.qemu.standstill import Space
from virtd.messages import Message
from virtd.model.state import State

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    from virtd.host import Host


@pytest.fixture
def disk(tmp_path: Path) -> str:
    (tmp_path / "disk").touch()
    return f'disk = [{{ path = "{tmp_path}/disk" }}]'


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the file system of the disk has free."""
    free = [0]
    monkeypatch.setattr(standstill, "_space_of", lambda path: Space(os.path.dirname(path), free[0]))
    monkeypatch.setattr(standstill, "RELAPSE", 0.5)
    return free


async def problem(host: Host) -> dict[str, Any]:
    def told() -> bool:
        return bool((now := host.domains.driver.machines["web1"].problems.get("standstill")) and "free" in now.text)

    await until(told, "the problem")
    (found,) = (await host.status())["problems"]
    assert found["object"] == "qemu/web1"
    return dict(found)


@on_loop
async def test_a_full_disk(world: World, disk: str, free: list[int], tmp_path: Path) -> None:
    async with world.daemon() as host:
        await world.run("web1", more=disk)
        world.type("web1", "full")
        item = await host.domains.wait("web1", ["paused"], 20)
        assert item["reason"] == f"a write to disk[0], {tmp_path}/disk failed: no space left"
        found = await problem(host)
        assert f"no space left on the file system of {tmp_path}, 0 bytes free" in found["text"]
        assert found["hint"] == "Free some space there, then: virtdctl resume web1."
        info = await host.domains.info("web1")
        assert to_builtins(info["standstill"]) == {
            "kind": "io-error",
            "since": info["since"],
            "disk": "disk[0]",
            "path": f"{tmp_path}/disk",
            "operation": "write",
            "full": True,
            "reason": "No space left on device",
        } | {"since": info["standstill"]["since"]}
        assert len(world.told(Message.GUEST_STOOD_STILL)) == 1
        with pytest.raises(errors.InvalidState, match=r"Cannot resume web1: .* 0 bytes free"):
            await host.domains.resume("web1", by=ROOT)
        asked: list[tuple[str, Awaitable[object]]] = [
            ("shut down", host.domains.shutdown("web1", None, by=ROOT)),
            ("reboot", host.domains.reboot("web1", force=False, timeout=None, by=ROOT)),
        ]
        for what, answer in asked:
            with pytest.raises(errors.InvalidState, match=rf"Cannot {what} web1: .* 0 bytes free") as refused:
                await answer
            assert refused.value.hint == found["hint"]
        assert (await host.domains.info("web1"))["state"] == "paused"
    async with world.daemon() as host:
        found = await problem(host)
        assert "0 bytes free" in found["text"]
        assert (await host.domains.info("web1"))["standstill"]["disk"] == "disk[0]"
        assert len(world.told(Message.GUEST_STOOD_STILL)) == 1, "that was told of before"
        free[0] = 5 << 20
        await host.look()
        assert "5 MiB free" in (await problem(host))["text"]
        assert (await host.domains.resume("web1", by=ROOT))["changed"]
        info = await host.domains.info("web1")
        assert (info["state"], info["reason"], info["standstill"]) == ("running", "resumed by root", None)
        assert (await host.status())["problems"] == []
        assert "standstill" not in world.record("web1").data


@on_loop
async def test_full_again_at_once(world: World, disk: str, free: list[int]) -> None:
    free[0] = 1 << 20
    async with world.daemon() as host:
        await world.run("web1", more=disk)
        world.type("web1", "full again")
        await host.domains.wait("web1", ["paused"], 20)
        await problem(host)
        with pytest.raises(errors.InvalidState, match=r"web1 was resumed, and stands still again: .* 1 MiB free"):
            await host.domains.resume("web1", by=ROOT)
        assert (await host.domains.info("web1"))["state"] == "paused"
        await problem(host)
        await host.domains.stop("web1", by=ROOT)
        assert (await host.status())["problems"] == []


@on_loop
async def test_one_that_nobody_heard_of(world: World, disk: str, free: list[int]) -> None:
    """The daemon was away when it happened: QEMU is asked which disk it is."""
    async with world.daemon() as host:
        await world.run("web1", more=disk)
        world.type("web1", "full silent")
        world.type("web1", "echo done")
        await until(lambda: "done" in world.console("web1"))
    async with world.daemon() as host:
        await host.domains.wait("web1", ["paused"], 20)
        assert "disk[0]" in (await problem(host))["text"]
        assert len(world.told(Message.GUEST_STOOD_STILL)) == 1
        free[0] = 1 << 20
        await host.domains.resume("web1", by=ROOT)


@on_loop
async def test_other_standstills(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", more='on_crash = "keep"')
        world.type("web1", "panic")
        await host.domains.wait("web1", ["paused"], 20)
        (found,) = (await host.status())["problems"]
        assert "the guest's kernel panicked" in found["text"]
        assert "virtdctl stop web1" in found["hint"]
        await host.domains.stop("web1", by=ROOT)
        assert (await host.status())["problems"] == []
        # QEMU says only that it has stopped.
        await host.domains.start("web1", by=ROOT)
        machine = host.domains.driver.machines["web1"]
        world.type("web1", "stuck")
        await until(lambda: "standstill" in machine.problems, "the question")
        assert machine.state is State.PAUSED
        with pytest.raises(errors.InvalidState, match="internal error") as caught:
            await host.domains.resume("web1", by=ROOT)
        assert "virtdctl stop web1, and start it" in str(caught.value.hint)


@on_loop
async def test_what_a_person_has_stopped_is_no_standstill(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        await host.domains.suspend("web1", by=ROOT)
        await host.domains.resume("web1", by=ROOT)
        assert (await host.status())["problems"] == []
        await world.run("web2", more='on_poweroff = "keep"')
        world.type("web2", "poweroff")
        await host.domains.wait("web2", ["paused"], 20)
        with pytest.raises(errors.InvalidState, match="Resetting") as caught:
            await host.domains.resume("web2", by=ROOT)
        assert "powered off" in str(caught.value.hint)
        assert (await host.status())["problems"] == []


@on_loop
async def test_an_error_that_the_guest_is_told_of(world: World, disk: str, tmp_path: Path) -> None:
    async with world.daemon() as host:
        await world.run("web1", more=disk)
        about = {"node-name": "disk0", "operation": "read", "action": "report", "reason": "Input/output error"}
        for _ in range(100):
            host.domains.driver.machines["web1"].news.on_event({"event": "BLOCK_IO_ERROR", "data": about})
        told = world.told(Message.DISK_FAILED)
        assert told[0]["text"] == (
            f"web1: a read of disk[0], {tmp_path}/disk failed: Input/output error; "
            "the error was reported to the guest"
        )
        assert len(told) <= standstill.TOLD + 1
        assert (await host.domains.info("web1"))["state"] == "running"


ANYTHING = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)


@settings(deadline=None)  # a busy machine
@given(st.dictionaries(st.sampled_from(["node-name", "qom-path", "operation", "nospace", "reason"]), ANYTHING))
def test_any_event_is_understood(data: dict[str, Any]) -> None:
    fault = standstill._reported("BLOCK_IO_ERROR", data)
    assert fault.operation in ("", "read", "write")
    assert fault.reason.isprintable()
    assert len(fault.reason) <= standstill.WORDS


@settings(deadline=None)  # a busy machine
@given(ANYTHING | st.lists(st.dictionaries(st.sampled_from(["qdev", "io-status"]), ANYTHING), max_size=3))
def test_any_answer_is_understood(blocks: Any) -> None:
    standstill._failed(blocks)


def test_where_a_file_is() -> None:
    space = standstill._space_of("/proc/self/status")
    assert space.place == "/proc"


@on_loop
async def test_none_that_is_being_stopped(world: World, disk: str, free: list[int]) -> None:
    """The monitor, connected again to say "quit", tells of the standstill once more."""
    async with world.daemon() as host:
        await world.run("web1", more=disk)
        world.type("web1", "full")
        await problem(host)
        machine = host.domains.driver.machines["web1"]
        machine.note(State.STOPPING, "being stopped by root", data=machine.ask("stop", "root"))
        machine.standstill.seen("io-error")
        assert machine.state is State.STOPPING
        assert machine.problems == {}
        await host.domains.stop("web1", by=ROOT)
    assert len(world.told(Message.GUEST_STOOD_STILL)) == 1
