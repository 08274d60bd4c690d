# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named slots, held against a fake PID 1 that keeps systemd's rules."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_pid1 import FakePid1, entries, fill, inode, put_new
from virtd.fdstore import (
    AlreadyStored,
    BadName,
    Difference,
    MissingSlot,
    NotifyFailed,
    Store,
    StoredEntry,
    StoreError,
    StoreFull,
)
from virtd.fdstore.notify import connect

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]


# Putting, reading, dropping.


def test_what_a_daemon_reload_has_dropped_is_sent_again(pid1: FakePid1, store: Store, pipe: tuple[int, int]) -> None:
    for number, end in enumerate(pipe):
        store.put(f"a/{number}", end)
    pid1.read()
    dropped = pid1.entries.pop(0)
    os.close(dropped.fd)
    store.resize(1)
    with pytest.raises(StoreFull, match="FileDescriptorStoreMax allows 1"):
        store.room_for(["a/2"])
    store.resize(2)
    store.send_again()
    pid1.read()
    assert not store.verify((entry.name, *inode(entry.fd)) for entry in pid1.entries)
    assert len(pid1.entries) == 2


def test_put_reaches_pid1_with_its_name_and_without_polling(
    pid1: FakePid1, store: Store, pipe: tuple[int, int]
) -> None:
    slot = store.put("qemu/web1/stdout", pipe[0])
    assert pid1.names() == ["qemu/web1/stdout"]
    assert inode(pid1.entries[0].fd) == inode(pipe[0]) == (slot.dev, slot.ino)
    assert not pid1.entries[0].poll
    assert pid1.history == ["FDSTORE=1\nFDPOLL=0\nFDNAME=qemu/web1/stdout"]


def test_last_words_of_a_dead_writer_stay(pid1: FakePid1, store: Store) -> None:
    reader, writer = os.pipe()
    store.put("qemu/web1/stderr", reader)
    os.write(writer, b"last words")
    os.close(writer)
    os.close(reader)
    pid1.notice_hangups()
    assert os.read(pid1.entries[0].fd, 100) == b"last words"


def test_the_store_has_its_own_descriptor(store: Store) -> None:
    reader, writer = os.pipe()
    slot = store.put("a/b", reader)
    os.close(reader)
    os.write(writer, b"x")
    os.close(writer)
    assert slot.fd == store.get("a/b") != reader
    assert os.read(slot.fd, 10) == b"x"
    assert not os.get_inheritable(slot.fd)


def test_get_says_what_is_missing(store: Store) -> None:
    with pytest.raises(MissingSlot, match=r"^there is no slot qemu/web1/log$") as caught:
        store.get("qemu/web1/log")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, StoreError)


def test_take_gives_the_descriptor_away(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    fd = store.take("a/b")
    assert pid1.names() == ["a/b"] == store.names()
    assert store.slots()["a/b"].fd == -1
    with pytest.raises(MissingSlot, match=r"removed by take\(\)"):
        store.get("a/b")
    with pytest.raises(MissingSlot):
        store.take("a/b")
    store.drop("a/b")
    assert pid1.names() == []
    os.close(fd)  # was ours: the drop didn't close it


def test_drop_closes_and_removes(pid1: FakePid1, store: Store) -> None:
    slot = put_new(store, "a/b")
    store.drop("a/b")
    store.drop("a/b")
    assert pid1.names() == store.names() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(slot.fd)
    assert pid1.history[1:] == ["FDSTOREREMOVE=1\nFDNAME=a/b"], "the second drop told PID 1 something"


@pytest.mark.parametrize("direct", [9, 2])
def test_what_could_not_be_dropped_goes_with_the_next_change(pid1: FakePid1, direct: int) -> None:
    """Whether it is an entry of its own or shares one."""
    deaf = False
    transport = connect(pid1.path)

    def send(text: str, fds: Sequence[int]) -> None:
        if deaf:
            raise NotifyFailed("the service manager accepted no message")
        transport(text, fds)
        pid1.read()

    store = Store.from_environment(pid1.environment(), notify=send, direct=direct)
    for name in ("a/web1/in", "a/web1/out", "a/web2/in", "a/web2/out"):
        put_new(store, name)
    for web in ("web1", "web2"):
        deaf = True
        with pytest.raises(NotifyFailed):
            store.drop_prefix(f"a/{web}/")
        with pytest.raises(NotifyFailed):
            store.tidy()
        assert store.untidy()
        deaf = False
        if web == "web1":
            store.tidy()
        else:
            put_new(store, "a/web2/in")  # which isn't unwanted any more
            store.tidy()
        assert not store.untidy()
        assert [name for name in store.names() if web in name] == (["a/web2/in"] if web == "web2" else [])
    inherited = pid1.hand_over()
    store.close()
    store = Store.from_environment(pid1.environment(), inherited=inherited, notify=send, direct=direct)
    assert store.names() == ["a/web2/in"]
    store.close()


@pytest.mark.parametrize("prefix", ["qemu/web1", "qemu/web1/"])
def test_drop_prefix_stops_at_the_slash(pid1: FakePid1, store: Store, prefix: str) -> None:
    for name in ("qemu/web1/log", "qemu/web1/stdin", "qemu/web10/log", "qemu/web", "lxc/web1/log"):
        if name.count("/") == 2:
            put_new(store, name)
    assert store.drop_prefix(prefix) == ["qemu/web1/log", "qemu/web1/stdin"]
    assert pid1.names() == ["lxc/web1/log", "qemu/web10/log"]


def test_reading_gives_copies(store: Store) -> None:
    put_new(store, "a/b")
    store.slots().clear()
    store.names().clear()
    assert store.names() == ["a/b"]
    assert "a/b" in store
    assert "a/c" not in store


# Replacing.


def test_a_slot_can_be_replaced(pid1: FakePid1, store: Store) -> None:
    old = put_new(store, "qemu/web1/log")
    new = put_new(store, "qemu/web1/log")
    assert (old.dev, old.ino) != (new.dev, new.ino)
    assert not store.verify(entries(pid1))
    assert store.slots() == {"qemu/web1/log": new}


def test_a_full_store_still_replaces(tmp_path: Path) -> None:
    pid1 = FakePid1(tmp_path, store_max=1)
    store = Store.from_environment(pid1.environment())
    put_new(store, "a/b")
    put_new(store, "a/b")
    assert not store.verify(entries(pid1))
    assert pid1.warnings == []
    store.close()
    pid1.close()


def test_putting_the_same_again_never_removes_it(pid1: FakePid1, store: Store, pipe: tuple[int, int]) -> None:
    for _ in range(3):
        store.put("a/b", pipe[0])
    assert not store.verify(entries(pid1))
    assert not any("REMOVE" in message for message in pid1.history)


def test_a_lost_slot_is_put_back_by_putting_it_again(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    pid1.read()
    os.close(pid1.entries.pop().fd)
    assert store.verify(entries(pid1)).missing == ("a/b",)
    store.put("a/b", store.get("a/b"))
    assert not store.verify(entries(pid1))


def test_one_open_file_has_one_name(pid1: FakePid1, store: Store, pipe: tuple[int, int]) -> None:
    store.put("a/b", pipe[0])
    copy = os.dup(pipe[0])
    with pytest.raises(AlreadyStored, match="is in the FD store as a/b"):
        store.put("a/c", copy)
    os.close(copy)
    # The other end has the same inode and is another file all the same.
    store.put("a/w", pipe[1])
    assert not store.verify(entries(pid1))
    # A name that is free again frees the file.
    store.drop("a/b")
    store.put("a/c", pipe[0])
    assert not store.verify(entries(pid1))


def test_a_taken_slot_does_not_confuse_the_next_put(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    fd = store.take("a/b")
    os.close(fd)
    put_new(store, "a/c")
    put_new(store, "a/b")
    assert pid1.names() == ["a/b", "a/c"]
    assert not store.verify(entries(pid1))


def test_a_taken_descriptor_can_be_put_back(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    fd = store.take("a/b")
    store.put("a/b", fd)
    assert inode(store.get("a/b")) == inode(fd)
    os.close(fd)
    assert not store.verify(entries(pid1))


# Names.


@pytest.mark.parametrize(
    "name",
    [
        "",
        "noslash",
        "/",
        "a/",
        "/a",
        "a//b",
        "qemu/web1:0/log",
        "qemu/wéb/log",
        "qemu/web\\x2d1/log",
        "qemu/web1/lo\ng",
        "qemu/web1/\x7f",
        "qemu/\t/x",
        "a/b\nFDNAME=c/d",
        "a/" + "b" * 254,
    ],
)
def test_a_name_that_systemd_would_change_is_refused(
    pid1: FakePid1, store: Store, name: str, pipe: tuple[int, int]
) -> None:
    with pytest.raises(BadName) as caught:
        store.put(name, pipe[0])
    assert isinstance(caught.value, ValueError)
    assert pid1.read() == 0
    assert store.names() == []
    with pytest.raises(BadName):
        store.room_for([name])


@pytest.mark.parametrize("name", ["a/b", "qemu/web-1_x.y/console.log", "a/" + "b" * 253, "a b/~!@#$%^&*()=;'\""])
def test_a_name_that_systemd_keeps_is_taken(pid1: FakePid1, store: Store, name: str) -> None:
    put_new(store, name)
    assert pid1.names() == [name]
    assert pid1.warnings == []


# Taking over.

NEXT_DAEMON = f"""
import fcntl, json, os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from virtd.fdstore import Store
store = Store.from_environment()
seen = {{
    "slots": {{name: [slot.dev, slot.ino] for name, slot in store.slots().items()}},
    "sockets": store.sockets(),
    "duplicates": {{name: [slot.ino for slot in slots] for name, slots in store.duplicates().items()}},
    "inheritable": [slot.fd for slot in store.slots().values() if os.get_inheritable(slot.fd)],
    "persistent": store.persistent,
    "max": store._room.store_max,
    "environ": subprocess.run(["env"], stdout=subprocess.PIPE, text=True).stdout,
}}
exec(sys.argv[1])
print(json.dumps(seen))
"""


def next_daemon(pid1: FakePid1, then: str = "", **options: Any) -> Any:
    return pid1.restart([sys.executable, "-c", NEXT_DAEMON, then], **options)


def test_a_new_process_finds_its_slots_by_name(pid1: FakePid1, store: Store, pipe: tuple[int, int]) -> None:
    store.put("qemu/web1/stdout", pipe[0])
    store.put("qemu/web1/stdin", pipe[1])
    put_new(store, "qemu/web1/log")
    expected = {name: [slot.dev, slot.ino] for name, slot in store.slots().items()}
    seen = next_daemon(pid1)
    assert seen["slots"] == expected
    assert seen["inheritable"] == []
    assert seen["persistent"]
    assert seen["max"] == 1000


def test_the_slots_work_in_the_new_process(pid1: FakePid1, store: Store) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one ")
    store.put("a/r", reader)
    store.put("a/w", writer)
    os.close(reader)
    os.close(writer)
    seen = next_daemon(
        pid1, "os.write(store.get('a/w'), b'two'); seen = os.read(store.get('a/r'), 100).decode(); store.drop('a/w')"
    )
    assert seen == "one two"
    assert pid1.names() == ["a/r"]


def test_no_child_of_the_new_process_sees_anything_of_it(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    seen = next_daemon(pid1)
    assert "PATH=" in seen["environ"]
    for key in ("LISTEN_", "NOTIFY_SOCKET", "FDSTORE"):
        assert key not in seen["environ"]


def test_descriptors_meant_for_another_process_are_left_alone(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    seen = next_daemon(pid1, "os.fstat(3)", pid="1")
    assert seen["slots"] == seen["sockets"] == {}
    assert "LISTEN_" not in seen["environ"]


def test_sockets_of_socket_units_are_told_apart(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/b")
    with socket.socket() as one, socket.socket() as two:
        passed = [("virtd.socket", one.fileno()), ("virtd.socket", two.fileno()), ("ctl", one.fileno())]
        seen = next_daemon(pid1, sockets=passed)
    assert seen["sockets"] == {"virtd.socket": [3, 4], "ctl": [5]}
    assert list(seen["slots"]) == ["a/b"]


def test_a_name_that_comes_back_twice_is_reported_and_settled(pid1: FakePid1) -> None:
    send = connect(pid1.path)
    files = [os.memfd_create("x") for _ in range(3)]
    for fd in files:
        send("FDSTORE=1\nFDPOLL=0\nFDNAME=a/b", [fd])
    send("FDSTORE=1\nFDPOLL=0\nFDNAME=a/c", [files[0]])  # ignored: it has a name
    seen = next_daemon(pid1)
    assert seen["duplicates"] == {"a/b": [inode(fd)[1] for fd in reversed(files)]}

    store = Store.from_environment(pid1.environment(), inherited=pid1.hand_over())
    assert store.budget().used == 3
    assert store.verify(entries(pid1)).mismatched == ("a/b",)
    with pytest.raises(MissingSlot):
        store.resolve("a/b", 0, 0)
    assert len(store.duplicates()["a/b"]) == 3
    kept = store.resolve("a/b", *inode(files[1]))
    assert (kept.dev, kept.ino) == inode(files[1])
    assert store.resolve("a/b", *inode(files[1])) == kept
    assert store.duplicates() == {}
    assert not store.verify(entries(pid1))
    assert store.budget().used == 1
    store.close()
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("which", [0, 1])
def test_either_of_two_can_be_the_right_one(pid1: FakePid1, which: int) -> None:
    send = connect(pid1.path)
    files = [os.memfd_create("x") for _ in range(2)]
    for fd in files:
        send("FDSTORE=1\nFDPOLL=0\nFDNAME=a/b", [fd])
    store = Store.from_environment(pid1.environment(), inherited=pid1.hand_over())
    store.resolve("a/b", *inode(files[which]))
    assert not store.verify(entries(pid1))
    assert inode(store.get("a/b")) == inode(files[which])
    store.close()
    for fd in files:
        os.close(fd)


def test_duplicates_go_with_their_name(pid1: FakePid1) -> None:
    send = connect(pid1.path)
    for _ in range(2):
        fd = os.memfd_create("x")
        send("FDSTORE=1\nFDNAME=a/b", [fd])
        os.close(fd)
    store = Store.from_environment(pid1.environment(), inherited=pid1.hand_over())
    store.drop("a/b")
    assert store.names() == pid1.names() == []
    assert store.duplicates() == {}
    store.close()


# Comparing.


def test_verify_names_every_kind_of_difference(pid1: FakePid1, store: Store) -> None:
    for name in ("a/kept", "a/lost", "a/other", "a/twice"):
        put_new(store, name)
    assert store.verify(entries(pid1)) == Difference()
    assert not store.verify(entries(pid1))
    store.barrier(0)
    pid1.read()
    stranger = [os.memfd_create("x") for _ in range(3)]
    for entry in list(pid1.entries):
        if entry.name in ("a/lost", "a/other"):
            pid1.entries.remove(entry)
            os.close(entry.fd)
    send = connect(pid1.path)
    for name, fd in zip(("a/other", "a/twice", "a/new"), stranger, strict=True):
        send(f"FDSTORE=1\nFDNAME={name}", [fd])
        os.close(fd)
    difference = store.verify(entries(pid1))
    assert difference == Difference(missing=("a/lost",), unknown=("a/new",), mismatched=("a/other", "a/twice"))
    assert difference


def test_verify_takes_plain_tuples(store: Store) -> None:
    slot = put_new(store, "a/b")
    assert not store.verify([("a/b", slot.dev, slot.ino)])
    assert store.verify([("a/b", slot.dev, slot.ino + 1)]).mismatched == ("a/b",)


def test_a_dump_entry_is_read_by_its_place() -> None:
    entry = ("qemu/web1/log", 0o100600, 8, 1, 4711, 0, 0, "/var/log/x", 2)
    assert StoredEntry.from_dump(entry) == ("qemu/web1/log", os.makedev(8, 1), 4711)
    assert StoredEntry.from_dump(list(entry)) == ("qemu/web1/log", os.makedev(8, 1), 4711)


# Threads.


def test_threads_change_it_at_once(pid1: FakePid1, store: Store) -> None:
    """Eight threads put, replace, take and drop, while one reads and PID 1's short queue makes all of them wait."""
    threads = 8
    failures: list[BaseException] = []
    done = threading.Event()

    def work(mine: int) -> None:
        try:
            for n in range(40):
                put_new(store, f"t{mine}/kept")
                put_new(store, f"t{mine}/{n}")
                if n % 3 == 0:
                    os.close(store.take(f"t{mine}/{n}"))
                store.drop(f"t{mine}/{n}")
                put_new(store, f"t{mine}/sub/{n}")
            store.drop_prefix(f"t{mine}/sub")
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                select.select([pid1], [], [], 0.01)
                pid1.read(5)
                store.names(), store.slots(), store.budget(), store.duplicates()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    reader = threading.Thread(target=read)
    reader.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    reader.join()
    assert [repr(f) for f in failures] == []
    assert store.names() == [f"t{n}/kept" for n in range(threads)] == pid1.names()
    assert not store.verify(entries(pid1))
    assert pid1.warnings == []


def test_only_one_of_many_threads_gets_the_last_place(tmp_path: Path) -> None:
    pid1 = FakePid1(tmp_path, store_max=1)
    store = Store.from_environment(pid1.environment())
    outcomes: list[str] = []

    def work(n: int) -> None:
        try:
            put_new(store, f"a/{n}")
            outcomes.append("kept")
        except StoreFull:
            outcomes.append("refused")

    # The full queue holds each of them up between looking for room and having used it.
    fill(pid1)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    workers[0].join(0.1)
    while any(worker.is_alive() for worker in workers):
        pid1.read()
    for worker in workers:
        worker.join()
    assert sorted(outcomes) == ["kept", "refused", "refused", "refused"]
    assert not store.verify(entries(pid1))
    assert pid1.warnings == []
    store.close()
    pid1.close()


def test_looking_never_waits_for_a_writer_that_does(pid1: FakePid1, store: Store) -> None:
    put_new(store, "a/a")
    fill(pid1)
    writer = threading.Thread(target=put_new, args=(store, "a/b"))
    writer.start()
    writer.join(0.1)

    def look() -> None:
        store.budget(), store.get("a/a"), store.names(), store.slots(), store.duplicates(), store.sockets()
        store.verify([])
        store.room_for(["a/c"])

    looker = threading.Thread(target=look)
    looker.start()
    looker.join(10)
    assert not looker.is_alive()
    assert writer.is_alive()
    pid1.read()
    writer.join()
    assert pid1.names() == ["a/a", "a/b"]


def test_the_descriptor_is_close_on_exec_even_from_a_plain_one(store: Store, pipe: tuple[int, int]) -> None:
    os.set_inheritable(pipe[0], True)
    slot = store.put("a/b", pipe[0])
    assert fcntl.fcntl(slot.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


# The documentation.


def test_the_readme_shows_the_unit_that_is_tested() -> None:
    package = ROOT / "virtd" / "fdstore"
    licence, _, unit = (package / "example.service").read_text().partition("\n")
    assert "SPDX" in licence
    assert f"```ini\n{unit}```\n" in (package / "README.md").read_text()


def test_the_readme_names_every_public_method() -> None:
    text = (ROOT / "virtd" / "fdstore" / "README.md").read_text().partition("## API")[2]
    for name in dir(Store):
        assert name.startswith("_") or f"`{name}" in text or f"Store.{name}(" in text or f" `{name}" in text, name
