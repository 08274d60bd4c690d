# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any sequence of operations, crashes at any step, deaths of guests and restarts, against a dict of what must be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.doubles.model import ALIVE, NAMES, OPERATIONS, after
from tests.doubles.whole_host import ROOT, Killed, World, until
from tests.unit.drivers.lxc.test_container_restarts import Site
from virtd import errors
from virtd.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence


class Model(RuleBasedStateMachine):
    """`expected`: state and PID of each object that is defined."""

    driver: str

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.runner = asyncio.Runner()
        self.expected: dict[str, tuple[str, int]] = {}
        self.run(self.make())
        for name in ("web1", "web2"):
            for operation in ("define", "start"):
                self.run(self.work(operation, name))
            self.settle(name, self.run(self.found(name)))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def set_up(self) -> World:
        raise NotImplementedError

    async def work(self, operation: str, name: str) -> Any:
        raise NotImplementedError

    async def listing(self) -> Sequence[Reply]:
        raise NotImplementedError

    async def certain(self, machine: Any) -> None:
        """Until all that the kind's own process has to say of it is known."""
        raise NotImplementedError

    @property
    def machines(self) -> dict[str, Any]:
        return self.world.guests(self.driver).machines

    async def make(self) -> None:
        self.world = self.set_up()
        await self.begin()

    async def begin(self) -> None:
        self.daemon = self.world.daemon()
        self.host = await self.daemon.__aenter__()

    async def end(self) -> None:
        await self.daemon.__aexit__(None, None, None)

    async def found(self, name: str) -> tuple[str, int]:
        items = {item["name"]: item for item in await self.listing()}
        return (items[name]["state"], items[name]["pid"] or 0) if name in items else ("", 0)

    def settle(self, name: str, found: tuple[str, int]) -> None:
        before = self.expected.get(name, ("", 0))
        if before[0] in ALIVE and found[0] in ALIVE:
            assert before[1] == found[1], f"{name} has become another process"
        self.expected.pop(name, None)
        if found[0]:
            self.expected[name] = found

    @rule(operation=OPERATIONS, name=NAMES)
    def do(self, operation: str, name: str) -> None:
        state = self.expected.get(name, ("", 0))[0]
        try:
            wanted = after(operation, state)
        except LookupError:
            with pytest.raises(errors.VirtdError):
                self.run(self.work(operation, name))
            return
        self.run(self.work(operation, name))
        found = self.run(self.found(name))
        assert found[0] == wanted
        self.settle(name, found)

    @rule(operation=OPERATIONS, name=NAMES, step=st.integers(1, 40))
    def do_and_die(self, operation: str, name: str, step: int) -> None:
        """The daemon is killed before its n-th step; the next one finds the domain as before, or as after."""
        state = self.expected.get(name, ("", 0))[0]
        allowed = {state}
        with contextlib.suppress(LookupError):
            allowed.add(after(operation, state))
            if operation in ("start", "undefine") and state == "crashed":
                # Rolled back, which is later than the crash; or its record is gone, and its definition not yet.
                allowed.add("stopped")

        async def cut_off() -> tuple[str, int]:
            self.world.steps, self.world.crash_at = [], step
            with contextlib.suppress(Killed, errors.VirtdError):
                await self.world.unless_crashed(self.work(operation, name))
            await self.end()
            await self.begin()
            machine = self.machines.get(name)
            if machine is not None and machine.request is not None:  # what was cut off is finished
                await asyncio.wait_for(machine.over.wait(), 20)
            if machine is not None and machine.alive:
                await self.certain(machine)
            return await self.found(name)

        found = self.run(cut_off())
        assert found[0] in allowed, f"{operation} cut off before {self.world.steps[-1:]}"
        self.settle(name, found)

    @rule(name=NAMES, away=st.booleans())
    def a_guest_dies(self, name: str, away: bool) -> None:
        if self.expected.get(name, ("", 0))[0] not in ALIVE:
            return

        async def die() -> tuple[str, int]:
            if away:
                await self.end()
            process = self.world.units.process(name, self.driver)
            process.kill()
            process.wait()
            if away:
                await self.begin()
            await until(lambda: not self.machines[name].alive)
            await self.machines[name].over.wait()
            return await self.found(name)

        self.expected[name] = ("crashed", 0)
        assert self.run(die()) == ("crashed", 0)

    @rule()
    def restart(self) -> None:
        async def again() -> None:
            await self.end()
            await self.begin()

        self.run(again())

    @invariant()
    def everything_agrees(self) -> None:
        async def look() -> None:
            for name, machine in list(self.machines.items()):
                if machine.alive:
                    await self.certain(machine)
                assert machine.problems == {}, name
            listed = {item["name"]: (item["state"], item["pid"] or 0) for item in await self.listing()}
            assert listed == self.expected
            alive = sorted(name for name, (state, _) in self.expected.items() if state in ALIVE)
            assert sorted(self.world.units.units) == [f"virtd-{self.driver}-{name}.service" for name in alive]
            assert len(self.world.slots()) == 5 * len(alive)
            assert {slot.split("/")[1] for slot in self.world.slots()} == set(alive)
            assert sorted(self.expected) == sorted(
                entry.removesuffix(".toml") for entry in os.listdir(f"{self.world.paths.etc}/{self.driver}")
            )
            assert (await self.host.check_all(repair=False, by=ROOT))["differences"] == []

        self.run(look())

    def teardown(self) -> None:
        self.run(self.end())
        self.world.close()
        self.runner.close()
        self.patch.undo()
        self.directory.cleanup()


class Domains(Model):
    driver = "qemu"

    def set_up(self) -> World:
        return World(Path(self.directory.name), self.patch)

    async def work(self, operation: str, name: str) -> Any:
        if operation == "define":
            return await self.world.define(name)
        return await getattr(self.host.domains, operation)(name, by=ROOT)

    async def listing(self) -> Sequence[Reply]:
        return await self.host.domains.listing()

    async def certain(self, machine: Any) -> None:
        await machine.attach(5)  # whether it is paused is QEMU's to say


class Containers(Model):
    driver = "lxc"

    def set_up(self) -> World:
        self.site = Site(Path(self.directory.name), self.patch)
        return self.site.world

    async def work(self, operation: str, name: str) -> Any:
        if operation == "define":
            return await self.site.define(self.host, name=name)
        operation = {"suspend": "freeze", "resume": "thaw"}.get(operation, operation)
        return await getattr(self.host.containers, operation)(name, by=ROOT)

    async def listing(self) -> Sequence[Reply]:
        return await self.host.containers.listing()

    async def certain(self, machine: Any) -> None:
        await until(machine.init, "its first program")


TestDomains, TestContainers = Domains.TestCase, Containers.TestCase
TestDomains.settings = TestContainers.settings = settings(
    max_examples=int(os.environ.get("VIRTD_EXAMPLES", "12")),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
