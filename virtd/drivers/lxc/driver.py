# SPDX-License-Identifier: LGPL-2.1-or-later
"""The LXC driver: all containers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from ... import errors
from ...guests.driver import GuestDriver
from ...model import container as model
from ...model.settings import Lxc
from ...objects.protocol import Problem, Use
from ...replies import guests as replies
from .. import ids
from ..ids import Range
from . import create as creating
from . import execs, exposure, operations, prerequisites, starting, volume
from .container import DRIVER, Container
from .idmaps import HINT, Maps

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from ...children.child import Services
    from ...model.settings import Settings
    from ...objects.conflicts import Holding
    from ...objects.peers import Peers
    from ...objects.protocol import Publish
    from ...systemd.units import Units


log = logging.getLogger(__name__)


def make(services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver:
    guests = Range(ids.GUESTS.owner, settings.qemu.first_uid, settings.qemu.uid_count)
    return Driver(services, settings.lxc, publish, peers, guests)


class Driver(GuestDriver[Container, model.Container]):
    """`publish(event, name)` is called with "added", "removed", "changed" and "ended"."""

    name = DRIVER
    noun = "container"

    def __init__(
        self, services: Services, settings: Lxc, publish: Publish, peers: Peers, guests: Range = ids.GUESTS
    ) -> None:
        super().__init__(services, publish)
        self._settings = settings
        self._peers = peers
        self._tasks: set[asyncio.Task[None]] = set()
        self._making: set[str] = set()  # containers that are being made
        self._cleared = asyncio.Event()  # set once what the last daemon left unfinished is removed
        self._cleared.set()
        table = f"{services.paths.lib}/lxc-ids.json"
        self.maps = Maps(self.objects, settings.directory, table, guests)

    def make(self, name: str) -> Container:
        return Container(self._shared, name, self._settings, self._peers)

    def parse(self, text: str, source: str) -> model.Container:
        return model.parse(text, source)

    def check(self, text: str, source: str) -> model.Container:
        """IDs that the host's subuid(5) doesn't allow are refused now, not only at a start."""
        container = super().check(text, source)
        self.maps.check(container, source)
        return container

    def restore(self) -> None:
        self._keep_others_out()
        super().restore()

    def _keep_others_out(self) -> None:
        """An earlier version let everybody pass these directories. One that the settings name is left as it is."""
        ours = [self._settings.directory] if self._settings.directory == Lxc().directory else []
        for path in (self._run, f"{self._run}/{volume.ROOTS}", *ours):
            with contextlib.suppress(OSError):
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode) and mode & 0o77:
                    os.chmod(path, 0o700)

    async def reload(self) -> None:
        for machine in self.machines.values():
            machine.look_at_root()

    def load_definitions(self) -> list[str]:
        changed = super().load_definitions()
        self._look_for_overlaps()
        return changed

    def define(self, text: str, source: str) -> tuple[Container, bool]:
        defined = super().define(text, source)
        self._look_for_overlaps()
        return defined

    def forget(self, name: str) -> None:
        super().forget(name)
        self._look_for_overlaps()

    def _look_for_overlaps(self) -> None:
        """Report containers that share IDs by an earlier version's or a person's doing: each runs on with them."""
        for key in [key for key in self.problems if key.startswith("ids ")]:
            del self.problems[key]
        for name, other in self.maps.overlaps().items():
            text = f"Container {name} has user IDs in common with {other.ids.owner}, whose files are its own, too"
            self.problems[f"ids {name}"] = Problem(text, HINT)

    async def start(self, name: str, by: str) -> bool:
        container = self.find(name)
        await self.certain()
        return await starting.start(container, self.maps, by)

    async def stop(self, name: str, by: str) -> bool:
        return await operations.stop(self.find(name), by)

    async def create(self, name: str, image: str, ids: int | None = None) -> Container:
        """Make a root file system from `image`, and define the container, with `ids` IDs.

        Raises a VirtdError, with nothing left behind.
        """
        if name in self.machines or name in self._making:
            raise errors.Exists(f"Cannot create {name}: there is a container of that name")
        directory = self._settings.directory
        self._making.add(name)
        try:
            await self.certain()
            await self._cleared.wait()
            creating.check(name, image, directory)
            given = self.maps.reserve_new(name, model.IDS if ids is None else ids)
            job = creating.Job(name, image, directory, given, self._run)
            units = await self._services.units()
            return await creating.run(job, units, lambda text: self.define(text, name)[0])
        finally:
            self._making.discard(name)
            self.maps.release(name)

    def images(self) -> list[Use]:
        """See protocol.Using: the volumes that containers have as their roots."""
        return [
            Use(
                machine.key,
                f"{self.noun} {machine.name}",
                image.path,
                (image.dev, image.ino),
                image.writes,
                mounted=True,
            )
            for machine in self.machines.values()
            if machine.alive
            for image in machine.kept.images
        ]

    @property
    def _run(self) -> str:
        return f"{self._services.paths.run}/{DRIVER}"

    async def reconcile(self) -> None:
        units = await self._services.units()
        self._cleared.clear()
        self._begin(self._clear(units), "clear-creating")
        await super().reconcile()
        alive = {machine.name for machine in self.machines.values() if machine.alive or not machine.over.is_set()}
        await volume.sweep(self._run, units, alive)
        self._begin(execs.clear(units), "clear-execs")

    def _begin(self, work: Coroutine[object, None, None], name: str) -> None:
        self._tasks.add(task := asyncio.create_task(work, name=name))
        task.add_done_callback(self._tasks.discard)

    async def _clear(self, units: Units) -> None:
        def defined(name: str) -> bool:
            return (machine := self.machines.get(name)) is not None and machine.definition is not None

        try:
            await creating.clear(self._run, self._settings.directory, units, defined)
        except (errors.VirtdError, OSError) as exc:
            log.warning("What a cut-off making of a container has left isn't removed: %s", exc)
        finally:
            self._cleared.set()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().close()

    async def go_on(self, machine: Container) -> None:
        await operations.finish(machine)

    def pid_of(self, machine: Container) -> int | None:
        return machine.init() if machine.alive else None

    def describe_fully(self, machine: Container) -> replies.ContainerInfo:
        container = machine.running_definition
        kept = machine.kept
        addresses = machine.addresses() if machine.alive else []
        for card in kept.cards:
            with contextlib.suppress(errors.VirtdError, LookupError):
                leased = self._peers.networks.addresses_of(card.network, card.mac)
                addresses += [address for address in leased if address not in addresses]
        return replies.ContainerInfo(
            **msgspec.structs.asdict(super().describe_fully(machine)),
            # The directory that a volume is mounted at is known while it is.
            rootfs=(kept.root or container.directory) if container is not None else None,
            volume=msgspec.to_builtins(container.volume) if container is not None else None,
            argv=list(container.argv) if container is not None else [],
            hostname=(container.hostname or container.name) if container is not None else None,
            privileged=container.privileged if container is not None else None,
            ids=[kept.ids.first, kept.ids.count] if kept.ids is not None else None,
            limits=_limits(prerequisites.limits(container, self._settings)) if container is not None else {},
            used=machine.used() if machine.alive else {},
            addresses=addresses,
            interfaces=kept.interfaces,
        )

    def warnings(self, definition: model.Container) -> list[str]:
        from ...objects import conflicts
        from . import holdings  # no start of the daemon needs it

        found = [f"{key}: {text}" for key, text in prerequisites.missing(definition)]
        known = self.machines.get(definition.name)
        uuid = definition.uuid or (known.uuid if known is not None else "")
        mine = holdings.defined(definition, uuid, conflicts.bridges(self._peers))
        found += conflicts.warnings(self._peers, f"container {definition.name}", mine)
        if (root := definition.directory) is None:
            return found
        try:
            prerequisites.check_root(definition, root, "")
            exposure.check(root, "", self._settings.directory)
        except errors.InvalidDefinition as exc:
            found.append(f"{exc.key}: {exc.expected}")
        return found

    def holdings(self, *, running: bool) -> Iterator[tuple[str, Holding]]:
        from ...objects import conflicts
        from . import holdings

        bridge_of = conflicts.bridges(self._peers)
        for machine in self.machines.values():
            owner = f"container {machine.name}"
            if machine.alive:
                yield from ((owner, one) for one in holdings.running(machine, bridge_of))
            if not running and machine.definition is not None:
                yield from ((owner, one) for one in holdings.defined(machine.definition, machine.uuid, bridge_of))


def _limits(limits: model.Limits) -> dict[str, float | None]:
    return {"memory": limits.memory_bytes, "cpus": limits.cpus, "pids": limits.pids}
