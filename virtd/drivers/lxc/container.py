# SPDX-License-Identifier: LGPL-2.1-or-later
"""One container: the process that is supervised is LXC's monitor, whose child is the container's first program."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from ... import errors, journal, process
from ...guests.guest import Guest
from ...model import container as model
from ...model.state import State
from ...objects.protocol import Problem
from . import cgroup, ends, exposure, first, links, volume
from .kept import Kept

if TYPE_CHECKING:
    from ...guests.guestrecord import Shared
    from ...guests.verdict import End
    from ...model.settings import Lxc
    from ...objects.peers import Peers
    from ...records import Record
    from ...systemd.state import UnitState

log = logging.getLogger(__name__)

DRIVER = "lxc"
SECRET = "lxc-"  # the beginning of the name of what secret_path() makes


class Container(Guest[model.Container]):
    """A container."""

    driver = DRIVER
    noun = "container"
    definition_type = model.Container

    def __init__(self, shared: Shared, name: str, settings: Lxc, peers: Peers) -> None:
        super().__init__(shared, name)
        self.settings = settings
        self.peers = peers
        self.started = asyncio.Event()  # LXC has reported that the first program runs

    @property
    def kept(self) -> Kept:
        """What its record says."""
        return Kept.of(self.record)

    @property
    def monitor(self) -> int:
        """The PID of LXC's monitor; 0 if there is none."""
        return self.child.pid if self.child is not None else 0

    def parse(self, text: str, source: str) -> model.Container:
        return model.parse(text, source)

    def judge(self, unit: UnitState | None) -> End:
        definition = self.running_definition
        known = ends.evidence(
            unit,
            self.last_words(),
            self.init_pid,
            self.request,
            command=bool(definition is not None and definition.command),
            host_down=os.path.exists(f"{self.runtime}/host-shutdown"),
            seen=self.seen_at,
        )
        return ends.judge(known)

    def adopted(self) -> None:
        self.stderr.forward()  # what LXC wrote while no daemon was there
        self.know_init()
        self.look_at_root()
        frozen = self.frozen()
        if frozen and self.state is State.RUNNING:
            self.note(State.PAUSED, "frozen")
        elif not frozen and self.state is State.PAUSED:
            self.note(State.RUNNING, "thawed")

    def look_at_root(self) -> None:
        """An earlier version may have started it although others can reach its files: it runs on, with a problem."""
        root = self.kept.root
        self.problems.pop("root", None)
        if self.alive and root:
            try:
                exposure.check(root, self.source, self.settings.directory)
            except errors.InvalidDefinition as exc:
                text = f"Others can reach the files of container {self.name}: rootfs: {exc.expected}"
                hint = "It runs on, and won't be started so again."
                self.problems["root"] = Problem(text, exc.hint + " " + hint if exc.hint else hint)

    def meaning(self, slot: str) -> str:
        match slot:
            case "stdin":
                return "its console takes no input any more, and what it writes there stays unread"
            case "stdout":
                return "its console's output is lost from now on"
            case "stderr":
                return "LXC's messages are lost from now on"
            case _:
                return "the log was opened again by its name"

    # Its share of the host

    def secret_path(self) -> str:
        """A new lxcpath. The name of LXC's abstract socket contains it, and anybody may take such a name: so nobody
        must be able to guess it.
        """
        return f"{self.runtime}/{SECRET}{os.urandom(16).hex()}"

    def lxc_path(self) -> str:
        """The lxcpath that it was started with."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.runtime):
                if name.startswith(SECRET):
                    return f"{self.runtime}/{name}"
        return f"{self.shared.services.paths.run}/{DRIVER}"  # of an earlier version

    async def give_back(self, record: Record) -> None:
        """The host's ends of its interfaces go with its network namespace, which can take a moment."""
        self.started.clear()
        kept = Kept.of(record)
        if kept.images:
            await volume.unmount(kept.root, await self.shared.services.units())
        for interface in kept.interfaces:
            with contextlib.suppress(errors.VirtdError, OSError):
                await self.peers.networks.detach(interface)

    async def remove_runtime(self) -> None:
        await super().remove_runtime()
        volume.forget(f"{self.shared.services.paths.run}/{DRIVER}", self.name)

    # Its first program

    @property
    def init_pid(self) -> int:
        """Its PID on the host, whether or not it runs; 0 if it isn't known."""
        init = self.kept.init
        return init.pid if init is not None else 0

    def init(self) -> int | None:
        """The PID of the first program, if it runs."""
        init = self.kept.init
        return init.pid if init is not None and process.alive(init.pid, init.start) else None

    def know_init(self) -> None:
        """Find its first program, in case LXC reported it before it was known which process LXC is."""
        if self.init() is None:
            self._note_init(first.find(self.monitor))

    def _note_init(self, pid: int) -> None:
        if self.record is None or not self.alive or not pid or not (start := process.start_time(pid)):
            return
        data = self.record.data | {"init": {"pid": pid, "start": start}}
        self.note(self.state, self.reason, data=data)

    def sort_line(self, text: str) -> str | None:
        """LXC's log shows what happens to the container; the journal gets its warnings and errors."""
        said = ends.read(text)
        if (pid := ends.started(said.words)) is not None and self.alive:
            again = self.init_pid not in (0, pid)
            if first.is_first(pid, self.monitor):
                self._note_init(pid)
            if again and (self.request is None or self.request.verb != "reboot"):
                journal.send(f"Container {self.name} rebooted itself", **self.fields())
                if self.state in (State.RUNNING, State.STOPPING) and self.request is not None:
                    # Earlier requests concern the life before this one.
                    self.note(State.RUNNING, "rebooted", data=self.ask("", ""))
            self.started.set()
        return said.level

    def signal_init(self, name: str) -> None:
        """Send it a signal by its name. Raises InvalidState if it doesn't run."""
        first.send(self.kept.init, name, self.name)

    # Its control group

    def frozen(self) -> bool:
        group = cgroup.of(self.monitor, self.unit)
        return group is not None and group.frozen()

    async def freeze(self, *, on: bool) -> None:
        """Freeze or thaw all its processes, and wait until that is done. Raises HostError or TimedOut."""
        group = cgroup.of(self.monitor, self.unit)
        if group is None:
            raise errors.HostError(f"Cannot {'freeze' if on else 'thaw'} {self.name}: it has ended")
        await group.freeze(self.name, on=on)

    def used(self) -> dict[str, int]:
        """Its present usage, as far as the kernel accounts for it: memory in bytes, pids."""
        group = cgroup.of(self.monitor, self.unit)
        return group.used() if group is not None else {}

    # Its network

    def addresses(self) -> list[str]:
        """Its IP addresses, as the kernel has them in its network namespace, without the loopback's."""
        pid = self.init()
        definition = self.running_definition
        if pid is None or definition is None or definition.shares_network:
            return []
        return links.addresses(f"/proc/{pid}/net")
