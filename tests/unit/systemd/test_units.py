# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of virtd.systemd.units that need no systemd; the rest is tried in tests/live/test_units.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Container, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtd import errors
from virtd.systemd import units
from virtd.systemd.bus import Var
from virtd.systemd.jobs import Jobs
from virtd.systemd.units import CLD_DUMPED, CLD_EXITED, CLD_KILLED, UnitSpec, UnitState

NO_STDIO = (os.devnull, os.devnull, os.devnull)

PROPERTIES: dict[str, Any] = {
    "LoadState": "loaded",
    "ActiveState": "failed",
    "SubState": "failed",
    "InvocationID": list(range(16)),
    "Description": "a guest",
    "Job": (0, "/"),
    "MainPID": 0,
    "Result": "exit-code",
    "ExecMainCode": 1,
    "ExecMainStatus": 42,
    "ExecMainStartTimestamp": 1_700_000_000_250_000,
    "ExecMainExitTimestamp": 0,
}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", "_"),
        ("web1", "web1"),
        ("1web", "_31web"),
        ("virtd-qemu-a_b.service", "virtd_2dqemu_2da_5fb_2eservice"),
        ("ü", "_c3_bc"),
    ],
)
def test_labels_are_escaped_as_systemd_does(text: str, label: str) -> None:
    assert units.escape_label(text) == label
    assert units.unescape_label(label) == text


@given(st.text())
def test_escaping_has_an_inverse(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    label = units.escape_label(text)
    assert units.unescape_label(label) == text
    assert label.replace("_", "a").isalnum()
    assert label.isascii()


@pytest.mark.parametrize("label", ["", "a-b", "_4", "a_62", "_c3", "web1 ", "_2D", "a_"])
def test_what_escaping_can_not_have_made(label: str) -> None:
    with pytest.raises(ValueError, match="not an escaped name"):
        units.unescape_label(label)


def test_object_path() -> None:
    assert units.object_path("a.service") == "/org/freedesktop/systemd1/unit/a_2eservice"


@given(st.text("abcXYZ019._-", min_size=1, max_size=64))
def test_unit_names_have_an_inverse(name: str) -> None:
    unit = units.unit_name("qemu", name)
    assert unit == f"virtd-qemu-{name}.service"
    assert units.object_name("qemu", unit) == name
    assert units.object_name("lxc", unit) is None


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "ü", "a b", "x" * 300, "a\n"])
def test_what_can_be_no_unit(name: str) -> None:
    with pytest.raises(ValueError, match="can't be part of a unit's name"):
        units.unit_name("qemu", name)


@pytest.mark.parametrize(
    "unit", ["virtd.service", "virtd-qemu-.service", "virtd-qemu-a.scope", "xvirtd-qemu-a.service"]
)
def test_other_units_are_no_objects(unit: str) -> None:
    assert units.object_name("qemu", unit) is None


def test_parsing_a_state() -> None:
    state = units.parse_state("u.service", PROPERTIES)
    assert state == UnitState(
        name="u.service",
        load="loaded",
        active="failed",
        sub="failed",
        result="exit-code",
        main_pid=0,
        invocation_id="000102030405060708090a0b0c0d0e0f",
        exec_code=CLD_EXITED,
        exec_status=42,
        started_at=1_700_000_000.25,
        exited_at=None,
        description="a guest",
    )
    assert not state.running
    assert units.parse_state("u.service", PROPERTIES | {"MainPID": 7, "InvocationID": []}).running


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (CLD_EXITED, 203, "cannot execute /bin/x: the program is missing or not executable (status 203/EXEC)"),
        (CLD_EXITED, 226, "226/NAMESPACE"),
        (CLD_EXITED, 3, "/bin/x exited with status 3"),
        (CLD_KILLED, 9, "/bin/x was killed by SIGKILL"),
        (CLD_DUMPED, 11, "SIGSEGV"),
        (CLD_KILLED, 99, "signal 99"),
        (0, 0, "systemd could not start the unit: timeout, exit-code"),
    ],
)
def test_failures_in_words(code: int, status: int, words: str) -> None:
    state = units.parse_state("u.service", PROPERTIES | {"ExecMainCode": code, "ExecMainStatus": status})
    assert words in units.failure("/bin/x", "timeout", state)


def test_a_failure_without_remains() -> None:
    assert units.failure("/bin/x", "dependency", None) == "systemd could not start the unit: dependency"


def properties_of(
    spec: UnitSpec, stdio: tuple[units.Stdio, units.Stdio, units.Stdio], version: int
) -> dict[str, Var]:
    return {key: Var(signature, value) for key, signature, value in units.transient_properties(spec, stdio, version)}


def test_what_a_unit_is_made_of() -> None:
    spec = UnitSpec(
        name="u.service",
        description="a guest",
        slice="virtd-qemu.slice",
        argv=("/bin/x", "-y"),
        environment=(("A", "b=c d"),),
        user="virtd-qemu",
        supplementary_groups=("kvm",),
        properties=(("NoNewPrivileges", "b", True),),
    )
    properties = properties_of(spec, ("/run/in", 7, 8), 257)
    assert properties["ExecStart"] == Var("a(sasb)", [("/bin/x", ["/bin/x", "-y"], False)])
    assert properties["Environment"] == Var("as", ["A=b=c d"])
    assert properties["RemainAfterExit"] == Var("b", True)
    assert properties["StandardInputFile"] == Var("s", "/run/in")
    assert properties["StandardOutputFileDescriptor"] == Var("h", 0)
    assert properties["StandardErrorFileDescriptor"] == Var("h", 1)
    assert properties["User"] == Var("s", "virtd-qemu")
    assert properties["SupplementaryGroups"] == Var("as", ["kvm"])
    assert properties["NoNewPrivileges"] == Var("b", True)
    # systemd takes an empty group for a wish, too.
    assert "Group" not in properties


def test_a_unit_lives_through_a_soft_reboot_where_there_are_any() -> None:
    spec = UnitSpec("u.service", "a guest", "virtd-qemu.slice", ("/bin/x",), after=("srv-vm.mount",))
    old, new = (properties_of(spec, NO_STDIO, version) for version in (252, 255))
    assert new["SurviveFinalKillSignal"] == Var("b", True)
    assert "SurviveFinalKillSignal" not in old  # systemd refuses what it doesn't know
    for properties in (old, new):
        assert properties["DefaultDependencies"] == Var("b", False)
        assert "poweroff.target" in properties["Conflicts"].value
        assert properties["After"] == Var("as", ["virtd-guests-pre.target", "srv-vm.mount"])
        assert "virtd-guests-pre.target" not in properties["Before"].value
    ground = properties_of(UnitSpec("n.service", "a network", "s.slice", ("/x",), ground=True), NO_STDIO, 255)
    assert "virtd-guests-pre.target" in ground["Before"].value
    assert ground["After"] == Var("as", [])


def test_mounts_that_a_path_may_be_on() -> None:
    assert units.mount_units("/srv/vm images/.a-b/disk.raw") == [
        "srv.mount",
        "srv-vm\\x20images.mount",
        "srv-vm\\x20images-.a\\x2db.mount",
    ]
    assert units.mount_units("/.hidden/disk.raw") == ["\\x2ehidden.mount"]
    assert units.mount_units("/disk.raw") == []


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/srv/pool", "srv-pool.mount"),
        ("/srv/my-pool/.x", "srv-my\\x2dpool-.x.mount"),
        ("/.a b", "\\x2ea\\x20b.mount"),
        ("/", "-.mount"),
    ],
)
def test_mount_units(path: str, unit: str) -> None:
    assert units.mount_unit(path) == unit  # as systemd-escape --path --suffix=mount has it


def test_a_job_can_end_before_it_is_known() -> None:
    async def main() -> None:
        jobs = Jobs("u.service")
        jobs.removed("/job/1", "done")
        assert await jobs.wait("/job/1", 1) == "done"
        waiting = asyncio.create_task(jobs.wait("/job/3", 1))
        await asyncio.sleep(0)
        jobs.removed("/job/2", "failed")
        await asyncio.sleep(0)
        assert not waiting.done()
        jobs.removed("/job/3", "canceled")
        assert await waiting == "canceled"
        with pytest.raises(errors.TimedOut, match=r"u\.service did not end within 0\.01 s"):
            await jobs.wait("/job/4", 0.01)

    asyncio.run(main())


class Rows(list[tuple[Any, ...]]):
    """Stands in for a bus.Table."""

    def rows(self, columns: Sequence[int], keys: Container[str] | None = None) -> list[tuple[Any, ...]]:
        return [tuple(row[column] for column in columns) for row in self if keys is None or row[0] in keys]


class SlowBus:
    """Answers each DumpUnitFileDescriptorStore when it is told to, with the number of the call as the inode."""

    def __init__(self) -> None:
        self.asked = 0
        self.question = asyncio.Event()
        self.answer = asyncio.Semaphore(0)

    async def table(self, *_: Any) -> Rows:
        self.asked += 1
        self.question.set()
        number = self.asked
        await self.answer.acquire()
        return Rows((name, 0, 0, 8, number, 0, 0, "", 0) for name in ("qemu/web1/stdin", "qemu/web2/stdin"))


def test_dumps_are_shared_but_never_with_one_who_came_after_the_question() -> None:
    async def dumps() -> list[Any]:
        bus: Any = SlowBus()
        systemd = units.Units(bus)
        first = asyncio.create_task(systemd.store_dump("virtd.service"))
        await bus.question.wait()
        later = [asyncio.create_task(systemd.store_dump("virtd.service", ["qemu/web2/stdin"])) for _ in range(3)]
        await asyncio.sleep(0)
        later[0].cancel()
        for _ in range(2):
            bus.answer.release()
        answers: list[Any] = await asyncio.gather(first, *later[1:])
        assert bus.asked == 2
        return answers

    web1, web2, device = "qemu/web1/stdin", "qemu/web2/stdin", os.makedev(0, 8)
    assert asyncio.run(dumps()) == [
        [(web1, device, 1), (web2, device, 1)],
        [(web2, device, 2)],
        [(web2, device, 2)],
    ]
