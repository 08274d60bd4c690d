# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store: named slots that hold descriptors over the end of the process."""

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
# So many slots are entries of their own in PID 1's store, where everybody sees them; more are put into boxes.
DIRECT = 128
_OURS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "FDSTORE", "NOTIFY_SOCKET")


class Store:
    """Named slots, kept by the service manager while no process of ours is there.

    Changing methods may be called from any thread and are let through one at a time; reading ones never wait. A
    changing method returns when its message is in PID 1's queue, where it outlives this process. That takes
    microseconds, but up to `notify.PATIENCE` seconds while PID 1 is busy with itself (daemon-reload).
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
        # What was dropped, and is still in PID 1.
        self._unwanted: set[str] = set()
        # As it is now: the daemon may raise its own soft limit later, and the next start begins with this one again.
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
                # It stays as it is, in slots like any others.
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

        The variables that say so are removed from `environ`, NOTIFY_SOCKET with them, so that no child can take them
        for its own. `fallback_max` is the unit's FileDescriptorStoreMax=, for systemd before 254, which doesn't tell
        it: where neither it nor $FDSTORE says that there is a store, `put()` refuses rather than lose what it is
        given. `headroom` is how many descriptors the daemon opens beside its slots. `direct` is how many slots are
        entries of their own in PID 1 before more are put into boxes (boxes.py); None: all of them. `inherited` (names
        by number) and `notify` stand in for systemd in tests. With `reserve` one descriptor is kept for messages, so
        that a daemon that has run out of them is not killed by its watchdog.
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
        """Whether there is a service manager to keep the slots; without one the store works, but in memory only."""
        return self._send is not None

    # Reading.

    def get(self, name: str) -> int:
        """The slot's descriptor. It stays the store's: don't close it, and don't keep it past a `put()` or `drop()`.

        MissingSlot if there is no such slot, or its descriptor was taken out.
        """
        return self._held.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._held.slots

    def names(self) -> list[str]:
        return sorted(self._held.slots)

    def slots(self) -> dict[str, Slot]:
        return dict(self._held.slots)

    def sockets(self) -> dict[str, list[int]]:
        """What came from socket units, by FileDescriptorName= (the socket unit's name if that isn't set).

        They differ from slots by having no slash in the name; what another program stored without one is here too.
        """
        return {name: list(fds) for name, fds in self._sockets.items()}

    def duplicates(self) -> dict[str, list[Slot]]:
        """All candidates of every name that came back more than once; `get()` answers the first, an arbitrary one.

        It takes another program (or `systemd-notify --fd`) to make one: `put()` never leaves two. `resolve()` chooses
        by the daemon's own records.
        """
        return {name: found for name in self._held.doubles if len(found := self._held.candidates(name)) > 1}

    def kept_as(self, name: str) -> str:
        """The entry of PID 1's store that holds the slot: of its own name, or a box's. Raises MissingSlot."""
        if name not in self._held.slots:
            raise MissingSlot(f"there is no slot {name}")
        found = self._boxes.of(name)
        return name if name in self._held.alone or not found else found[0].name

    def budget(self) -> Budget:
        """How much of the store is used, and what limits it."""
        return self._room.budget()

    def room_for(self, names: Iterable[str]) -> None:
        """Return if all `names` could be put together; else raise StoreFull, which says what to change in the unit.

        Also BadName, for a name that can't be put at all.
        """
        self._room.place(names)

    def held(self, dump: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
        """What PID 1 holds, by slot: (dev, ino) of each descriptor, of `dump` as `verify` is given it.

        Our boxes are expanded into slots; foreign ones are listed as they are.
        """
        return unboxed(dump, self._boxes, self.slots())

    def verify(self, dump: Iterable[tuple[str, int, int]]) -> Difference:
        """Compare with what PID 1 holds, given as StoredEntry or plain (name, dev, ino).

        By name and by what the descriptors are: only this tells that PID 1 kept what it was sent. Ask for the dump
        after `barrier()`, or messages of the last moment aren't in it.
        """
        return compare(self.held(dump), self.slots())

    # Changing.

    def put(self, name: str, fd: int) -> Slot:
        """Store a duplicate of `fd` under `name`; the caller keeps its own, and may close it.

        A slot of that name is replaced, and its old descriptor closed. If it isn't in a box, some microseconds lie
        between its removal and the new one's arrival in which a SIGKILL leaves neither, since PID 1 can only drop
        *all* of a name: replace what can be opened again (a log file), and put what can't be (a pipe, a connection)
        under a name of its own before the old one is dropped. Putting what the slot holds already sends it again, and
        removes nothing.

        Raises BadName, StoreFull, AlreadyStored or NotifyFailed. With the last, a slot that was to be replaced may be
        gone from PID 1, while `get()` still answers the old descriptor.
        """
        return self.put_all({name: fd})[name]

    def put_all(self, descriptors: Mapping[str, int]) -> dict[str, Slot]:
        """`put` for several that belong together: with few messages, and those that share a box all or none.

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
                    # FDPOLL=0: else PID 1 drops a pipe when its writer dies, and with it what nobody has read yet.
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
        """Those of `new` that aren't entries of their own, a message or two for each box."""
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
        # What was taken out isn't ours any more, and which of two doubles is in there only the box itself can say.
        self._boxes.change(number, self._held.known(), without=without, add=add, crowded=self._room.crowded())

    def take(self, name: str) -> int:
        """The slot's descriptor, which becomes the caller's to close. PID 1 keeps its own until `drop(name)`."""
        with self._changing:
            fd = self.get(name)
            self._held.slots[name] = self._held.slots[name]._replace(fd=-1)
            return fd

    def drop(self, name: str) -> None:
        """Forget the slot, here and in PID 1, and close its descriptor. One that isn't there is dropped already.

        NotifyFailed: it is still there, and goes with the next change or `tidy`, unless it is put anew before.
        """
        self._drop([name])

    def expel(self, name: str) -> None:
        """Drop the slot also if only PID 1 knows of it (see `verify`)."""
        with self._changing:
            if name not in self._held.alone:
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self._drop([name])

    def _drop(self, names: Iterable[str]) -> None:
        with self._changing:
            self._unwanted |= {name for name in names if name in self._held.slots}
            self.tidy()

    def renew(self, name: str) -> None:
        """Send the slot's descriptor to PID 1 again, as the only one of its name; here it stays the same.

        For a store that lost it, or has something else there. Raises MissingSlot or NotifyFailed.
        """
        with self._changing:
            fd = self.get(name)
            self.tidy()
            if name in self._held.alone:
                # First as one more of that name: if we are killed before the rest is done, the next start can choose.
                self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)
            else:
                for box in self._boxes.of(name):
                    self._repack(box.id)

    def drop_prefix(self, prefix: str) -> list[str]:
        """Drop `prefix` itself and all below it, part by part: qemu/web1 spares qemu/web10. Returns their names."""
        with self._changing:
            dropped = sorted(slot_names.below(self._held.slots, prefix))
            self._drop(dropped)
            return dropped

    def untidy(self) -> bool:
        """Whether PID 1 still has what was dropped, because it took no message at that time."""
        return bool(self._unwanted)

    def tidy(self) -> None:
        """Remove from PID 1 what a crash between two messages, or a drop that failed, has left there.

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
        """Of a name that came back more than once, keep the candidate that is `dev:ino` and drop the others.

        MissingSlot, and nothing changed, if none of them is. For a name with one descriptor it only looks.
        """
        with self._changing:
            for slot in self._held.candidates(name):
                if slot[2:] == (dev, ino):
                    return self.put(name, slot.fd) if name in self._held.doubles else slot
            raise MissingSlot(f"no descriptor in slot {name} is the one sought ({dev}:{ino})")

    def resize(self, store_max: int, files: int | None = None, headroom: int = HEADROOM) -> None:
        """FileDescriptorStoreMax= is `store_max` now, and LimitNOFILE= `files` (None: there is none).

        A daemon-reload may change them under a running daemon.
        """
        if self._send is not None:
            self._room.store_max = store_max
            self._room.files_max = files_limit(-1 if files is None else files, headroom)

    def send_again(self) -> None:
        """Send PID 1 every slot once more. It keeps those that it has; what it dropped is there again, if it fits.

        For after a daemon-reload, which drops what is over FileDescriptorStoreMax=. Slots that were taken out are
        left to their owner. Raises NotifyFailed.
        """
        with self._changing:
            for slot in self._held.slots.values():
                if slot.fd >= 0 and slot.name in self._held.alone and slot.name not in self._held.doubles:
                    self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={slot.name}", slot.fd)
            self._boxes.send_again()

    def notify(self, text: str) -> None:
        """Send fields of sd_notify(3), one a line: READY=1, STATUS=..., STOPPING=1, WATCHDOG=1, ...

        Without a service manager it does nothing. NotifyFailed if the text is over 4,096 bytes, too.
        """
        self._tell(text)

    def reloading(self) -> None:
        """Say that a reload has begun, as Type=notify-reload wants it; `notify("READY=1")` says that it's over."""
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def barrier(self, timeout: float = 5.0) -> bool:
        """Whether PID 1 has read all that was sent so far, waiting up to `timeout` seconds; not that it kept it."""
        return self._send is None or messages.barrier(self._send, timeout)

    def close(self) -> None:
        """Close this process's descriptors, the sockets' too. PID 1 keeps what is stored. May be called again."""
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
    # Here, because it takes 2 ms to import and a daemon's first start, or a test, has no use for it.
    from systemd.daemon import listen_fds_with_names

    passed: dict[int, str] = listen_fds_with_names(unset_environment=False)
    return passed
