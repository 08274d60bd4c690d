# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a container: what LXC needs in addition to what every start does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from ... import errors, files, layout
from ...children.programs import ENVIRONMENT
from ...guests import start as starting
from ...guests.start import Start
from ...hints import do
from ...model import container as model
from ...objects.protocol import Problem
from ...systemd.transient import UnitSpec
from ...text import span
from . import config, ends, exposure, prerequisites, sandbox, volume
from .container import DRIVER, Container
from .kept import Image
from .links import interface_names, mac_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...children.pipes import Ends
    from ...objects.conflicts import Holding
    from .idmaps import Maps

log = logging.getLogger(__name__)

TTY_GROUP = 5  # the group "tty" of every distribution, which terminals belong to


async def start(container: Container, maps: Maps, by: str) -> bool:
    """See guests/start.py. `maps`: the ID ranges of all containers."""

    async def ready(definition: model.Container) -> _Start:
        return _Start(container, definition, maps, by)

    return await starting.start(container, ready)


class _Start(Start[Container, model.Container]):
    def __init__(self, container: Container, definition: model.Container, maps: Maps, by: str) -> None:
        super().__init__(container, definition, container.peers, by)
        self.settings = container.settings
        self.maps = maps
        self.links: list[config.Link] = []
        self.terminal = definition.terminal
        self.images: list[Image] = []
        self.mounted: volume.Mounted | None = None

    def check(self) -> None:
        prerequisites.check_host(self.definition, self.machine.source)
        if self.definition.directory is not None:
            self._check_root(self.definition.directory)

    def _check_root(self, root: str) -> None:
        """Check what the root file system holds and whom it belongs to, and take the IDs."""
        definition, source = self.definition, self.machine.source
        prerequisites.check_root(definition, root, source)
        exposure.check(root, source, self.settings.directory)
        ids, shifted = self.maps.reserve(self.machine, definition, root, source)
        self.stop = prerequisites.program("lxc-stop")
        self.host = config.HostFacts(
            path=self.machine.secret_path(),
            runtime=self.machine.runtime,
            root=root,
            ids=ids,
            shifted=shifted,
            tty="",
            halt=prerequisites.halt_signal(definition, root),
            seccomp=prerequisites.seccomp(),
            apparmor=prerequisites.apparmor(),
            start=prerequisites.program("lxc-execute" if definition.command else "lxc-start"),
            descriptors=prerequisites.descriptors(),
        )

    def holdings(self) -> Iterator[Holding]:
        from ...objects import conflicts
        from . import holdings  # no start of the daemon needs it

        return holdings.to_start(self.definition, self.machine.uuid, conflicts.bridges(self.peers))

    async def reach(self) -> None:
        """Mount its root and reserve its places in networks, before anything of the container exists."""
        definition, machine = self.definition, self.machine
        if definition.volume is not None:
            await self._mount(definition.volume)
        names = interface_names(machine.uuid, len(definition.networks))
        # Either all its interfaces are in networks, or the only one is the host's network.
        for index, (nic, network) in enumerate(zip(definition.nic, definition.networks, strict=False)):
            mac = (nic.mac or mac_of(machine.uuid, index)).lower()
            bridge = await machine.peers.networks.reserve(
                network, user=machine.key, interface=names[index], mac=mac, trusted=nic.trusted
            )
            self.links.append(config.Link(names[index], bridge.bridge, nic.name or f"eth{index}", mac))

    async def _mount(self, root: model.Root) -> None:
        machine = self.machine
        where = volume.place(f"{self.services.paths.run}/{DRIVER}", machine.name)
        units = await self.services.units()
        self.mounted = await volume.mount(root, where, machine.peers, units, machine.source, self.by)
        self._check_root(where)
        status = os.stat(self.mounted.path)
        self.images = [Image(self.mounted.path, status.st_dev, status.st_ino, writes=True)]

    async def run(self) -> None:
        """See Start. Before the record exists nothing remembers interfaces and mount, so they are undone here."""
        try:
            await super().run()
        except BaseException:
            for link in self.links:
                with contextlib.suppress(errors.VirtdError):
                    await asyncio.shield(self.machine.peers.networks.detach(link.host))
            if self.definition.volume is not None:
                await asyncio.shield(self._unmount())
            raise
        finally:
            self.maps.release(self.machine.name)  # if it runs, its record has them

    async def _unmount(self) -> None:
        run = f"{self.services.paths.run}/{DRIVER}"
        with contextlib.suppress(errors.VirtdError):  # the next daemon does it
            await volume.unmount(volume.place(run, self.machine.name), await self.services.units())
        volume.forget(run, self.machine.name)

    def data(self) -> dict[str, object]:
        from . import holdings

        ids = self.host.ids
        if self.mounted is not None:
            self.mounted.require_free()
        return {
            "interfaces": [link.host for link in self.links],
            "macs": [[link.mac, network] for link, network in zip(self.links, self.definition.networks, strict=True)],
            "halt": self.host.halt,
            "ids": [ids.first, ids.count] if ids is not None else None,
            "root": self.host.root,
            "images": [list(image) for image in self.images],
            "held": [identity for _path, identity in holdings.disks(self.definition)],
        }

    def prepare(self, ends_: Ends) -> None:
        """The container's own directory, with what LXC and systemd read there."""
        runtime, ids = self.machine.runtime, self.host.ids
        if self.terminal and ids is not None:
            # The container's root must be able to open it and to give it to whoever logs in.
            os.fchown(ends_.stdout, ids.first, ids.first + TTY_GROUP if ids.count > TTY_GROUP else ids.first)
        self.host = self.host._replace(tty=ends_.tty)
        content = {
            "config": config.text(self.definition, self.host, self.links),
            "start": config.start_script(self.definition, self.host, held=ends_.held),
            "stop": config.stop_script(self.definition, self.host, self.stop, self.settings.host_shutdown_timeout),
        }
        try:
            layout.ensure(self.services.paths)
            files.remove_tree(runtime)
            # LXC insists that the container's root can pass. Others are stopped by the directory above, which is
            # 0700.
            for path in (runtime, self.host.path, f"{self.host.path}/{self.machine.name}"):
                os.mkdir(path)
                os.chmod(path, 0o711)
            os.symlink("../../config", f"{self.host.path}/{self.machine.name}/config")
            for name, text in content.items():
                with open(f"{runtime}/{name}", "x", encoding="utf-8") as file:
                    file.write(text)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {runtime}: {exc.strerror}") from exc

    def spec(self) -> UnitSpec:
        container = self.machine
        return UnitSpec(
            name=container.unit,
            description=f"Container {container.name}",
            slice=f"virtd-{DRIVER}.slice",
            once=True,
            argv=("/bin/sh", f"{container.runtime}/start"),
            environment=ENVIRONMENT,
            after=(self.mounted.after,) if self.mounted is not None and self.mounted.after else (),
            properties=tuple(
                sandbox.properties(
                    self.definition,
                    self.host,
                    prerequisites.limits(self.definition, self.settings),
                    toplevel=prerequisites.toplevel(),
                    stop_after=self.settings.host_shutdown_timeout,
                )
            ),
        )

    async def come_up(self) -> None:
        """Wait until LXC says that the container's first program runs, or has ended."""
        container = self.machine
        started = asyncio.ensure_future(container.started.wait())
        ended = asyncio.ensure_future(self.child.ended())
        try:
            await asyncio.wait(
                (started, ended), timeout=self.settings.start_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done() or not self.child.alive():
                units = await self.services.units()
                unit = await units.ended(container.unit)
                await self.child.drain()
                container.stderr.forward()
                if not container.started.is_set():
                    how = "ended at once" if unit is None else f"exited with status {unit.exec_status}"
                    raise errors.StartFailed(f"Cannot start {container.name}: LXC {how}")
            elif not container.started.is_set():
                raise errors.StartFailed(
                    f"Cannot start {container.name}: LXC didn't start its first program "
                    f"within {span(self.settings.start_timeout)}"
                )
        finally:
            for task in (started, ended):
                task.cancel()
            await asyncio.gather(started, ended, return_exceptions=True)
        container.know_init()
        self._look_at_inotify()
        for network, link in zip(self.definition.networks, self.links, strict=True):
            await container.peers.networks.add_port(network, user=container.key, interface=link.host)

    def _look_at_inotify(self) -> None:
        """Without any instance left, systemd says "Failed to allocate manager object" on the console, and ends."""
        self.machine.problems.pop("inotify", None)
        if self.definition.command:
            return
        from .. import inotify  # no start of the daemon needs it

        if (left := inotify.left(inotify.SYSTEM)) < inotify.SYSTEM:
            text = (
                f"Container {self.machine.name} may lack inotify instances: root, whose containers' are its own, can "
                f"have {left or 'no'} more (fs.inotify.max_user_instances is {inotify.limit()})"
            )
            self.machine.problems["inotify"] = Problem(text, inotify.hint())
            log.warning("%s", text)

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        if self.host.shifted and "idmapped mount" in self.words:
            return errors.StartFailed(
                f"Cannot start {self.machine.name}: {self.host.root} belongs to root, and its file system can't show "
                "files shifted to other IDs (it has no idmapped mounts)",
                hint=do("create", "container", "NEW", image=self.host.root) + " makes a copy with its own IDs.",
            )
        return super().explained(exc)

    def own_words(self, words: str) -> str:
        """LXC's first errors; the later ones only say that it failed."""
        return "; ".join(ends.errors_in(words)[:2])

    def last_line(self, words: str) -> str:
        if self.host.shifted and "idmapped mount" in words:
            return "its file system has no idmapped mounts"
        return next(iter(ends.errors_in(words)), "")
