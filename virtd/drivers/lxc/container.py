# SPDX-License-Identifier: LGPL-2.1-or-later
"""One container: the process that is supervised is LXC's monitor, whose child is the container's first program."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING

from ... import errors, journal, process
from ...guests.guest import Guest, Shared
from ...model import container as model
from ...model.state import State
from ...objects.protocol import Problem
from . import config, ends, exposure, volume

if TYPE_CHECKING:
    from ...guests.verdict import End
    from ...model.settings import Lxc
    from ...objects.peers import Peers
    from ...records import Record
    from ...systemd.state import UnitState

log = logging.getLogger(__name__)

DRIVER = "lxc"
CGROUPS = "/sys/fs/cgroup"
ADDRESSES = 64  # that are told of one container
TABLE = 1 << 18  # bytes of the kernel's tables that are read for them
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
        self.started = asyncio.Event()  # LXC has said that the first program runs

    def parse(self, text: str, source: str) -> model.Container:
        return model.parse(text, source)

    def judge(self, unit: UnitState | None) -> End:
        definition = self.running_definition
        return ends.judge(
            unit,
            self.last_words(),
            self.init_pid,
            self.request,
            command=bool(definition is not None and definition.command),
            host_down=os.path.exists(f"{self.runtime}/host-shutdown"),
            seen=self.seen_at,
        )

    def adopted(self) -> None:
        self.stderr.forward()  # what LXC has said while nobody was here
        self.know_init()
        self.look_at_root()
        frozen = self.frozen()
        if frozen and self.state is State.RUNNING:
            self.note(State.PAUSED, "frozen")
        elif not frozen and self.state is State.PAUSED:
            self.note(State.RUNNING, "thawed")

    def look_at_root(self) -> None:
        """One that an earlier version has started runs on, though others may reach its files: that is a problem."""
        root = self.record.data.get("root") if self.record is not None else None
        self.problems.pop("root", None)
        if self.alive and root:
            try:
                exposure.check(root, self.source, self.settings.directory)
            except errors.InvalidDefinition as exc:
                text = f"Others can reach the files of container {self.name}: rootfs: {exc.expected}"
                hint = "It runs on, and won't be started so again."
                self.problems["root"] = Problem(text, exc.hint + " " + hint if exc.hint else hint)

    @property
    def privileged(self) -> bool:
        """Whether it runs without a user namespace; that is on record."""
        return self.record is not None and "ids" in self.record.data and self.record.data["ids"] is None

    # LXC's own directory for it

    def secret_path(self) -> str:
        """A new lxcpath. LXC's socket is an abstract one that is called by it, and such names anybody may take: so it
        is one that nobody can know beforehand.
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
        if record.data.get("images"):
            await volume.unmount(record.data["root"], await self.shared.services.units())
        interfaces = record.data.get("interfaces", [])
        if interfaces:
            networks = self.peers.networks
            for interface in interfaces:
                with contextlib.suppress(errors.VirtdError, OSError):
                    await networks.detach(interface)

    async def remove_runtime(self) -> None:
        await super().remove_runtime()
        volume.forget(f"{self.shared.services.paths.run}/{DRIVER}", self.name)

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

    # Its first program

    @property
    def init_pid(self) -> int:
        """Its PID on the host, whether or not it runs; 0 when it isn't known."""
        kept = self.record.data.get("init") if self.record is not None else None
        return int(kept["pid"]) if kept else 0

    def init(self) -> int | None:
        """The PID of the first program, if it runs."""
        kept = self.record.data.get("init") if self.record is not None else None
        return int(kept["pid"]) if kept and process.alive(int(kept["pid"]), int(kept["start"])) else None

    def know_init(self) -> None:
        """Find its first program, if LXC has told of it before it was known which process LXC is."""
        if self.init() is None:
            self._note_init(self._find_init())

    def _find_init(self) -> int:
        """The child of LXC's monitor that is the first of its PID namespace, proc(5); 0 when there is none."""
        main = self.child.pid if self.child is not None else 0
        try:
            with open(f"/proc/{main}/task/{main}/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
        except (OSError, ValueError):
            return 0
        return next((pid for pid in children if self._is_init(pid)), 0)

    def _is_init(self, pid: int) -> bool:
        """Nothing that is written into a log makes a process of the host a container's."""
        fields = status_of(pid)
        main = self.child.pid if self.child is not None else 0
        return fields.get("PPid") == str(main) and fields.get("NSpid", "").split()[-1:] == ["1"]

    def _note_init(self, pid: int) -> None:
        if self.record is None or not self.alive or not pid or not (start := process.start_time(pid)):
            return
        data = self.record.data | {"init": {"pid": pid, "start": start}}
        self.note(self.state, self.reason, data=data)

    def sort_line(self, text: str) -> str | None:
        """LXC's log is read as a diary; the journal gets its warnings and errors."""
        said = ends.read(text)
        if (pid := ends.started(said.words)) is not None and self.alive:
            again = self.init_pid not in (0, pid)
            if self._is_init(pid):
                self._note_init(pid)
            if again and (self.request is None or self.request.verb != "reboot"):
                journal.send(f"Container {self.name} rebooted itself", **self.fields())
                if self.state in (State.RUNNING, State.STOPPING) and self.request is not None:
                    # Whatever it was asked, this is a new life.
                    self.note(State.RUNNING, "rebooted", data=self.ask("", ""))
            self.started.set()
        return said.level

    def signal_init(self, name: str) -> None:
        """Send it a signal by its name. Raises InvalidState when it doesn't run."""
        number = number_of(name)
        kept = self.record.data.get("init") if self.record is not None else None
        pidfd = process.open_pidfd(int(kept["pid"]), int(kept["start"])) if kept else None
        if pidfd is None:
            raise errors.InvalidState(f"{self.name} has no first program that could be sent a signal")
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass
        except OSError as exc:
            raise errors.HostError(f"Cannot send {name} to {self.name}: {exc.strerror}") from exc
        finally:
            os.close(pidfd)

    # Its control group

    def cgroup(self) -> str | None:
        """The directory of the container's own control group; None when LXC's monitor has ended."""
        main = self.child.pid if self.child is not None else 0
        try:
            with open(f"/proc/{main}/cgroup", encoding="utf-8") as file:
                own = next((line.rstrip("\n")[3:] for line in file if line.startswith("0::")), "")
        except OSError:
            return None
        return payload_of(own, self.unit)

    def frozen(self) -> bool:
        group = self.cgroup()
        try:
            with open(f"{group}/cgroup.events", encoding="ascii") as file:
                return "frozen 1" in file.read()
        except OSError:
            return False

    async def freeze(self, *, on: bool) -> None:
        """Stop all its processes, or let them go on, and wait until they have. Raises HostError or TimedOut."""
        group = self.cgroup()
        try:
            with open(f"{group}/cgroup.freeze", "w", encoding="ascii") as file:
                file.write("1" if on else "0")
        except OSError as exc:
            raise errors.HostError(f"Cannot {'freeze' if on else 'thaw'} {self.name}: {exc.strerror}") from exc
        for _ in range(500):
            if self.frozen() is on:
                return
            await asyncio.sleep(0.01)
        raise errors.TimedOut(f"{self.name} could not be frozen within 5 s")

    def used(self) -> dict[str, int]:
        """What it uses at this moment, as far as the kernel counts it: memory in bytes, pids."""
        found = {}
        group = self.cgroup()
        for key, file in (("memory", "memory.current"), ("pids", "pids.current")):
            with contextlib.suppress(OSError, ValueError), open(f"{group}/{file}", encoding="ascii") as content:
                found[key] = int(content.read())
        return found

    # Its network

    def addresses(self) -> list[str]:
        """Its IP addresses, as the kernel has them in its network namespace; none of the loopback's."""
        pid = self.init()
        definition = self.running_definition
        if pid is None or definition is None or any(nic.mode == "host" for nic in definition.nic):
            return []
        return addresses(f"/proc/{pid}/net")


def payload_of(monitor: str, unit: str) -> str | None:
    """The directory of a container's own control group, which is beside that of LXC's monitor, in the unit's.

    LXC 6 makes both anew at each reboot, each time one deeper: in lxc.pivot, in lxc.pivot/lxc.pivot.
    """
    above = monitor.removesuffix(f"/{config.MONITOR}")
    return f"{CGROUPS}{above}/{config.PAYLOAD}" if unit in above.split("/") and above != monitor else None


def number_of(name: str) -> int:
    """A signal's number: SIGTERM, SIGRTMIN+3. Raises InvalidState."""
    word, _, more = name.partition("+")
    try:
        return int(signal.Signals[word]) + int(more or 0)
    except (KeyError, ValueError):
        raise errors.InvalidState(f"There is no signal {name}") from None


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; none when it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def addresses(directory: str) -> list[str]:
    """The addresses in /proc/PID/net, which shows a process's own network namespace; not more than a person reads.

    Names of interfaces are bytes that the container chooses, and numbers of addresses as well.
    """
    import ipaddress  # 2 ms, for those who ask only

    found: dict[str, None] = {}
    before = b""
    for words in _rows(f"{directory}/fib_trie"):
        if words[:1] == [b"|--"]:
            before = words[-1]
        elif words == [b"/32", b"host", b"LOCAL"] and not before.startswith(b"127."):
            found[before.decode("ascii", "replace")] = None
    for words in _rows(f"{directory}/if_inet6"):
        with contextlib.suppress(ValueError):
            if words[5:] != [b"lo"]:
                found[str(ipaddress.IPv6Address(int(words[0], 16)))] = None
    return list(found)[:ADDRESSES]


def _rows(path: str) -> list[list[bytes]]:
    """The words of each line."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return [line.split() for line in file.read(TABLE).splitlines() if line.strip()]
    return []


def interface_names(uuid: str, count: int) -> list[str]:
    """The host's ends of a container's interfaces: names that a crash in the middle leads back to it."""
    return [f"vl{uuid.replace('-', '')[:9]}.{index}" for index in range(count)]


def mac_of(uuid: str, index: int) -> str:
    """A MAC that stays the same, as a DHCP server's leases want it: 52:54:00 is for virtual machines."""
    import hashlib

    digest = hashlib.sha256(f"{uuid}/{index}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])
