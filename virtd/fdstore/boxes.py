# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many slots in one entry of PID 1's store: a socket whose queue holds one message with their names and descriptors.

PID 1 compares each descriptor that it is given with all those that it has, and at a daemon-reload compares all of
them anew: with 5,000 it is blocked for many seconds. So beyond the first hundred or so, slots share entries.

A box never changes. To add or remove a slot, a box with the new contents is stored under the next generation's name,
and then the old one is removed: fdstore/box/3.18 replaces fdstore/box/3.17. PID 1 reads both messages in this order,
so at whatever point we are killed, it has a complete box, and of two generations the later one counts.

The message is "virtd.fdstore 1" followed by the names, one a line, with their descriptors in the same order. Its
sender is closed at once: a datagram socket's queue is kept as long as the socket is open anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from array import array
from typing import TYPE_CHECKING, NamedTuple

from virtd.fdstore.errors import BadName, NotifyFailed
from virtd.fdstore.names import BOX, check

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

# The kernel takes 253 descriptors with a message (SCM_MAX_FD). Packing this many takes 50 µs, unpacking 120 µs.
CAPACITY = 125
HEADER = "virtd.fdstore 1"
# The most that one more box adds to $LISTEN_FDNAMES: its name with two long numbers, and the colon.
NAME_BYTES = len(BOX) + 24
_SCM_MAX_FD = 253
_LONGEST = 1 << 17


class Box(NamedTuple):
    """The present state of a box. `since`: its slots, with the generation in which each was added."""

    id: int
    generation: int
    fd: int
    dev: int
    ino: int
    since: Mapping[str, int]

    @property
    def name(self) -> str:
        return name_of(self.id, self.generation)


def name_of(number: int, generation: int) -> str:
    return f"{BOX}{number}.{generation}"


def parse(name: str) -> tuple[int, int] | None:
    """The number and generation of the box with this entry name, or None if it isn't a box."""
    match = re.fullmatch(r"([1-9][0-9]{0,17})\.([1-9][0-9]{0,17})", name.removeprefix(BOX), re.ASCII)
    return (int(match[1]), int(match[2])) if match and name.startswith(BOX) else None


def pack(slots: Mapping[str, int]) -> int:
    """A new socket that holds `slots`, descriptors by name. Raises NotifyFailed."""
    text = "\n".join([HEADER, *slots]).encode()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", slots.values()))]
            ours.sendmsg([text], control, socket.MSG_DONTWAIT)
            return theirs.detach()
    except OSError as error:
        hint = ""
        if error.errno in (errno.ETOOMANYREFS, errno.EMFILE):
            hint = "raise LimitNOFILE= in the unit, or give it CAP_SYS_RESOURCE"
        raise NotifyFailed(f"{len(slots)} slots could not be packed: {error.strerror}", hint=hint) from error


def unpack(fd: int) -> dict[str, int] | None:
    """The slots in a box, which keeps them; the caller closes the returned descriptors.

    None, with nothing left open, if it isn't a box in a known format, or if not all of it could be opened.
    """
    fds = array("i")
    try:
        with _duplicate(fd) as box:
            data, control, flags, _ = box.recvmsg(
                _LONGEST,
                socket.CMSG_SPACE(_SCM_MAX_FD * fds.itemsize),
                socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        for level, kind, payload in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        header, *names = data.decode().split("\n")
        whole = not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        if whole and header == HEADER and len({check(name) for name in names}) == len(names) == len(fds):
            return dict(zip(names, fds, strict=True))
    except (OSError, UnicodeDecodeError, BadName):
        pass
    for opened in fds:
        os.close(opened)
    return None


def _duplicate(fd: int) -> socket.socket:
    """Raises OSError if it isn't a socket."""
    duplicate = os.dup(fd)
    try:
        return socket.socket(fileno=duplicate)
    except BaseException:
        os.close(duplicate)
        raise


class Boxes:
    """All boxes of a store. `tell(text, *fds)` sends PID 1 a message. Locking is the store's; readers need none."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._all: dict[int, Box] = {}  # changes replace the dict, and never modify it
        # Generations that have successors: they are removed before anything else.
        self._stale: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def all(self) -> list[Box]:
        return list(self._all.values())

    def of(self, name: str) -> list[Box]:
        """The boxes that contain the slot: usually none or one."""
        return [box for box in self.all() if name in box.since]

    def sizes(self) -> dict[str, int]:
        """The number of slots in each."""
        return {box.name: len(box.since) for box in self.all()}

    def name(self, number: int) -> str:
        """The entry name of a box, even if it doesn't exist yet."""
        return self._all[number].name if number in self._all else name_of(number, 1)

    def place(self, count: int) -> int | None:
        """The fullest box that has room for `count` slots."""
        rooms = [(CAPACITY - len(box.since), box.id) for box in self.all()]
        return min(((room, number) for room, number in rooms if room >= count), default=(0, None))[1]

    def next_number(self, taken: Iterable[str]) -> int:
        """The number of a new box; `taken`: other entries' names."""
        others = [key[0] for name in taken if (key := parse(name)) is not None]
        return max([0, *self._all, *others]) + 1

    def open(self, number: int, fds: dict[int, int]) -> dict[str, int] | None:
        """Take over a box that systemd returned, in `generations`: the descriptors in the latest. None: it can't be
        read."""
        latest = max(fds)
        content = unpack(fds[latest])
        if content is None:
            return None
        status = os.fstat(fds[latest])
        since = dict.fromkeys(content, latest)
        self._all[number] = Box(number, latest, fds[latest], status.st_dev, status.st_ino, since)
        for generation in fds.keys() - {latest}:
            os.close(fds[generation])
            self._stale.append(name_of(number, generation))
        return content

    def tidy(self) -> None:
        """Remove generations that have a successor. Raises NotifyFailed."""
        while self._stale:
            self._tell(f"FDSTOREREMOVE=1\nFDNAME={self._stale[-1]}")
            self._stale.pop()

    def change(
        self,
        number: int,
        known: Mapping[str, int],
        *,
        without: Collection[str] = (),
        add: Mapping[str, int] | None = None,
        crowded: bool = False,
    ) -> None:
        """Replace the box in PID 1 by its next generation. Raises NotifyFailed, with nothing changed.

        `known`: descriptors of slots that are in it already; others are read from the box. `crowded`: PID 1 has no
        room for two generations at a time.
        """
        add = add or {}
        old = self._all.get(number)
        left = [name for name in old.since if name not in without and name not in add] if old is not None else []
        if old is not None and not left and not add:
            self._tell(f"FDSTOREREMOVE=1\nFDNAME={old.name}")
            os.close(old.fd)
            self._all = {other: box for other, box in self._all.items() if other != number}
            return
        inside = unpack(old.fd) or {} if old is not None and any(name not in known for name in left) else {}
        try:
            fd = pack({name: known[name] if name in known else inside[name] for name in left} | dict(add))
        finally:
            for opened in inside.values():
                os.close(opened)
        generation = old.generation + 1 if old is not None else 1
        since = {name: old.since[name] for name in left} if old is not None else {}
        try:
            if crowded and old is not None:
                self._tell(f"FDSTOREREMOVE=1\nFDNAME={old.name}")
            self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name_of(number, generation)}", fd)
        except BaseException:
            os.close(fd)
            raise
        status = os.fstat(fd)
        box = Box(number, generation, fd, status.st_dev, status.st_ino, since | dict.fromkeys(add, generation))
        self._all = {**self._all, number: box}
        if old is not None:
            os.close(old.fd)
            if not crowded:
                self._stale.append(old.name)
                with contextlib.suppress(NotifyFailed):  # then before the next change
                    self.tidy()

    def send_again(self) -> None:
        for box in self.all():
            self._tell(f"FDSTORE=1\nFDPOLL=0\nFDNAME={box.name}", box.fd)

    def sort(self, dump: Iterable[tuple[str, int, int]]) -> tuple[list[tuple[str, int, int]], list[str]]:
        """Split what PID 1 holds: the entries that aren't our boxes, and the slots in our boxes."""
        ours = self._all
        others: list[tuple[str, int, int]] = []
        seen: dict[int, int] = {}
        for entry in dump:
            number, generation = parse(entry[0]) or (0, 0)
            box = ours.get(number)
            # The dump may be older than our own state: slots that were added since are not in it.
            if box and (
                generation < box.generation or (generation, *entry[1:3]) == (box.generation, box.dev, box.ino)
            ):
                seen[number] = max(generation, seen.get(number, 0))
            else:
                others.append(entry)
        slots = [
            name
            for number, generation in seen.items()
            for name, since in ours[number].since.items()
            if since <= generation
        ]
        return others, slots

    def close(self) -> None:
        for box in self.all():
            os.close(box.fd)
        self._all = {}
