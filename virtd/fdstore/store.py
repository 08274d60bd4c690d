# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store: named slots that hold descriptors over the end of the process."""

from __future__ import annotations

import fcntl
import os
import resource
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Self

from virtd.fdstore import names as slot_names
from virtd.fdstore import notify as messages
from virtd.fdstore.budget import HINTS, Budget, exceeded, files_limit, measure
from virtd.fdstore.errors import BadName, MissingSlot, StoreFull

# Descriptors that the daemon opens for itself, beside the stored ones: sockets, clients, epoll, files in passing.
HEADROOM = 128
_OURS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "FDSTORE", "NOTIFY_SOCKET")


@dataclass(frozen=True, slots=True)
class Slot:
    """One named descriptor. `dev` and `ino` are fstat's; `fd` is -1 after `take()`."""

    name: str
    fd: int
    dev: int
    ino: int

    @classmethod
    def of(cls, name: str, fd: int) -> Self:
        status = os.fstat(fd)
        return cls(name, fd, status.st_dev, status.st_ino)


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One descriptor as PID 1 has it."""

    name: str
    dev: int
    ino: int

    @classmethod
    def from_dump(cls, entry: tuple[Any, ...]) -> Self:
        """From one element of what DumpUnitFileDescriptorStore() answers: (name, mode, major, minor, inode, ...)."""
        name, _mode, major, minor, inode = entry[:5]
        return cls(name, os.makedev(major, minor), inode)


@dataclass(frozen=True, slots=True)
class Difference:
    """What the store thinks against what PID 1 has. False if they agree."""

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.mismatched)


class Store:
    """Named slots, kept by the service manager while no process of ours is there.

    Changing methods may be called from any thread and are let through one at a time; reading ones never wait. A
    changing method returns when its message is in PID 1's queue, which normally takes microseconds, but up to
    `notify.PATIENCE` seconds while PID 1 is reloading.
    """

    def __init__(
        self,
        inherited: Mapping[int, str],
        transport: messages.Transport | None,
        *,
        store_max: int | None = None,
        headroom: int = HEADROOM,
    ) -> None:
        self._send = transport
        self._store_max = store_max
        # As it is now: the daemon may raise its own soft limit later, and the next start begins with this one again.
        self._files_max = files_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0], headroom)
        self._changing = threading.RLock()
        self._slots: dict[str, Slot] = {}
        self._doubles: dict[str, list[Slot]] = {}
        self._sockets: dict[str, list[int]] = {}
        for fd, name in sorted(inherited.items()):
            if not slot_names.is_slot(name):
                self._sockets.setdefault(name, []).append(fd)
                continue
            slot = Slot.of(name, fd)
            if name in self._slots:
                self._doubles.setdefault(name, []).append(slot)
            else:
                self._slots[name] = slot

    @classmethod
    def from_environment(
        cls,
        environ: MutableMapping[str, str] = os.environ,
        *,
        inherited: Mapping[int, str] | None = None,
        notify: messages.Transport | None = None,
        fallback_max: int | None = None,
        headroom: int = HEADROOM,
    ) -> Self:
        """Take over what the service manager passed to this process; call it once, early, before anything is spawned.

        The variables that say so are removed from `environ`, NOTIFY_SOCKET with them, so that no child can mistake
        them for its own. `fallback_max` is FileDescriptorStoreMax= for systemd older than 254, which doesn't tell.
        `inherited` (names by number) and `notify` stand in for systemd in tests.
        """
        if inherited is None:
            inherited = _listen_fds() if "LISTEN_FDS" in environ else {}
        told = environ.get("FDSTORE", "")
        store_max = int(told) if told.isdecimal() else fallback_max
        path = environ.get("NOTIFY_SOCKET")
        if notify is None and path:
            notify = messages.connect(path)
        for key in _OURS:
            environ.pop(key, None)
        return cls(inherited, notify, store_max=store_max, headroom=headroom)

    @property
    def persistent(self) -> bool:
        """Whether there is a service manager that keeps the slots; without one the store works, in memory."""
        return self._send is not None

    # Reading.

    def get(self, name: str) -> int:
        """The slot's descriptor, which stays the store's: don't close it. MissingSlot if there is none."""
        slot = self._slots.get(name)
        if slot is None or slot.fd < 0:
            raise MissingSlot(f"no slot {name}" if slot is None else f"the descriptor of slot {name} was taken out")
        return slot.fd

    def names(self) -> list[str]:
        return sorted(self._slots)

    def slots(self) -> dict[str, Slot]:
        return dict(self._slots)

    def sockets(self) -> dict[str, list[int]]:
        """What came from socket units, by FileDescriptorName= (the socket unit's name if that isn't set)."""
        return {name: list(fds) for name, fds in self._sockets.items()}

    def duplicates(self) -> dict[str, list[Slot]]:
        """All candidates of every name that came back more than once, the one that `get()` answers first.

        It takes an older or another program to make one: `put()` never leaves two. Which is right can't be told from
        here (their order means nothing); `resolve()` decides.
        """
        return {name: self._candidates(name) for name in list(self._doubles)}

    def budget(self) -> Budget:
        return self._budget(self._stored())

    def room_for(self, names: Iterable[str]) -> None:
        """Return if all `names` could be put; else raise StoreFull (or BadName), which says what to raise in the unit."""
        added = [slot_names.check(name) for name in names]
        new = [name for name in added if name not in self._slots]
        over = exceeded(self._budget(self._stored() + new))
        if over is not None:
            now = self.budget()
            raise StoreFull(
                f"no room for {len(new)} more descriptors in the FD store: {now.used} are in use, "
                f"and {over} allows {now.max}",
                limited_by=over,
                hint=HINTS[over],
            )

    def verify(self, dump: Iterable[StoredEntry | tuple[str, int, int]]) -> Difference:
        """Compare with what PID 1 holds: entries as StoredEntry or (name, dev, ino).

        By name and by what the descriptors are, since a sent message is no proof that a descriptor was kept.
        """
        held: dict[str, list[tuple[int, int]]] = {}
        for entry in dump:
            name, dev, ino = (entry.name, entry.dev, entry.ino) if isinstance(entry, StoredEntry) else entry
            held.setdefault(name, []).append((dev, ino))
        ours = dict(self._slots)
        return Difference(
            missing=tuple(sorted(ours.keys() - held.keys())),
            unknown=tuple(sorted(held.keys() - ours.keys())),
            mismatched=tuple(
                sorted(name for name in ours.keys() & held.keys() if held[name] != [(ours[name].dev, ours[name].ino)])
            ),
        )

    # Changing.

    def put(self, name: str, fd: int) -> Slot:
        """Store a duplicate of `fd` under `name`; the caller keeps, and may close, its own.

        A slot that was there under that name is replaced. Raises BadName, StoreFull or NotifyFailed with nothing
        changed.
        """
        slot_names.check(name)
        with self._changing:
            self.room_for([name])
            slot = Slot.of(name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            try:
                if name in self._slots:
                    self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                # FDPOLL=0: else PID 1 drops a pipe when its writer dies, and with it what nobody has read yet.
                self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", slot.fd)
            except BaseException:
                os.close(slot.fd)
                raise
            self._forget(name)
            self._slots[name] = slot
            return slot

    def take(self, name: str) -> int:
        """The slot's descriptor, which becomes the caller's to close. PID 1 keeps its own until `drop(name)`."""
        with self._changing:
            fd = self.get(name)
            self._slots[name] = replace(self._slots[name], fd=-1)
            return fd

    def drop(self, name: str) -> None:
        """Forget the slot, here and in PID 1. A name that isn't there is dropped already."""
        with self._changing:
            if name in self._slots:
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                self._forget(name)

    def drop_prefix(self, prefix: str) -> list[str]:
        """Drop all slots at or below `prefix`, which ends at a "/" (given or not); returns their names."""
        with self._changing:
            dropped = slot_names.below(self.names(), prefix)
            for name in dropped:
                self.drop(name)
            return dropped

    def resolve(self, name: str, dev: int, ino: int) -> Slot:
        """Settle a duplicated name: keep the candidate that is `dev:ino`, drop the others. MissingSlot if none is."""
        with self._changing:
            for slot in self._candidates(name):
                if (slot.dev, slot.ino) == (dev, ino):
                    return self.put(name, slot.fd) if name in self._doubles else slot
            raise MissingSlot(f"no descriptor in slot {name} is {dev}:{ino}")

    def notify(self, text: str) -> None:
        """Send sd_notify(3) fields, one a line: `READY=1`, `STATUS=...`, `STOPPING=1`, `WATCHDOG=1`."""
        if "FDSTORE" in text:
            raise BadName("slots are changed with put() and drop()")
        self._tell(text)

    def reloading(self) -> None:
        """Tell that a reload (SIGHUP of Type=notify-reload) has begun; `notify("READY=1")` ends it."""
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def barrier(self, timeout: float = 5.0) -> bool:
        """Whether PID 1 has read everything sent so far, waiting up to `timeout` seconds. No proof that it was kept."""
        return self._send is None or messages.barrier(self._send, timeout)

    def close(self) -> None:
        """Close this process's descriptors, sockets included; PID 1 keeps the stored ones."""
        with self._changing:
            for fds in self._sockets.values():
                for fd in fds:
                    os.close(fd)
            self._sockets.clear()
            for name in list(self._slots):
                self._forget(name)

    def _budget(self, names: list[str]) -> Budget:
        sockets = [name for name, fds in self._sockets.items() for _ in fds]
        return measure(names, sockets, self._store_max, self._files_max)

    def _tell(self, text: str, *fds: int) -> None:
        if self._send is not None:
            self._send(text, fds)

    def _forget(self, name: str) -> None:
        """Close what we have under that name and drop the entry."""
        for slot in self._candidates(name):
            if slot.fd >= 0:
                os.close(slot.fd)
        self._doubles.pop(name, None)
        self._slots.pop(name, None)

    def _candidates(self, name: str) -> list[Slot]:
        """Every descriptor that we have under that name: one as a rule."""
        return [*([self._slots[name]] if name in self._slots else []), *self._doubles.get(name, [])]

    def _stored(self) -> list[str]:
        """The name of each entry that PID 1 has, duplicates as often as they are there."""
        return [*self._slots, *(name for name, doubles in self._doubles.items() for _ in doubles)]


def _listen_fds() -> dict[int, str]:
    """The passed descriptors by number, close-on-exec set; none if they are meant for another process.

    libsystemd checks LISTEN_PID, and LISTEN_PIDFDID from version 259 on.
    """
    from systemd.daemon import listen_fds_with_names

    passed: dict[int, str] = listen_fds_with_names(unset_environment=False)
    return passed
