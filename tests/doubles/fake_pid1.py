# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stand-in for PID 1's side of the FD store, with the rules that systemd 257's source and documentation give it.

tests/live/test_fdstore_facts.py holds the same rules against the real one.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import socket
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

from virtd.fdstore import Slot, Store, StoredEntry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_F_DUPFD_QUERY = 1027
_LONGEST_MESSAGE = 4096


class Entry(NamedTuple):
    name: str
    fd: int
    poll: bool


class FakePid1:
    """Receives on a notify socket, keeps descriptors, and passes them to the next process.

    Like the real one it never answers: what it wouldn't keep is closed, and named in `warnings`. Messages wait in the
    socket until `read()`.
    """

    def __init__(self, directory: Path, store_max: int = 1000) -> None:
        self.path = str(directory / "notify")
        self.store_max = store_max
        self.entries: list[Entry] = []
        self.warnings: list[str] = []
        self.other: list[str] = []
        self.history: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.path, "FDSTORE": str(self.store_max)}

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self, most: int = 1_000_000) -> int:
        """Deal with what has arrived, up to `most` messages; returns how many there were."""
        for count in range(most):
            try:
                data, control, flags, _ = self._socket.recvmsg(
                    _LONGEST_MESSAGE, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return count
            fds = array.array("i")
            for _level, _kind, payload in control:
                fds.frombytes(payload)
            assert not flags & socket.MSG_CTRUNC
            if flags & socket.MSG_TRUNC:
                self._refuse("message too long", list(fds))
            else:
                self._message(data.decode(), list(fds))
        return most

    def serve_until_quiet(self, seconds: float) -> None:
        """Read messages as they come, until none has come for that long."""
        while select.select([self._socket], [], [], seconds)[0]:
            self.read()

    def names(self) -> list[str]:
        self.read()
        return sorted(entry.name for entry in self.entries)

    def dump(self) -> list[tuple[Any, ...]]:
        """What DumpUnitFileDescriptorStore() would answer, of type a(suuutuusu)."""
        self.read()
        found = []
        for entry in self.entries:
            st = os.fstat(entry.fd)
            device = os.major(st.st_dev), os.minor(st.st_dev)
            found.append(
                (entry.name, st.st_mode, *device, st.st_ino, os.major(st.st_rdev), os.minor(st.st_rdev), "", 0)
            )
        return found

    def notice_hangups(self) -> None:
        """Drop the entries that PID 1 would drop by itself: those with something to report that aren't FDPOLL=0."""
        self.read()
        for entry in list(self.entries):
            poll = select.poll()
            poll.register(entry.fd, 0)
            if entry.poll and poll.poll(0):
                self._remove(entry)

    def hand_over(self) -> dict[int, str]:
        """Duplicates of all entries by number, as a "restart" in this process gets them: the newest first."""
        self.read()
        return {fcntl.fcntl(entry.fd, fcntl.F_DUPFD_CLOEXEC, 3): entry.name for entry in self.entries}

    def restart(self, argv: Sequence[str], *, sockets: Sequence[tuple[str, int]] = (), pid: str = "$$") -> Any:
        """Execute `argv` as the unit's next main process and return the JSON that it prints.

        The descriptors are laid out from 3 on: sockets, then the store. `pid` is what LISTEN_PID says, in sh.
        """
        self.read()
        passed = [*sockets, *((entry.name, entry.fd) for entry in self.entries)]
        # Out of the way first: the numbers from 3 on are taken in this process.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 900) for _, fd in passed]
        environ = self.environment() | {"PATH": os.environ["PATH"], "LISTEN_FDS": str(len(passed))}
        environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        output, theirs = os.pipe()
        try:
            child = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", f'export LISTEN_PID={pid}; exec "$@"', "sh", *argv],
                environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs, 1),
                    *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high, 3)),
                ],
            )
        finally:
            for fd in (*high, theirs):
                os.close(fd)
        with open(output) as file:
            printed = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise subprocess.CalledProcessError(status, list(argv), printed)
        return json.loads(printed)

    def close(self) -> None:
        for entry in self.entries:
            os.close(entry.fd)
        self.entries.clear()
        # What is still in the queue holds descriptors too, but those go with the socket.
        self._socket.close()

    def _message(self, text: str, fds: list[int]) -> None:
        self.history.append(text)
        fields = dict(line.partition("=")[::2] for line in text.split("\n"))
        if fields == {"BARRIER": "1"}:
            assert len(fds) == 1
            os.close(fds[0])
        elif fields.get("FDSTOREREMOVE") == "1":
            for entry in [entry for entry in self.entries if entry.name == fields["FDNAME"]]:
                self._remove(entry)
        elif fields.get("FDSTORE") == "1":
            name = fields.get("FDNAME", "stored")
            if not name.isascii() or not name.isprintable() or ":" in name or len(name) > 255:
                self.warnings.append(f"bad name {name}")
                name = "stored"
            for fd in fds:
                self._add(name, fd, poll=fields.get("FDPOLL") != "0")
        else:
            self.other.append(text)
            assert not fds

    def _add(self, name: str, fd: int, *, poll: bool) -> None:
        if len(self.entries) >= self.store_max:
            self._refuse("full", [fd])
        elif any(fcntl.fcntl(entry.fd, _F_DUPFD_QUERY, fd) for entry in self.entries):
            # Silently, and the first name stays.
            os.close(fd)
        else:
            self.entries.insert(0, Entry(name, fd, poll))

    def _remove(self, entry: Entry) -> None:
        self.entries.remove(entry)
        os.close(entry.fd)

    def _refuse(self, why: str, fds: list[int]) -> None:
        self.warnings.append(why)
        for fd in fds:
            os.close(fd)


def put_new(store: Store, name: str) -> Slot:
    """Put a descriptor that nothing else holds."""
    fd = os.memfd_create("slot")
    try:
        return store.put(name, fd)
    finally:
        os.close(fd)


def entries(pid1: FakePid1) -> list[StoredEntry]:
    return [StoredEntry.from_dump(entry) for entry in pid1.dump()]


def fill(pid1: FakePid1) -> int:
    """Fill PID 1's queue; returns how many messages it holds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(pid1.path)
        count = 0
        try:
            while True:
                sock.send(b"X_FILL=1")
                count += 1
        except BlockingIOError:
            return count


def inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
