# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever lies where a file is expected: it is read, or refused at once with words that say what it is."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from virtd import process, untrusted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT = 1 << 16


def odd_files(directory: Path) -> dict[str, Path]:
    """One of each kind that there is, but for what only a kernel with faults has."""
    made = {kind: directory / kind for kind in ("fifo", "directory", "socket", "zero", "ptmx", "loop", "sparse")}
    os.mkfifo(made["fifo"])
    made["directory"].mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(made["socket"]))
    made["zero"].symlink_to("/dev/zero")
    made["ptmx"].symlink_to("/dev/ptmx")
    made["loop"].symlink_to("loop")
    with made["sparse"].open("wb") as file:
        file.truncate(10 << 30)
    return made


@pytest.mark.parametrize("follow", [False, True])
def test_nothing_odd_is_read(tmp_path: Path, *, follow: bool) -> None:
    for kind, path in odd_files(tmp_path).items():
        with pytest.raises(OSError, match=r"it is|it has|[Ll]evels|[Nn]o such") as caught:
            untrusted.read(os.fspath(path), LIMIT, follow=follow)
        assert caught.value.strerror, kind
        if kind != "sparse":
            with pytest.raises(OSError):  # noqa: PT011  # one of many; that there is one is what is asked
                untrusted.tail(os.fspath(path), LIMIT)


def test_a_tail_of_many_holes(tmp_path: Path) -> None:
    assert untrusted.tail(os.fspath(odd_files(tmp_path)["sparse"]), 100) == b"\0" * 100


def test_what_is_regular(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * LIMIT)
    (tmp_path / "link").symlink_to("file")
    assert untrusted.read(os.fspath(tmp_path / "file"), LIMIT) == b"x" * LIMIT
    assert untrusted.read(os.fspath(tmp_path / "link"), LIMIT, follow=True) == b"x" * LIMIT
    with pytest.raises(untrusted.Unfit, match="it is a link"):
        untrusted.read(os.fspath(tmp_path / "link"), LIMIT)
    with pytest.raises(untrusted.Unfit, match=f"it has {LIMIT} bytes"):
        untrusted.read(os.fspath(tmp_path / "file"), LIMIT - 1)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert untrusted.tail(os.fspath(tmp_path / "file"), 4) == b"6789"
    assert untrusted.tail(os.fspath(tmp_path / "file"), 8, since=5) == b"56789"
    assert untrusted.tail(os.fspath(tmp_path / "file"), 8, since=99) == b""
    assert untrusted.read("/proc/self/stat", LIMIT), "files of the kernel have no size"


HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lease_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    command = [sys.executable, "-c", HOLDER, os.fspath(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"held\n":
            pytest.skip("no leases here")
        # Without O_NONBLOCK this waits for /proc/sys/fs/lease-break-time.
        with pytest.raises(BlockingIOError):
            untrusted.read(os.fspath(path), LIMIT)
        holder.communicate()


# Sockets

ME = (os.getpid(), process.start_time(os.getpid()))


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)
        yield listener


def refused(path: Path, pid: int = ME[0], start: int = ME[1]) -> int:
    """The errno with which a connection is refused."""
    with pytest.raises(OSError, match="Errno") as caught:
        untrusted.connect(os.fspath(path), pid, start)
    assert caught.value.strerror
    return caught.value.errno or 0


def test_who_listens_has_to_be_who_should(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with listening(path) as listener:
        with untrusted.connect(os.fspath(path), *ME) as connection:
            assert not connection.getblocking()
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"hello")
                assert connection.recv(10) == b"hello"
        for other in ((os.getppid(), process.start_time(os.getppid())), (ME[0], ME[1] + 1), (0, 0)):
            assert refused(path, *other) == errno.EACCES
            listener.accept()[0].close()


def test_a_link_to_anothers_socket_is_refused(tmp_path: Path) -> None:
    with listening(tmp_path / "it"):
        (tmp_path / "link").symlink_to("it")
        assert refused(tmp_path / "link") == errno.EINVAL


def test_what_is_no_socket_is_refused(tmp_path: Path) -> None:
    made = odd_files(tmp_path)
    (tmp_path / "file").touch()
    for kind, path in made.items():
        assert refused(path) == (errno.ECONNREFUSED if kind == "socket" else errno.EINVAL), kind
    assert refused(tmp_path / "file") == errno.EINVAL
    assert refused(tmp_path / "nothing") == errno.ENOENT


def test_nobody_waits_for_one_that_does_not_accept(tmp_path: Path) -> None:
    with listening(tmp_path / "it"), untrusted.connect(os.fspath(tmp_path / "it"), *ME):
        assert refused(tmp_path / "it") == errno.EAGAIN  # its queue of one is full
