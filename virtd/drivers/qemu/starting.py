# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a guest. Record and slots come before the process; whatever fails or is cut off on the way is undone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

import msgspec

from ... import __version__, errors, fdstore, files, journal
from ...child import Child, Ends
from ...messages import Message
from ...model.state import State
from ...records import Record, now
from ...units import UnitSpec
from ..protocol import Problem
from . import command, ends, sandbox
from . import host as hostinfo
from .machine import DRIVER, Machine

if TYPE_CHECKING:
    from ...model import domain as model

log = logging.getLogger(__name__)

# All that QEMU gets of an environment: nothing of ours.
ENVIRONMENT = (("PATH", "/usr/sbin:/usr/bin"), ("LANG", "C.UTF-8"), ("HOME", "/"))
CAPABILITIES = b'{"execute": "qmp_capabilities"}\n'


async def start(machine: Machine, others: list[Machine], by: str) -> bool:
    """Start it; False if it was running. `others`: the driver's other machines.

    Raises a VirtdError, with nothing left behind.
    """
    async with machine.exclusive("start"):
        if machine.alive:
            return False
        await machine.over.wait()
        domain = machine.definition
        if domain is None:
            raise errors.NotFound(
                f"Domain {machine.name} has no definition", hint=f'virtctl define FILE, with name = "{machine.name}".'
            )
        await _Start(machine, domain, by).run(others)
        return True


class _Start:
    """One try. Each step says what it adds; `_undo` takes it all back."""

    def __init__(self, machine: Machine, domain: model.Domain, by: str) -> None:
        self.machine = machine
        self.domain = domain
        self.by = by
        self.services = machine.shared.services
        self.settings = machine.shared.settings
        self.account = hostinfo.account(self.settings)
        self.host = command.Host(hostinfo.binary(self.settings), hostinfo.has_kvm(), machine.runtime)
        self.child = Child(self.services, DRIVER, machine.name)
        self.stderr_from = 0

    async def run(self, others: list[Machine]) -> None:
        machine = self.machine
        hostinfo.check_files(self.domain, machine.source, self.account)
        check_disks(machine, self.domain, others)
        self._check_budget()
        units = await self.services.units()
        before = machine.record
        ends, descriptors = self.child.prepare()
        try:
            assert self.child.stderr is not None
            self.stderr_from = os.fstat(self.child.stderr.fd).st_size
            machine.over.clear()
            self._record(descriptors)
            machine.begin_stderr(self.child)
            self._runtime()
            await self.child.keep(descriptors)
            with contextlib.suppress(errors.Busy):
                await units.collect(machine.unit)
            await self._spawn(ends)
        except BaseException as exc:
            ends.close()
            self.child.discard(descriptors)
            await asyncio.shield(self._undo(before, exc))
            if isinstance(exc, errors.VirtdError) and not isinstance(exc, errors.InvalidDefinition):
                raise self._explained(exc) from exc
            raise
        self._running()

    def _check_budget(self) -> None:
        try:
            self.services.store.room_for(self.child.slot_names())
        except fdstore.StoreFull as exc:
            budget = self.services.store.budget()
            text = f"Domain {self.machine.name} was not started: {exc}"
            journal.send(
                text, message_id=Message.BUDGET_REFUSED, level="error",
                VIRTD_USED=str(budget.used), VIRTD_MAX=str(budget.max), **self.machine.fields(),
            )  # fmt: skip
            raise errors.BudgetExceeded(f"Cannot start {self.machine.name}: {exc}", hint=exc.hint) from exc

    def _record(self, descriptors: dict[str, int]) -> None:
        """The record, before anything else exists: a crash from here on finds it and rolls back."""
        machine = self.machine
        owners = hostinfo.give(self.domain, self.account)
        machine_record = Record(
            driver=DRIVER,
            name=machine.name,
            uuid=machine.uuid,
            state=State.STARTING.value,
            reason=f"being started by {self.by}",
            since=now(),
            id=machine.shared.next_id(),
            unit=machine.unit,
            boot_id=machine.shared.boot_id,
            slots={name: _identity(fd) for name, fd in descriptors.items()},
            data={
                "definition": machine.definition_text,
                "parsed": msgspec.to_builtins(self.domain),
                "parsed_by": __version__,
                "owners": [list(msgspec.structs.astuple(owner)) for owner in owners],
                "request": None,
            },
        )
        machine.shared.records.save(machine_record)
        machine.record = machine_record
        machine.child = self.child
        machine.shared.publish("changed", machine)
        for owner in owners:
            try:
                os.chown(owner.path, self.account.uid, self.account.gid)
            except OSError as exc:
                raise errors.HostError(f"Cannot give {owner.path} to {self.account.user}: {exc.strerror}") from exc

    def _runtime(self) -> None:
        """The guest's own directory, with the two files of the event journal."""
        runtime = self.machine.runtime
        stem = command.events(runtime)
        try:
            files.remove_tree(runtime)
            os.makedirs(runtime, mode=0o700)
            for path, content in ((f"{stem}.in", CAPABILITIES), (f"{stem}.out", b"")):
                with open(path, "xb") as file:
                    os.fchmod(file.fileno(), 0o600)
                    os.fchown(file.fileno(), self.account.uid, self.account.gid)
                    file.write(content)
            os.chown(runtime, self.account.uid, self.account.gid)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {runtime}: {exc.strerror}") from exc

    async def _spawn(self, ends: Ends) -> None:
        machine = self.machine
        spec = UnitSpec(
            name=machine.unit,
            description=f"Domain {machine.name}",
            slice=f"virtd-{DRIVER}.slice",
            argv=tuple(command.argv(self.domain, machine.uuid, self.host)),
            environment=ENVIRONMENT,
            user=self.account.user,
            group=self.account.group,
            supplementary_groups=self.account.groups if self.host.kvm else (),
            properties=tuple(
                sandbox.properties(
                    self.domain,
                    machine.runtime,
                    toplevel=sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False)),
                    kvm=self.host.kvm,
                    stop_after=self.settings.host_shutdown_timeout,
                )
            ),
        )
        unit = await self.child.spawn(spec, ends)
        machine.save(main_pid=self.child.pid, main_start=self.child.start, invocation_id=unit.invocation_id)
        await self._greet()

    async def _greet(self) -> None:
        """Wait until QEMU answers its monitor, or ends."""
        machine = self.machine
        attaching = asyncio.ensure_future(machine.attach(self.settings.start_timeout))
        ended = asyncio.ensure_future(self.child.ended())
        try:
            await asyncio.wait((attaching, ended), return_when=asyncio.FIRST_COMPLETED)
            # The monitor can break off with QEMU's end a moment before we are told of that.
            if ended.done() or not self.child.alive():
                units = await self.services.units()
                how = ends.how(await units.ended(machine.unit))
                raise errors.StartFailed(f"Cannot start {machine.name}: {self.host.binary} {how}")
            if (problem := machine.problems.pop("monitor", None)) is not None:
                raise errors.StartFailed(problem.text)
        finally:
            for task in (attaching, ended):
                task.cancel()
            await asyncio.gather(attaching, ended, return_exceptions=True)

    def _running(self) -> None:
        machine = self.machine
        if machine.state is State.STARTING:
            machine.note(State.RUNNING, f"started by {self.by}")
        machine.problems.pop("start", None)
        machine.watch()
        journal.send(
            f"Started domain {machine.name} (PID {self.child.pid})",
            message_id=Message.STARTED, VIRTD_PID=str(self.child.pid), **machine.fields(),
        )  # fmt: skip

    async def _undo(self, before: Record | None, why: BaseException) -> None:
        """Whatever there is of it by now goes away again."""
        machine = self.machine
        if machine.record is before:  # not even a record yet
            await self.child.close()
            self.services.store.drop_prefix(f"{self.child.key}/")
            machine.over.set()
            return
        try:
            units = await self.services.units()
            with contextlib.suppress(errors.VirtdError):
                await units.kill(machine.unit, 9)
            with contextlib.suppress(errors.VirtdError):
                await units.ended(machine.unit)
            await self.child.drain()
            machine.forward_stderr(final=True)
            self.words = machine.last_words(self.stderr_from)
            reason = self.words.splitlines()[-1] if self.words else str(why)
            machine.note(
                State.STOPPED, f"failed to start: {reason}", exit=before.exit if before is not None else None
            )
            await machine.put_away()
        except Exception as exc:
            log.exception("%s: undoing its start failed", machine.name)
            machine.problems["start"] = Problem(f"Undoing a failed start failed: {exc}")

    def _explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        """The error with QEMU's own words, where it left any."""
        words = getattr(self, "words", "")
        if not words:
            return exc
        return errors.StartFailed(
            f"Cannot start {self.machine.name}: {_own_words(words)}",
            hint=exc.hint or f"See: virtctl log --stderr {self.machine.name}",
        )


def check_disks(machine: Machine, domain: model.Domain, others: list[Machine]) -> None:
    """No disk is given to two guests when one of them writes. Raises Busy."""
    mine = _used(domain)
    for other in others:
        theirs = other.running_definition if other.alive else None
        if theirs is None:
            continue
        for identity, (_path, writes) in _used(theirs).items():
            if identity in mine and (writes or mine[identity][1]):
                raise errors.Busy(
                    f"Cannot start {machine.name}: {mine[identity][0]} is in use by domain {other.name}",
                    hint=(
                        f"Two guests that write to one disk destroy it. Stop {other.name}, "
                        "or mark the disk readonly in both."
                    ),
                )


def _used(domain: model.Domain) -> dict[tuple[int, int], tuple[str, bool]]:
    """The images that a domain opens: by identity, the path and whether it writes."""
    found: dict[tuple[int, int], tuple[str, bool]] = {}
    for path, writes in [(disk.path, not disk.readonly) for disk in domain.disk] + [
        (cdrom.path, False) for cdrom in domain.cdrom
    ]:
        if (identity := hostinfo.identity(path)) is not None:
            found[identity] = (path, writes)
    return found


def _identity(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def _own_words(words: str) -> str:
    """QEMU's last lines without the program's name before each."""
    lines = [
        line.partition(": ")[2] if line.split(":")[0].rpartition("/")[2].startswith("qemu") else line
        for line in words.splitlines()
    ]
    return "; ".join(line for line in lines[-3:] if line)
