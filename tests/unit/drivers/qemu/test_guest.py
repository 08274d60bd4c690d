# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests' lives, each a real process behind real pipes, over restarts and crashes of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import to_builtins

from tests.doubles.whole_host import ROOT, SLOTS, World, nothing_left, on_loop, until
from virtd import errors, process
from virtd.drivers.qemu import operations
from virtd.drivers.qemu.guest import REBOOT_GIVEN_UP
from virtd.drivers.qemu.monitor import Link
from virtd.guests import power
from virtd.messages import Message
from virtd.model.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Start


@on_loop
async def test_start(world: World) -> None:
    async with world.daemon() as host:
        pid = await world.run("web1", "print=3")
        assert world.units.process("web1").pid == pid
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"], info["id"], info["monitor"]) == ("running", pid, 1, "connected")
        assert sorted(info["slots"]) == SLOTS == world.slots()
        await until(lambda: world.console("web1") == "line 0\nline 1\nline 2\n")
        record = world.record("web1")
        assert (record.state, record.main_pid, record.unit) == ("running", pid, "virtd-qemu-web1.service")
        assert record.main_start > 0
        assert world.told(Message.STARTED)[0]["VIRTD_PID"] == str(pid)
        # Once more changes nothing.
        assert to_builtins(await host.domains.start("web1", by=ROOT)) == {
            "name": "web1",
            "changed": False,
            "pid": pid,
        }


@on_loop
async def test_input_reaches_the_guest(world: World) -> None:
    async with world.daemon():
        await world.run("web1")
        world.type("web1", "echo hello")
        await until(lambda: world.console("web1") == "hello\n")


@on_loop
async def test_what_qemu_complains_of_is_in_the_journal(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        world.type("web1", "complain of everything")
        await until(lambda: any("of everything" in message["text"] for message in world.messages))
        entry = next(message for message in world.messages if "of everything" in message["text"])
        assert (entry["VIRTD_NAME"], entry["VIRTD_UUID"]) == ("web1", (await host.domains.info("web1"))["uuid"])
    async with world.daemon():
        world.type("web1", "complain again")
        await until(lambda: any("again" in message["text"] for message in world.messages))
    assert sum("of everything" in message["text"] for message in world.messages) == 1


@on_loop
async def test_qemu_gets_a_short_environment(world: World) -> None:
    async with world.daemon():
        await world.run("web1")
        environment = dict(world.units.units["virtd-qemu-web1.service"].spec.environment)
    assert environment == {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/"}


@on_loop
async def test_a_start_that_fails_says_why_in_qemus_words(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", "fail=1")
        with pytest.raises(errors.StartFailed, match=r"cannot set up guest memory 'pc\.ram': Cannot allocate memory"):
            await host.domains.start("web1", by=ROOT)
        item = (await host.domains.listing())[0]
        assert item["state"] == "stopped"
        assert "Cannot allocate memory" in item["reason"]
        nothing_left(world)
        # And not in those of an earlier failure.
        world.units.refuse = errors.StartFailed("systemd could not start the unit: resources")
        with pytest.raises(errors.StartFailed, match="resources"):
            await host.domains.start("web1", by=ROOT)
        nothing_left(world)


@on_loop
async def test_a_guest_that_failed_can_be_started_when_it_is_mended(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1", "fail=1")
        with pytest.raises(errors.StartFailed):
            await host.domains.start("web1", by=ROOT)
        assert await world.run("web1") > 0
        assert (await host.domains.info("web1"))["state"] == "running"


@on_loop
async def test_a_monitor_that_never_answers_fails_the_start(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.settings = type(world.settings)(binary=world.settings.binary, start_timeout=0.5)
    async with world.daemon() as host:
        await world.define("web1", "silent")
        with pytest.raises(errors.StartFailed, match=r"didn't answer within 0\.5 s"):
            await host.domains.start("web1", by=ROOT)
        nothing_left(world)


@on_loop
async def test_a_start_that_failed_is_ended_once_there_is_a_bus(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else QEMU would run on, with nobody to know it, and its unit be in the way of the next start."""
    world = make_world()
    world.settings = type(world.settings)(binary=world.settings.binary, start_timeout=0.5)
    refused: list[str] = []

    def step(what: str) -> None:
        if what.startswith("kill ") and len(refused) < 2:
            refused.append(what)
            raise errors.HostError("the D-Bus connection was closed")

    async with world.daemon() as host:
        await world.define("web1", "silent")
        monkeypatch.setattr(world.units, "step", step)
        with pytest.raises(errors.StartFailed, match="didn't answer"):
            await host.domains.start("web1", by=ROOT)
        assert len(refused) == 2
        nothing_left(world)


@on_loop
async def test_a_broken_monitor_does_not_take_the_next_ones_place(world: World) -> None:
    """QEMU has one client at a time: whoever still tried to reach the old one got the new one's only connection."""
    async with world.daemon() as host:
        pid = await world.run("web1")
        machine = host.domains.driver.machines["web1"]
        os.unlink(f"{machine.runtime}/qmp.sock")
        assert machine.monitor is not None
        machine.monitor.link = Link.CLOSED
        with pytest.raises(errors.MonitorError):
            await machine.command("query-status", limit=0.1)
        broken = machine.monitor
        machine.spawn(machine._stay_attached(), "attach")
        await until(lambda: machine.monitor is not broken)
        trying = machine.monitor
        os.kill(pid, signal.SIGKILL)
        await machine.over.wait()
        await host.domains.start("web1", by=ROOT)
        assert (await host.domains.info("web1"))["monitor"] == "connected"
        assert trying is not None
        assert trying.link is Link.CLOSED


@on_loop
async def test_the_budget_refuses_before_anything_is_done(make_world: Callable[..., World]) -> None:
    world = make_world(store_max=9)
    async with world.daemon() as host:
        first = await world.run("web1")
        await world.define("web2")
        with pytest.raises(errors.BudgetExceeded, match="no room") as caught:
            await host.domains.start("web2", by=ROOT)
        assert "FileDescriptorStoreMax=" in str(caught.value.hint)
        assert world.slots() == SLOTS
        assert not world.runtime_left("web2")
        assert not os.path.exists(world.paths.record("qemu", "web2"))
        assert world.told(Message.BUDGET_REFUSED)[0] | {"VIRTD_USED": "5", "VIRTD_MAX": "9"} in world.messages
        assert world.units.process("web1").pid == first
        assert world.units.process("web1").poll() is None


@on_loop
async def test_what_pid1_did_not_keep_fails_the_start(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        # The daemon believes in more room than there is.
        world.pid1.store_max = 3
        with pytest.raises(errors.HostError, match="didn't keep"):
            await host.domains.start("web1", by=ROOT)
        nothing_left(world)


@on_loop
async def test_systemd_252_cannot_tell_what_it_keeps(make_world: Callable[..., World]) -> None:
    world = make_world(old=True)
    async with world.daemon():
        await world.run("web1")
        assert world.slots() == SLOTS


@on_loop
async def test_a_disk_goes_to_one_guest_only(world: World, tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "hard").hardlink_to(tmp_path / "disk")

    def disk(name: str, *, readonly: bool = False) -> str:
        return f'disk = [{{ path = "{tmp_path}/{name}", readonly = {str(readonly).lower()} }}]'

    async with world.daemon() as host:
        await world.run("web1", more=disk("disk"))
        for name, path in (("web2", "disk"), ("web3", "link"), ("web4", "hard")):
            await world.define(name, more=disk(path, readonly=name == "web4"))
            with pytest.raises(errors.Busy, match=f"{path} is in use by domain web1"):
                await host.domains.start(name, by=ROOT)
            assert not world.runtime_left(name)
        await host.domains.stop("web1", by=ROOT)
        await host.domains.start("web2", by=ROOT)
        await host.domains.stop("web2", by=ROOT)
        # Readers share.
        await world.run("web4", more=disk("hard", readonly=True))
        await world.run("web3", more=disk("link", readonly=True))


@on_loop
async def test_the_definition_in_use_is_the_one_it_was_started_with(world: World, tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    async with world.daemon() as host:
        await world.run("web1", more=f'disk = [{{ path = "{tmp_path}/disk" }}]')
        await world.define("web1")
        assert (await host.domains.info("web1"))["pending"] is True
        await world.define("web2", more=f'disk = [{{ path = "{tmp_path}/disk" }}]')
        with pytest.raises(errors.Busy, match="in use by domain web1"):
            await host.domains.start("web2", by=ROOT)


@on_loop
async def test_a_file_that_is_missing(world: World) -> None:
    async with world.daemon() as host:
        result = await world.define("web1")
        assert result["warnings"] == []
        os.unlink(world.kernel)
        result = await world.define("web1")
        assert result["warnings"] == [f"boot.kernel: no such file: {world.kernel}"]
        with pytest.raises(errors.InvalidDefinition, match=r"boot\.kernel: no such file") as caught:
            await host.domains.start("web1", by=ROOT)
        assert caught.value.file == world.paths.definition("qemu", "web1")
        assert world.slots() == []


@pytest.mark.parametrize("where", ["record", "runtime", "log"])
@on_loop
async def test_a_file_system_that_refuses(world: World, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """/run or /var/log is full: the start fails with a reason, the other guest is untouched, nothing stays behind."""
    async with world.daemon() as host:
        other = await world.run("web2")
        await world.define("web1")
        with monkeypatch.context() as patch:
            full = OSError(28, "No space left on device")
            real_open, real_mkdir = os.open, os.mkdir

            def failing_open(path: str, *args: int, **kwargs: int) -> int:
                if str(path).endswith({"record": "web1.json.new", "log": "web1.log"}.get(where, "never")):
                    raise full
                return real_open(path, *args, **kwargs)

            def failing_mkdir(path: str, *args: Any, **kwargs: Any) -> None:
                if where == "runtime" and path.endswith("qemu/web1"):
                    raise full
                real_mkdir(path, *args, **kwargs)

            patch.setattr(os, "open", failing_open)
            patch.setattr(os, "mkdir", failing_mkdir)
            with pytest.raises(errors.HostError, match="No space left on device"):
                await host.domains.start("web1", by=ROOT)
        assert not [slot for slot in world.slots() if slot.startswith("qemu/web1/")]
        assert not world.runtime_left("web1")
        assert world.units.process("web2").pid == other
        assert (await host.domains.info("web1"))["state"] == "stopped"
        assert (await host.domains.start("web1", by=ROOT))["changed"] is True


# The end


@on_loop
async def test_shutdown_by_the_power_button(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "slow-exit=0.05")
        assert to_builtins(await host.domains.shutdown("web1", None, by=ROOT)) == {"name": "web1", "changed": True}
        info = await host.domains.info("web1")
        assert (info["state"], info["reason"], info["pid"]) == ("stopped", "shut down by root", None)
        assert dict(info["exit"]) | {"at": ""} == {
            "code": 0,
            "signal": None,
            "cause": "shutdown",
            "at": "",
            "by": "root",
        }
        nothing_left(world)
        with pytest.raises(errors.InvalidState, match="Cannot shut down web1: it is stopped"):
            await host.domains.shutdown("web1", None, by=ROOT)


@on_loop
async def test_a_guest_that_ignores_the_button_runs_on(world: World) -> None:
    async with world.daemon() as host:
        pid = await world.run("web1", "deaf")
        with pytest.raises(errors.TimedOut, match="did not shut down within"):
            await host.domains.shutdown("web1", 0.2, by=ROOT)
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        assert "did not shut down" in info["reason"]
        # What it does later, it does by itself.
        world.type("web1", "die SIGSEGV")
        item = await host.domains.wait("web1", ["crashed"], 20)
        assert item["reason"] == "killed by SIGSEGV"


@on_loop
async def test_a_shutdown_that_was_given_up_does_not_explain_a_later_end(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "deaf")
        with pytest.raises(errors.TimedOut):
            await host.domains.shutdown("web1", 0.2, by=ROOT)
        world.type("web1", "poweroff")
        await host.domains.wait("web1", ["stopped"], 20)
        info = await host.domains.info("web1")
        assert info["reason"] == "powered off after the shutdown that root asked for had timed out"
        assert (info["exit"]["cause"], info["exit"]["by"]) == ("guest-shutdown", None)


@on_loop
async def test_stop(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "deaf print=5000")
        assert to_builtins(await host.domains.stop("web1", by=ROOT)) == {"name": "web1", "changed": True}
        info = await host.domains.info("web1")
        assert (info["state"], info["exit"]["cause"], info["exit"]["by"]) == ("stopped", "stop", "root")
        nothing_left(world)
        # Its last words are there, all of them.
        assert world.console("web1").splitlines() == [f"line {number}" for number in range(5000)]
        assert to_builtins(await host.domains.stop("web1", by=ROOT)) == {"name": "web1", "changed": False}


@on_loop
async def test_stop_without_the_monitors_help(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtd.drivers.qemu.guest.GREETING_LIMIT", 0.2)
    monkeypatch.setattr(operations, "QUIT_LIMIT", 0.2)
    async with world.daemon() as host:
        pid = await world.run("web1")
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(power, "LADDER", ((signal.SIGTERM, 0.2), (signal.SIGKILL, 10.0)))
        assert (await host.domains.stop("web1", by=ROOT))["changed"] is True
        info = await host.domains.info("web1")
        assert (info["state"], info["exit"]["signal"], info["exit"]["cause"]) == ("stopped", "SIGKILL", "stop")
        nothing_left(world)


@pytest.mark.parametrize(
    ("line", "state", "cause", "code", "killer"),
    [
        ("poweroff", "stopped", "guest-shutdown", 0, None),
        ("panic", "crashed", "panic", 1, None),
        ("die SIGKILL", "crashed", "killed", None, "SIGKILL"),
        ("die SIGTERM", "crashed", "killed", 0, "SIGTERM"),
        ("die SIGABRT", "crashed", "killed", None, "SIGABRT"),
    ],
)
@pytest.mark.parametrize("daemon", ["there", "away"])
@on_loop
async def test_an_end_and_its_cause(
    world: World, line: str, state: str, cause: str, code: int | None, killer: str | None, daemon: str
) -> None:
    """The verdict and the last words are the same whether or not virtd was there."""
    async with world.daemon():
        await world.run("web1")
        world.type("web1", "echo last words")
        if daemon == "there":
            world.type("web1", line)
            assert world.host is not None
            await world.host.domains.driver.machines["web1"].over.wait()
        else:
            stdin = os.dup(world.host.domains.driver.machines["web1"].child.stdin())  # type: ignore[union-attr]
    if daemon == "away":
        os.write(stdin, f"{line}\n".encode())
        os.close(stdin)
        await asyncio.to_thread(world.units.process("web1").wait)
    async with world.daemon() as host:
        info = await host.domains.info("web1")
        assert (info["state"], info["exit"]["cause"]) == (state, cause)
        assert (info["exit"]["code"], info["exit"]["signal"]) == (code, killer)
        assert world.console("web1") == "last words\n"
        assert (await host.status())["recovered"]["ended"] == (["web1"] if daemon == "away" else [])
        assert len(world.told(Message.ENDED)) == 1
        assert world.told(Message.ENDED)[0]["VIRTD_CAUSE"] == cause
        nothing_left(world)


@on_loop
async def test_the_last_words_are_in_the_log_when_the_end_is_told(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        world.type("web1", "burst 5000")
        item = await host.domains.wait("web1", ["stopped"], 20)
        assert item["reason"] == "powered off by itself"
        assert world.console("web1").splitlines() == [f"line {number}" for number in range(5000)]


@on_loop
async def test_kill(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        with pytest.raises(errors.InvalidState, match="no signal 99"):
            await host.domains.kill("web1", 99, by=ROOT)
        await host.domains.kill("web1", 9, by=ROOT)
        info = await host.domains.info("web1")
        assert (info["state"], info["reason"]) == ("crashed", "killed by root")
        ending = info["exit"]
        assert (ending["code"], ending["signal"]) == (None, "SIGKILL")
        assert (ending["cause"], ending["by"]) == ("killed", "root")
        with pytest.raises(errors.InvalidState):
            await host.domains.kill("web1", 9, by=ROOT)


@on_loop
async def test_an_out_of_memory_kill(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1")
        world.units.units["virtd-qemu-web1.service"].oom = True
        world.type("web1", "die SIGKILL")
        await host.domains.wait("web1", ["crashed"], 20)
        assert (await host.domains.info("web1"))["exit"]["cause"] == "oom"


@on_loop
async def test_on_crash_keep_and_restart(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", more='on_crash = "keep"')
        world.type("web1", "panic")
        item = await host.domains.wait("web1", ["paused"], 20)
        assert item["reason"] == "the guest's kernel panicked"
        first = await world.run("web2", more='on_crash = "restart"')
        world.type("web2", "panic")
        await until(lambda: host.domains.driver.machines["web2"].state is State.RUNNING and world.told(Message.ENDED))
        assert (await host.domains.info("web2"))["pid"] not in (None, first)


@on_loop
async def test_on_poweroff_keep(world: World) -> None:
    async with world.daemon() as host:
        pid = await world.run("web1", more='on_poweroff = "keep"')
        world.type("web1", "poweroff")
        item = await host.domains.wait("web1", ["paused"], 20)
        assert item["pid"] == pid


# Pause and reboot


@on_loop
async def test_suspend_and_resume(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        with pytest.raises(errors.InvalidState, match="Cannot suspend web1: it is stopped") as caught:
            await host.domains.suspend("web1", by=ROOT)
        assert str(caught.value.hint) == "Start it first: virtdctl start web1."
        pid = await world.run("web1")
        assert to_builtins(await host.domains.suspend("web1", by=ROOT)) == {"name": "web1", "changed": True}
        assert to_builtins(await host.domains.suspend("web1", by=ROOT)) == {"name": "web1", "changed": False}
        assert (await host.domains.info("web1"))["state"] == "paused"
        with pytest.raises(errors.InvalidState, match="it is paused"):
            await host.domains.reboot("web1", force=False, timeout=None, by=ROOT)
    async with world.daemon() as host:
        assert (await host.domains.info("web1"))["state"] == "paused"
        assert to_builtins(await host.domains.resume("web1", by=ROOT)) == {"name": "web1", "changed": True}
        assert to_builtins(await host.domains.resume("web1", by=ROOT)) == {"name": "web1", "changed": False}
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)


@contextlib.contextmanager
def asleep(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("times", [1, 2])
@on_loop
async def test_what_was_asked_of_a_qemu_that_slept(world: World, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does it when it wakes up, or doesn't; the state is what came of it, and the monitor is there again."""
    impatient(monkeypatch)
    async with world.daemon() as host:
        pid = await world.run("web1")
        machine = host.domains.driver.machines["web1"]
        with asleep(pid):
            for _ in range(times):
                with pytest.raises(errors.MonitorError, match="didn't answer"):
                    await machine.command("stop", limit=0.1)
            assert (await host.domains.info("web1"))["state"] == "running"
        await agreed(host)


@on_loop
async def test_a_qemu_that_slept_through_a_restart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    async with world.daemon():
        pid = await world.run("web1")
    with asleep(pid):
        async with world.daemon() as host:
            await until(lambda: "monitor" in host.domains.driver.machines["web1"].problems, "the problem")
            os.kill(pid, signal.SIGCONT)
            await agreed(host)


async def agreed(host: Any) -> None:
    """The state is the real one, and whoever asks for another gets it."""
    machine = host.domains.driver.machines["web1"]
    await until(lambda: machine.monitor is not None and machine.monitor.link is Link.CONNECTED, "the monitor")
    state = {"paused": State.PAUSED, "running": State.RUNNING}[await machine.monitor.status()]
    assert machine.state is state
    assert "monitor" not in machine.problems
    await host.domains.suspend("web1", by=ROOT)
    assert await machine.monitor.status() == "paused"
    await host.domains.resume("web1", by=ROOT)
    assert await machine.monitor.status() == "running"


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtd.drivers.qemu.guest.LINK_AGAIN", 0.02)
    monkeypatch.setattr("virtd.drivers.qemu.guest.GREETING_LIMIT", 0.5)


@on_loop
async def test_a_shutdown_that_is_heard_late(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    async with world.daemon() as host:
        pid = await world.run("web1")
        machine = host.domains.driver.machines["web1"]
        with asleep(pid), pytest.raises(errors.MonitorError):
            await operations.shutdown(machine, 20, "root")
        with contextlib.suppress(errors.VirtdError):  # it may have heard it
            await machine.command("system_powerdown")
        await asyncio.wait_for(machine.over.wait(), 20)
        assert "after the shutdown that root asked for had timed out" in (await host.domains.info("web1"))["reason"]


@on_loop
async def test_a_reboot_that_could_not_be_asked_for_is_none_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    async with world.daemon() as host:
        pid = await world.run("web1")
        with asleep(pid), pytest.raises(errors.MonitorError):
            await host.domains.reboot("web1", force=False, timeout=20, by=ROOT)
        assert world.record("web1").data["request"]["verb"] == REBOOT_GIVEN_UP
    async with world.daemon() as host:
        machine = host.domains.driver.machines["web1"]
        await until(lambda: machine.monitor is not None and machine.monitor.link is Link.CONNECTED, "the monitor")
        # Powering off is what it was, and ends it.
        world.type("web1", "poweroff")
        await asyncio.wait_for(machine.over.wait(), 20)
        assert (await host.domains.info("web1"))["state"] == "stopped"


@pytest.mark.parametrize("force", [False, True])
@on_loop
async def test_reboot(world: World, force: bool) -> None:
    async with world.daemon() as host:
        pid = await world.run("web1")
        assert (await host.domains.reboot("web1", force=force, timeout=20, by=ROOT))["changed"] is True
        info = await host.domains.info("web1")
        assert (info["state"], info["pid"]) == ("running", pid)
        # After it the power button is what it was.
        assert (await host.domains.shutdown("web1", None, by=ROOT))["changed"] is True
        assert (await host.domains.info("web1"))["exit"]["cause"] == "shutdown"


@on_loop
async def test_a_reboot_that_the_guest_ignores(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "deaf")
        with pytest.raises(errors.TimedOut, match="to be rebooted"):
            await host.domains.reboot("web1", force=False, timeout=0.2, by=ROOT)
        assert (await host.domains.info("web1"))["state"] == "running"
        world.type("web1", "poweroff")
        await host.domains.driver.machines["web1"].over.wait()
        assert (await host.domains.info("web1"))["reason"] == "powered off by itself"


@on_loop
async def test_a_guest_that_dies_while_it_reboots(world: World) -> None:
    async with world.daemon() as host:
        await world.run("web1", "deaf")
        rebooting = asyncio.ensure_future(host.domains.reboot("web1", force=False, timeout=600, by=ROOT))
        news = host.domains.driver.machines["web1"].news
        await until(lambda: "POWERDOWN" in [event["event"] for event in news.last])
        world.type("web1", "die SIGKILL")
        with pytest.raises(errors.InvalidState, match="ended instead of rebooting: killed by SIGKILL"):
            await rebooting


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("verb", "reason", "cause"),
    [
        ("poweroff", "powered off", "guest-shutdown"),
        ("panic", "the guest's kernel panicked", "panic"),
        ("die SIGSEGV", "killed by SIGSEGV", "killed"),
        ("die SIGTERM", "killed by SIGTERM", "killed"),
    ],
)
@on_loop
async def test_what_ended_while_nobody_was_there(
    world: World, verb: str, reason: str, cause: str, *, told: bool
) -> None:
    """After a flood of events as well, which nobody keeps; and with a QEMU that doesn't say what ends it."""
    async with world.daemon() as host:
        pid = await world.run("web1", "" if told else "untold")
        start = process.start_time(pid)
        child = host.domains.driver.machines["web1"].child
        assert child is not None
        stdin = os.dup(child.stdin())
    os.write(stdin, f"flood 20000\n{verb}\n".encode())
    os.close(stdin)
    await until(lambda: not process.alive(pid, start), "its end")
    async with world.daemon() as host:
        item = await host.domains.info("web1")
        assert item["exit"]["cause"] == cause
        assert item["reason"].startswith(reason)


@on_loop
async def test_two_operations_at_once_take_turns(world: World) -> None:
    async with world.daemon() as host:
        await world.define("web1")
        results = await asyncio.gather(*(host.domains.start("web1", by=ROOT) for _ in range(4)))
        assert sorted(result["changed"] for result in results) == [False, False, False, True]
        assert len({result["pid"] for result in results}) == 1
        stopped = await asyncio.gather(*(host.domains.stop("web1", by=ROOT) for _ in range(3)))
        assert sorted(result["changed"] for result in stopped) == [False, False, True]
        assert world.units.history.count("start virtd-qemu-web1.service") == 1
