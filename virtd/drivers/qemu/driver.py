# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver: all domains."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors, files
from ...guests.driver import GuestDriver
from ...model import domain as model
from ...model.state import Cause
from ...objects.protocol import Problem, Use
from ...replies import guests as replies
from ...systemd.names import helper_unit
from . import directory, nics, operations, prerequisites, userdb, users
from .guest import DRIVER, QemuGuest
from .news import LOST, STANDSTILL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...children.child import Services
    from ...model.provisioning import Provisioning
    from ...model.settings import Qemu, Settings
    from ...objects.conflicts import Holding
    from ...objects.peers import Peers
    from ...objects.protocol import Difference, Publish
    from ...systemd.state import UnitState

log = logging.getLogger(__name__)


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    return Driver(services, settings.qemu, publish, peers)


class Driver(GuestDriver[QemuGuest, model.Domain]):
    """All domains. `publish(event, name)` gets "added", "removed", "changed" and "ended"."""

    name = DRIVER
    noun = "domain"

    def __init__(self, services: Services, settings: Qemu, publish: Publish, peers: Peers) -> None:
        super().__init__(services, publish)
        self._settings = settings
        self._peers = peers
        self.users = users.Users(services.paths, settings, services.facts)

    def make(self, name: str) -> QemuGuest:
        return QemuGuest(self._shared, name, self._settings, self._peers)

    def parse(self, text: str, source: str) -> model.Domain:
        return model.parse(text, source)

    def check(self, text: str, source: str) -> model.Domain:
        domain = super().check(text, source)
        nics.check(domain, source, self._peers)
        return domain

    def found_out(self, machine: QemuGuest, unit: UnitState) -> dict[str, Any]:
        user = self.users.seen(machine.name, unit.main_pid)
        # systemd's file of the unit, as there is no time to ask.
        has_tpm = os.path.lexists(f"{self.services.paths.transient}/{helper_unit(DRIVER, machine.name, 'tpm')}")
        return {
            **({"account": user._asdict()} if user is not None else {}),
            **({"tpm": msgspec.to_builtins(machine.tpm.promised())} if has_tpm else {}),
        }

    async def compare(self, *, repair: bool) -> list[Difference]:
        from . import fsck, openfiles

        found = await super().compare(repair=repair) + await fsck.users(
            self.machines, self.users, self.see_to_names, repair=repair
        )
        found += fsck.hardware(self.machines, repair=repair)
        found += await fsck.tpms(self.machines, self.services, repair=repair)
        return found + await openfiles.differences(self.machines.values())

    async def look(self) -> None:
        """See whether the files of running guests are still there; called now and then."""
        from . import openfiles  # no start of the daemon needs it

        await openfiles.look(self.machines.values())
        for machine in list(self.machines.values()):
            if machine.alive and STANDSTILL in machine.problems:
                await machine.standstill.look()

    def recall(self) -> None:
        super().recall()
        for machine in self.machines.values():
            if machine.alive and LOST in machine.data:
                from . import openfiles  # hardly any guest ever loses one

                openfiles.recall(machine)

    async def reconcile(self) -> None:
        await super().reconcile()
        await self._see_to_tpms()
        await nics.sweep({machine.name for machine in self.machines.values() if machine.alive}, self._peers)
        self.see_to_names()

    async def _see_to_tpms(self) -> None:
        """Put away those whose machine has ended without any of it being on record."""
        with contextlib.suppress(OSError):
            if any("@tpm." in unit for unit in os.listdir(self.services.paths.transient)):
                from . import fsck  # hardly any guest has one

                for found in await fsck.tpms(self.machines, self.services, repair=True):
                    log.warning("%s", found.text)

    def see_to_names(self) -> None:
        """Name the users of running guests, and remove the names of all others."""
        directory = self.services.paths.userdb
        there = userdb.listing(directory)
        needed = {machine.name: user for machine in self.machines.values() if (user := machine.user) is not None}
        for name, user in needed.items():
            if not userdb.mentioned(there, user):
                self.machines[name].name_user()
        for user in userdb.left_over(directory, there, set(needed.values())):
            try:
                userdb.remove(directory, user)
            except errors.HostError as exc:  # fsck reports it
                log.warning("The name of user %s stays: %s", user.name, exc)
        for path in userdb.unfinished(directory, there):
            with contextlib.suppress(errors.HostError):  # the next attempt at that name overwrites it
                files.remove(path)

    async def start(self, name: str, by: str) -> bool:
        from . import starting  # no start of the daemon needs it

        machine = self.find(name)
        await self.certain()
        others = [other for other in self.machines.values() if other is not machine]
        return await starting.start(machine, others, self.users, by)

    async def stop(self, name: str, by: str) -> bool:
        return await operations.stop(self.find(name), by)

    async def go_on(self, machine: QemuGuest) -> None:
        await operations.finish(machine)

    def after_end(self, machine: QemuGuest) -> None:
        panicked = (
            machine.record is not None
            and machine.record.exit is not None
            and machine.record.exit.cause == Cause.PANIC
        )
        if panicked and machine.definition is not None and machine.definition.on_crash is model.OnCrash.RESTART:
            machine.spawn(self._restart(machine), "restart-after-panic")

    async def _restart(self, machine: QemuGuest) -> None:
        try:
            await self.start(machine.name, "on_crash")
        except errors.VirtdError as exc:
            machine.problems["start"] = Problem(f"The restart after a panic failed: {exc.message}", exc.hint)

    def forget_beside(self, machine: QemuGuest) -> Callable[[], None]:
        return machine.hardware.forget()

    def describe_fully(self, machine: QemuGuest) -> replies.DomainInfo:
        domain = machine.running_definition
        drives = domain.cdrom if domain is not None else ()
        if domain is not None and (absent := machine.data.get("media")):
            from . import media

            drives = media.without(domain, absent).cdrom
        return replies.DomainInfo(
            **msgspec.structs.asdict(super().describe_fully(machine)),
            memory=domain.memory_bytes if domain is not None else None,
            vcpus=domain.vcpus if domain is not None else None,
            machine=domain.machine if domain is not None else None,
            hardware=machine.hardware.shown(),
            disks=[disk.path or f"{disk.pool}/{disk.volume}" for disk in domain.disk]
            + [cdrom.path for cdrom in drives if cdrom.path is not None]
            if domain is not None
            else [],
            cdroms=[cdrom.path for cdrom in drives],
            nics=nics.describe(
                domain, machine.uuid, machine.hardware.placed(domain), self._peers, alive=machine.alive
            )
            if domain is not None
            else [],
            monitor=machine.monitor.link.value if machine.monitor is not None else None,
            standstill=machine.standstill.described() if STANDSTILL in machine.problems else None,
            events=replies.Events(taken=machine.news.taken, hung_up=machine.floods),
            vnc=directory.vnc_socket(machine.runtime)
            if machine.alive and domain is not None and domain.vnc is not None and domain.vnc.enabled
            else None,
            guest=_provided(domain.guest) if domain is not None else None,
            tpm=machine.tpm.described(domain) if domain is not None and domain.tpm is not None else None,
        )

    def warnings(self, definition: model.Domain) -> list[str]:
        from ...objects import conflicts
        from . import holdings, twins  # no start of the daemon needs it
        from .devices import placing

        found = [f"{key}: {text}" for key, text in prerequisites.missing_files(definition)]
        if definition.tpm is not None:
            from . import swtpm

            found += swtpm.warnings(definition)
        known = self.machines.get(definition.name)
        uuid = definition.uuid or (known.uuid if known is not None else "")
        placed = known.hardware.placed(definition) if known is not None else placing.place(definition)
        mine = [
            *holdings.defined(definition, uuid, placed, conflicts.bridges(self._peers)),
            *holdings.here(definition),
        ]
        found += conflicts.warnings(self._peers, f"domain {definition.name}", mine)
        # The files of those that run are known by device and inode.
        others = [one for one in self.machines.values() if one is not known and not one.alive]
        return found + twins.warnings(definition, [one.definition for one in others if one.definition is not None])

    def holdings(self, *, running: bool) -> Iterator[tuple[str, Holding]]:
        from ...objects import conflicts
        from . import holdings

        bridge_of = conflicts.bridges(self._peers)
        for machine in self.machines.values():
            owner = f"domain {machine.name}"
            if machine.alive:
                for one in holdings.running(machine, bridge_of):
                    yield owner, one
            if not running and machine.definition is not None:
                placed = machine.hardware.placed(machine.definition)
                for one in holdings.defined(machine.definition, machine.uuid, placed, bridge_of):
                    yield owner, one

    def images(self) -> list[Use]:
        """See protocol.Using."""
        return [
            Use(machine.name, f"{self.noun} {machine.name}", path, identity, writes)
            for machine in self.machines.values()
            for identity, (path, writes) in machine.images().items()
        ]


def _provided(guest: Provisioning) -> replies.Provided | None:
    """What the guest's system is set up with, for Info."""
    if guest.is_empty:
        return None
    files = ["meta-data", "user-data", *(["network-config"] if guest.network_config else [])]
    return replies.Provided(
        cloud_init=files if guest.by_cloud_init else [],
        credentials=list(guest.credentials),
        ignition=guest.ignition is not None,
    )
