# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store's messages: what PID 1 is told, what happens when it is busy or gone, and without one."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.doubles.fake_pid1 import FakePid1, entries, fill, inode, put_new
from virtd.fdstore import (
    NotifyFailed,
    Store,
)
from virtd.fdstore.notify import connect

if TYPE_CHECKING:
    pass


# Without a service manager.


def test_by_hand_it_works_in_memory(pipe: tuple[int, int]) -> None:
    environ = {"PATH": "/bin"}
    store = Store.from_environment(environ)
    assert not store.persistent
    assert environ == {"PATH": "/bin"}
    store.put("a/b", pipe[0])
    store.put("a/b", pipe[1])
    assert inode(store.get("a/b")) == inode(pipe[1])
    assert store.budget().store_max is None
    store.notify("READY=1")
    store.reloading()
    assert store.barrier(0)
    store.drop("a/b")
    assert store.names() == []
    store.close()
    store.close()


# Talking to PID 1.


def test_it_says_the_other_things_too(pid1: FakePid1, store: Store) -> None:
    store.notify("READY=1\nSTATUS=All is well")
    store.reloading()
    pid1.read()
    assert pid1.other[0] == "READY=1\nSTATUS=All is well"
    reloading, clock = pid1.other[1].split("\n")
    assert reloading == "RELOADING=1"
    assert clock.startswith("MONOTONIC_USEC=")
    assert abs(int(clock.partition("=")[2]) - float(Path("/proc/uptime").read_text().split()[0]) * 1e6) < 60e6


def test_an_abstract_socket_will_do(pipe: tuple[int, int]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0virtd-test-{os.getpid()}")
        store = Store.from_environment({"NOTIFY_SOCKET": f"@virtd-test-{os.getpid()}", "FDSTORE": "5"})
        store.put("a/b", pipe[0])
        data, fds, _, _ = socket.recv_fds(manager, 4096, 5)
        assert data.endswith(b"FDNAME=a/b")
        os.close(fds[0])
        store.close()


def test_a_barrier_waits_until_all_was_read(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    assert not store.barrier(0.05)
    reader = threading.Thread(target=pid1.serve_until_quiet, args=(0.5,))
    reader.start()
    assert store.barrier(10)
    assert [entry.name for entry in pid1.entries] == ["a/b"]
    reader.join()


def test_a_full_queue_is_waited_for(pid1: FakePid1, store: Store) -> None:
    filled = fill(pid1)
    writer = threading.Thread(target=put_new, args=(store, "a/b"))
    writer.start()
    # The queue is full, so it can't have returned; nor does anybody else wait meanwhile.
    writer.join(0.2)
    assert writer.is_alive()
    assert store.names() == []
    assert pid1.read(1) == 1
    writer.join(10)
    assert not writer.is_alive()
    assert pid1.names() == ["a/b"]
    assert len(pid1.other) == filled


def test_a_manager_that_never_reads_is_given_up_on(pid1: FakePid1) -> None:
    store = Store.from_environment(pid1.environment(), notify=connect(pid1.path, patience=0.05))
    fill(pid1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotifyFailed, match="accepted no message: Connection timed out"):
        put_new(store, "a/b")
    assert store.names() == []
    assert len(os.listdir("/proc/self/fd")) == before
    pid1.read()
    put_new(store, "a/b")
    assert pid1.names() == ["a/b"]
    store.close()


def test_a_failed_replacement_leaves_the_old_descriptor_here(pid1: FakePid1) -> None:
    store = Store.from_environment(pid1.environment(), notify=connect(pid1.path, patience=0.05))
    old = put_new(store, "a/b")
    fill(pid1)
    with pytest.raises(NotifyFailed):
        put_new(store, "a/b")
    assert store.slots() == {"a/b": old}
    with pytest.raises(NotifyFailed):
        store.drop("a/b")
    assert store.get("a/b") == old.fd
    store.close()


def test_nobody_there_is_an_error_that_says_so(tmp_path: Path, pipe: tuple[int, int]) -> None:
    store = Store.from_environment({"NOTIFY_SOCKET": str(tmp_path / "gone"), "FDSTORE": "5"})
    with pytest.raises(NotifyFailed, match="No such file or directory"):
        store.put("a/b", pipe[0])
    with pytest.raises(NotifyFailed):
        store.barrier()
    store.close()
    with pytest.raises(NotifyFailed, match="vsock:2:1234 is not an AF_UNIX socket"):
        Store.from_environment({"NOTIFY_SOCKET": "vsock:2:1234"})


def test_a_message_that_pid1_would_drop_is_refused(pid1: FakePid1, store: Store) -> None:
    store.notify("STATUS=" + "x" * (4096 - 7))
    with pytest.raises(NotifyFailed, match="4097 bytes"):
        store.notify("STATUS=" + "x" * (4096 - 6))
    pid1.read()
    assert (len(pid1.other), pid1.warnings) == (1, [])


def test_a_bad_descriptor_changes_nothing(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    fd = os.memfd_create("x")
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        store.put("a/b", fd)
    assert not store.verify(entries(pid1))
