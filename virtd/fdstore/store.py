# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store: named slots that keep descriptors beyond the end of the process."""

from __future__ import annotations

import os
import resource
import threading
import time
from typing import TYPE_CHECKING, Self

from virtd.fdstore import boxes
from virtd.fdstore import names as slot_names
from virtd.fdstore import notify as messages
from virtd.fdstore.boxes import Boxes
from virtd.fdstore.budget import Budget, files_limit
from virtd.fdstore.compare import Difference, compare, unboxed
from virtd.fdstore.errors import MissingSlot
from virtd.fdstore.held import Held, Slot
from virtd.fdstore.room import Room

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, MutableMapping

# Descriptors that the daemon opens for itself, beside the stored ones: sockets, clients, epoll, files in passing.
HEADROOM = 128
# The number of slots that are entries of their own in PID 1's store, visible to everybody; others are put into boxes.
DIRECT = 128
_OURS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "FDSTORE", "NOTIFY_SOCKET")


class Store:
    """Named slots, kept by the service manager while no process of ours is there.

    Changing methods may be called from any thread and are serialized; reading ones never wait. A changing method
    returns when its message is in PID 1's queue, where it outlives this process. That takes microseconds, but up to
    `notify.PATIENCE` seconds while PID 1 is busy with a daemon-reload.
    """

    def __init__(
        self,
        inherited: Mapping[int, str],
        transport: messages.Transport | None,
        *,
        store_max: int | None = None,
        headroom: int = HEADROOM,
        direct: int | None = DIRECT,
    ) -> None:
        self._send = transport
        self._changing = threading.RLock()
        self._held = Held()
        self._boxes = Boxes(self._tell)
        self._sockets: dict[str, list[int]] = {}
        # Dropped slots that are still in PID 1.
        self._unwanted: set[str] = set()
        # The present limit: the daemon may raise its own soft limit later, but the next start begins with this one
        # again.
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._room = Room(
            self._held,
            self._boxes,
            self._sockets,
            store_max=store_max,
            files_max=files_limit(soft, headroom),
            direct=None if transport is None else direct,
        )
        generations: dict[int, dict[int, int]] = {}
        for fd, name in sorted(inherited.items()):
            if not slot_names.is_slot(name):
                self._sockets.setdefault(name, []).append(fd)
            elif (key := boxes.parse(name)) is not None and key[1] not in generations.get(key[0], {}):
                generations.setdefault(key[0], {})[key[1]] = fd
            else:
                self._held.found(Slot.of(name, fd))
                self._held.alone[name] = self._held.alone.get(name, 0) + 1
        for number, fds in generations.items():
            if (content := self._boxes.open(number, fds)) is None:
                # It is left as it is, in ordinary slots.
                content = {boxes.name_of(number, generation): fd for generation, fd in fds.items()}
                self._held.alone |= dict.fromkeys(content, 1)
            for name, fd in content.items():
                self._held.found(Slot.of(name, fd))

    @classmethod
    def from_environment(
        cls,
        environ: MutableMapping[str, str] = os.environ,
        *,
        fallback_max: int = 0,
        headroom: int = HEADROOM,
        direct: int | None = DIRECT,
        inherited: Mapping[int, str] | None = None,
        notify: messages.Transport | None = None,
        reserve: bool = False,
    ) -> Self:
        """Take over what the service manager passed to this process; call it once, early, before anything is spawned.

        The variables for this are removed from `environ`, including NOTIFY_SOCKET, so that no child takes them for
        its own. `fallback_max` is the unit's FileDescriptorStoreMax=, for systemd before 254, which doesn't pass it:
        if neither it nor $FDSTORE says that there is a store, `put()` refuses rather than lose descriptors.
        `headroom` is how many descriptors the daemon opens besides its slots. `direct` is how many slots are entries
        of their own in PID 1 before boxes (boxes.py) are used; None: all of them. `inherited` (names by number) and
        `notify` stand in for systemd in tests. With `reserve` one descriptor is kept for messages, so that a daemon
        that has run out of them is not killed by its watchdog.
        """
        if inherited is None:
            inherited = _listen_fds() if "LISTEN_FDS" in environ else {}
        told = environ.get("FDSTORE", "")
        path = environ.get("NOTIFY_SOCKET")
        if notify is None and path:
            notify = messages.connect(path, reserve=reserve)
        for key in _OURS:
            environ.pop(key, None)
        store_max = None if notify is None else int(told) if told.isdecimal() else fallback_max
        return cls(inherited, notify, store_max=store_max, headroom=headroom, direct=direct)

    @property
    def persistent(self) -> bool:
        """Whether a service manager keeps the slots; without one the store works, but only in memory."""
        return self._send is not None

    # Reading.

    def get(self, name: str) -> int:
        """The slot's descriptor. It stays the store's: don't close it, and don't keep it past a `put()` or `drop()`.

        MissingSlot if there is no such slot, or its descriptor was removed by `take()`.
        """
        return self._held.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._held.slots

    def names(self) -> list[str]:
        return sorted(self._held.slots)

    def slots(self) -> dict[str, Slot]:
        return dict(self._held.slots)

    def sockets(self) -> dict[str, list[int]]:
        """Sockets from socket units, by FileDescriptorName= (the socket unit's name if that isn't set).

        Unlike slots they have no slash in the name; descriptors that another program stored without one are here too.
        """
        return {name: list(fds) for name, fds in self._sockets.items()}

    def duplicates(self) -> dict[str, list[Slot]]:
        """All candidates for every name that was returned more than once; `get()` answers the first, an arbitrary
        one.

        Only another program (or `systemd-notify --fd`) can cause this: `put()` never leaves two. `resolve()` chooses
        by the daemon's own records.
        """
        return {name: found for name in self._held.doubles if len(found := self._held.candidates(name)) > 1}

    def kept_as(self, name: str) -> str:
        """The name of the entry in PID 1's store that holds the slot: its own, or a box's. Raises MissingSlot."""
        if name not in self._held.slots:
            raise MissingSlot(f"there is no slot {name}")
        found = self._boxes.of(name)
        return name if name in self._held.alone or not found else found[0].name

    def budget(self) -> Budget:
        """How much of the store is used, and what limits it."""
        return self._room.budget()

    def room_for(self, names: Iterable[str]) -> None:
        """Return if all `names` could be put together; otherwise raise StoreFull, which says what to change in the
        unit.

        Also BadName, for a name that can't be put at all.
        """
        self._room.place(names)

    def held(self, dump: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
        """What PID 1 holds, by slot: (dev, ino) of each descriptor, from a `dump` as for `verify`.

        Our boxes are expanded into slots; foreign ones are listed as they are.
        """
        return unboxed(dump, self._boxes, self.slots())

    def verify(self, dump: Iterable[tuple[str, int, int]]) -> Difference:
        """Compare with what PID 1 holds, given as StoredEntry or plain (name, dev, ino).

        By name and by the descriptors' identity: only this shows that PID 1 has kept what it was sent. Request the
        dump after `barrier()`, otherwise the latest messages aren't in it.
        """
        return compare(self.held(dump), self.slots())

    # Changing.

    def put(self, name: str, fd: int) -> Slot:
        """Store a duplicate of `fd` under `name`; the caller keeps its own, and may close it.

        A slot of that name is replaced, and its old descriptor closed. If it isn't in a box, a SIGKILL in the
        microseconds between its removal and the arrival of the new one leaves neither, since PID 1 can only drop
        *all* descriptors of a name: replace only what can be opened again (a log file), and put anything else (a
        pipe, a connection) under another name before the old one is dropped. Putting what the slot holds already
        sends it again, and removes nothing.

        Raises BadName, StoreFull, AlreadyStored or NotifyFailed. With the last, PID 1 may no longer hold a slot that
        was to be replaced, while `get()` still answers the old descriptor.
        """
        return self.put_all({name: fd})[name]

    def put_all(self, descriptors: Mapping[str, int]) -> dict[str, Slot]:
        """`put` for several slots that belong together, with few messages; of those that share a box, all or none are
        stored.

        NotifyFailed may leave some of the others in the store.
        """
        with self._changing:
            placed = self._room.place(descriptors)
            self._unwanted -= descriptors.keys()
            self.tidy()
            new: dict[str, Slot] = {}
            try:
                again = self._held.duplicate(descriptors, new)
                for name in [name for name in new if name in self._held.alone or placed.get(name) == 0]:
                    if name in self._held.slots and (name not in again or name in self._held.doubles):
                        self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                    # FDPOLL=0: otherwise PID 1 drops a pipe when its writer dies, and with it whatever nobody has
                    # read yet.
                    self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", new[name].fd)
                    for box in self._boxes.of(name):
                        self._repack(box.id, without={name})
                    self._held.forget(name)
                    self._held.keep(new[name])
                    self._held.alone[name] = 1
                self._put_boxed(new, placed)
            except BaseException:
                for slot in new.values():
                    if self._held.slots.get(slot.name) is not slot:
                        os.close(slot.fd)
                raise
            return new

    def _put_boxed(self, new: dict[str, Slot], placed: dict[str, int]) -> None:
        """Store those of `new` that aren't entries of their own, with a message or two for each box."""
        changes: dict[int, dict[str, Slot]] = {}
        for name, slot in new.items():
            if name in self._held.alone:
                continue
            home, *more = [box.id for box in self._boxes.of(name)] or [placed[name]]
            for number in more:
                self._repack(number, without={name})
            changes.setdefault(home, {})[name] = slot
        for number, slots in changes.items():
            self._repack(number, add={name: slot.fd for name, slot in slots.items()})
            for name, slot in slots.items():
                self._held.forget(name)
                self._held.keep(slot)

    def _repack(self, number: int, *, without: Collection[str] = (), add: Mapping[str, int] | None = None) -> None:
        # A descriptor that was taken isn't ours any more, and only the box itself can tell which of two duplicates it
        # holds.
        self._boxes.change(number, self._held.known(), without=without, add=add, crowded=self._room.crowded())

    def take(self, name: str) -> int:
        """The slot's descriptor, which the caller now owns and closes. PID 1 keeps its own until `drop(name)`."""
        with self._changing:
            fd = self.get(name)
            self._held.slots[name] = self._held.slots[name]._replace(fd=-1)
            return fd

    def drop(self, name: str) -> None:
        """Forget the slot, here and in PID 1, and close its descriptor. No error if there is no such slot.

        After NotifyFailed, PID 1 still has it, and drops it with the next change or `tidy`, unless it is put anew
        before.
        """
        self._drop([name])

    def expel(self, name: str) -> None:
        """Drop the slot even if only PID 1 knows of it (see `verify`)."""
        with self._changing:
            if name not in self._held.alone:
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self._drop([name])

    def _drop(self, names: Iterable[str]) -> None:
        with self._changing:
            self._unwanted |= {name for name in names if name in self._held.slots}
            self.tidy()

    def renew(self, name: str) -> None:
        """Send the slot's descriptor to PID 1 again, as the only one of its name; here nothing changes.

        For when PID 1 has lost it, or has something else under that name. Raises MissingSlot or NotifyFailed.
        """
        with self._changing:
            fd = self.get(name)
            self.tidy()
            if name in self._held.alone:
                # First as an additional one of that name: if we are killed before the rest is done, the next start
                # can choose.
                self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)
            else:
                for box in self._boxes.of(name):
                    self._repack(box.id)

    def drop_prefix(self, prefix: str) -> list[str]:
        """Drop `prefix` itself and everything below it, part by part: qemu/web1 spares qemu/web10. Returns their
        names."""
        with self._changing:
            dropped = sorted(slot_names.below(self._held.slots, prefix))
            self._drop(dropped)
            return dropped

    def untidy(self) -> bool:
        """Whether PID 1 still has dropped slots, because it accepted no message at that time."""
        return bool(self._unwanted)

    def tidy(self) -> None:
        """Remove from PID 1 whatever a crash between two messages, or a failed drop, has left there.

        Every change does it. Raises NotifyFailed.
        """
        with self._changing:
            self._boxes.tidy()
            going = self._unwanted & self._held.slots.keys()
            for name in sorted(going & self._held.alone.keys()):
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                if not self._boxes.of(name):
                    self._held.forget(name)
            for box in self._boxes.all():
                if not going.isdisjoint(box.since):
                    self._repack(box.id, without=going)
            for name in going & self._held.slots.keys():
                self._held.forget(name)
            self._unwanted.clear()

    def resolve(self, name: str, dev: int, ino: int) -> Slot:
        """For a name that was returned more than once, keep the candidate with `dev:ino` and drop the others.

        Raises MissingSlot, with nothing changed, if none matches. For a name with one descriptor it only checks.
        """
        with self._changing:
            for slot in self._held.candidates(name):
                if slot[2:] == (dev, ino):
                    return self.put(name, slot.fd) if name in self._held.doubles else slot
            raise MissingSlot(f"no descriptor in slot {name} is the one sought ({dev}:{ino})")

    def resize(self, store_max: int, files: int | None = None, headroom: int = HEADROOM) -> None:
        """FileDescriptorStoreMax= is now `store_max`, and LimitNOFILE= `files` (None: no limit).

        A daemon-reload may change them under a running daemon.
        """
        if self._send is not None:
            self._room.store_max = store_max
            self._room.files_max = files_limit(-1 if files is None else files, headroom)

    def send_again(self) -> None:
        """Send every slot to PID 1 once more. It keeps those that it has, and stores those that it has dropped, if
        they fit.

        For use after a daemon-reload, which drops what exceeds FileDescriptorStoreMax=. Slots removed by `take()` are
        left to their owner. Raises NotifyFailed.
        """
        with self._changing:
            for slot in self._held.slots.values():
                if slot.fd >= 0 and slot.name in self._held.alone and slot.name not in self._held.doubles:
                    self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={slot.name}", slot.fd)
            self._boxes.send_again()

    def notify(self, text: str) -> None:
        """Send fields of sd_notify(3), one a line: READY=1, STATUS=..., STOPPING=1, WATCHDOG=1, ...

        Does nothing without a service manager. Raises NotifyFailed also if the text is longer than 4,096 bytes.
        """
        self._tell(text)

    def reloading(self) -> None:
        """Announce a reload, as Type=notify-reload requires; `notify("READY=1")` announces its end."""
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def barrier(self, timeout: float = 5.0) -> bool:
        """Whether PID 1 has read everything sent so far, waiting up to `timeout` seconds; not whether it has kept
        it."""
        return self._send is None or messages.barrier(self._send, timeout)

    def close(self) -> None:
        """Close this process's descriptors, including the sockets. PID 1 keeps what is stored. Idempotent."""
        with self._changing:
            for name in list(self._held.slots):
                self._held.forget(name)
            self._boxes.close()
            if isinstance(self._send, messages.Sender):
                self._send.close()
            for fds in self._sockets.values():
                for fd in fds:
                    os.close(fd)
            self._sockets.clear()

    def _tell(self, text: str, *fds: int) -> None:
        if self._send is not None:
            self._send(text, fds)


def _listen_fds() -> dict[int, str]:
    """The passed descriptors by number, close-on-exec set; none if they are meant for another process.

    libsystemd checks LISTEN_PID, and LISTEN_PIDFDID from version 259 on.
    """
    # Imported here because it takes 2 ms, and a daemon's first start, or a test, doesn't need it.
    from systemd.daemon import listen_fds_with_names

    passed: dict[int, str] = listen_fds_with_names(unset_environment=False)
    return passed
