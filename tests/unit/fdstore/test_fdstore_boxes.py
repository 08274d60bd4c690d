# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slots that share entries of PID 1's store, cut off at every message."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_pid1 import FakePid1, entries, put_new
from virtd.fdstore import BadName, Difference, Limit, MissingSlot, Store, StoredEntry, StoreFull, boxes
from virtd.fdstore.notify import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SLOTS = ("stdin", "stdout", "stderr", "console.log", "log")


class Killed(BaseException):
    """The daemon ends here."""


class Scene:
    """A PID 1, and one daemon after another."""

    def __init__(self, directory: Path, store_max: int = 1000) -> None:
        self.pid1 = FakePid1(directory, store_max)
        self.left: int | None = None
        self.store = self.start({})

    def start(self, inherited: dict[int, str]) -> Store:
        send = connect(self.pid1.path)

        def transport(text: str, fds: Sequence[int]) -> None:
            if self.left is not None:
                if not self.left:
                    raise Killed
                self.left -= 1
            send(text, fds)
            self.pid1.read()

        return Store.from_environment(
            self.pid1.environment(), inherited=inherited, notify=transport, direct=self.direct
        )

    direct: int | None = 5

    def restart(self) -> Store:
        self.left = None
        self.store.close()
        self.store = self.start(self.pid1.hand_over())
        return self.store

    def guest(self, name: str) -> dict[str, int]:
        """Put a guest's five; their inodes."""
        fds = {f"qemu/{name}/{slot}": os.memfd_create(slot) for slot in SLOTS}
        try:
            return {name: slot.ino for name, slot in self.store.put_all(fds).items()}
        finally:
            for fd in fds.values():
                os.close(fd)

    def inodes(self) -> dict[str, int]:
        for slot in self.store.slots().values():
            assert os.fstat(slot.fd).st_ino == slot.ino
        return {name: slot.ino for name, slot in self.store.slots().items()}

    def boxes(self) -> list[str]:
        return [name for name in self.pid1.names() if name.startswith("fdstore/")]

    def agree(self) -> None:
        """PID 1 has what the store has, nothing else, and refused nothing."""
        assert not self.store.verify(entries(self.pid1))
        assert self.store.budget().entries == len(self.pid1.names())
        assert self.pid1.warnings == []


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.store.close()
    made.pid1.close()


def test_the_first_are_entries_of_their_own_and_the_rest_share(scene: Scene) -> None:
    expected = {name: ino for n in range(60) for name, ino in scene.guest(f"g{n}").items()}
    assert len(scene.boxes()) == 3
    assert len(scene.pid1.names()) == 5 + 3
    assert scene.store.kept_as("qemu/g0/stdin") == "qemu/g0/stdin"
    assert scene.store.kept_as("qemu/g1/stdin").startswith("fdstore/box/1.")
    with pytest.raises(MissingSlot):
        scene.store.kept_as("qemu/g60/stdin")
    scene.agree()
    scene.restart()
    assert scene.inodes() == expected
    scene.agree()
    # The other end of a pipe in a box is as open as ever, and closes when its slot is dropped.
    for n in range(60):
        scene.store.drop_prefix(f"qemu/g{n}")
        scene.agree()
    assert scene.pid1.names() == []


def test_a_pipe_in_a_box_is_the_same_pipe_and_closes_with_its_slot(scene: Scene) -> None:
    scene.guest("first")
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    scene.store.put("qemu/web1/stdin", writer)
    os.close(writer)
    scene.restart()
    assert scene.store.kept_as("qemu/web1/stdin") == "fdstore/box/1.1"
    os.write(scene.store.get("qemu/web1/stdin"), b"hello")
    assert os.read(reader, 10) == b"hello"
    assert not os.get_inheritable(scene.store.get("qemu/web1/stdin"))
    scene.store.drop("qemu/web1/stdin")
    scene.pid1.read()
    assert os.read(reader, 10) == b""
    os.close(reader)


def changes(scene: Scene) -> dict[str, Callable[[], Any]]:
    def replace() -> None:
        put_new(scene.store, "qemu/b/log")

    def all_boxed() -> None:
        scene.store.drop_prefix("qemu/b")
        scene.store.drop_prefix("qemu/c")

    return {
        "put": lambda: scene.guest("new"),
        "drop": lambda: scene.store.drop_prefix("qemu/b"),
        "drop one": lambda: scene.store.drop("qemu/b/stdin"),
        "drop all": all_boxed,
        "replace": replace,
        "renew": lambda: scene.store.renew("qemu/b/stdin"),
        "tidy": lambda: scene.store.tidy(),
        "send again": lambda: scene.store.send_again(),
    }


@pytest.mark.parametrize("what", ["put", "drop", "drop one", "drop all", "replace", "renew", "tidy", "send again"])
@pytest.mark.parametrize("again", [False, True])
def test_killed_before_every_message(scene: Scene, what: str, again: bool) -> None:
    """What isn't being changed is there at any time; what is, is as before or after, never half. Twice in a row."""
    for name in "abc":
        scene.guest(name)
    changing = {"put": "qemu/new/", "drop": "qemu/b/", "drop one": "qemu/b/stdin", "replace": "qemu/b/log"}
    for number in range(20):
        before = scene.inodes()
        scene.left = number
        try:
            changes(scene)[what]()
            done = True
        except Killed:
            done = False
        if again and not done:
            # Its successor is killed in the midst of the same.
            scene.restart()
            scene.left = 1
            with contextlib.suppress(Killed):
                changes(scene)[what]()
        scene.restart()
        after = scene.inodes()
        assert scene.store.duplicates() == {}
        touched = changing.get(what)
        for name in before:
            if what == "drop all" and name.startswith(("qemu/b/", "qemu/c/")):
                continue
            if touched is None or not name.startswith(touched):
                assert after[name] == before[name], (what, number, name)
            elif what == "replace":
                assert name in after, (what, number)
        if what in ("put", "drop"):
            found = [name for name in after if name.startswith(changing[what])]
            assert len(found) in (0, 5), (what, number)
        scene.store.tidy()
        scene.agree()
        if done:
            return
    raise AssertionError("it never came to its end")


def test_without_a_free_entry_nothing_more_goes_into_boxes(tmp_path: Path) -> None:
    """Five of their own, a box, and the entry that its next generation needs: room for 130, and not one more."""
    scene = Scene(tmp_path, store_max=7)
    for number in range(26):
        scene.guest(f"g{number}")
    budget = scene.store.budget()
    assert (budget.used, budget.max, budget.limited_by, budget.entries) == (130, 130, Limit.STORE, 6)
    with pytest.raises(StoreFull, match=r"130 slots are used, and FileDescriptorStoreMax allows 130") as caught:
        scene.guest("late")
    assert "FileDescriptorStoreMax=" in caught.value.hint
    scene.agree()
    scene.store.drop_prefix("qemu/g3")
    scene.guest("late")
    scene.agree()
    # Too few for a box and its successor: then there is none.
    scene.store.close()
    scene.pid1.close()
    (tmp_path / "small").mkdir()
    scene = Scene(tmp_path / "small", store_max=6)
    scene.guest("g0")
    put_new(scene.store, "qemu/g1/stdin")
    assert scene.boxes() == []
    with pytest.raises(StoreFull):
        put_new(scene.store, "qemu/g1/stdout")
    assert scene.store.budget().max == 6
    scene.store.close()
    scene.pid1.close()


def test_a_store_that_was_made_smaller_still_lets_go(scene: Scene) -> None:
    for name in "abc":
        scene.guest(name)
    scene.pid1.store_max = 6
    scene.store.resize(6)
    with pytest.raises(StoreFull):
        scene.guest("d")
    scene.store.drop_prefix("qemu/b")
    scene.agree()
    assert len(scene.store.names()) == 10


def test_an_old_layout_stays_as_it_is(scene: Scene) -> None:
    """All slots by themselves, as an older version left them: taken over, and only what is new goes into boxes."""
    scene.direct = None
    scene.restart()
    expected = {name: ino for n in range(20) for name, ino in scene.guest(f"g{n}").items()}
    scene.direct = 5
    scene.restart()
    assert scene.inodes() == expected
    expected |= scene.guest("new")
    assert len(scene.boxes()) == 1
    assert scene.inodes() == expected
    scene.agree()


def test_a_box_that_cannot_be_read_is_left_alone(scene: Scene) -> None:
    """A newer version's, or more than we may have open: its slots are missing, and nothing of it is lost."""
    scene.guest("a")
    scene.guest("b")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.send(b"virtd.fdstore 2\nsomething else")
        scene.pid1.entries.append(type(scene.pid1.entries[0])("fdstore/box/7.3", os.dup(theirs.fileno()), False))
    scene.restart()
    assert [name for name in scene.store.names() if not name.startswith("qemu/")] == ["fdstore/box/7.3"]
    for number in range(30):
        scene.guest(f"g{number}")
    assert [name.partition(".")[0][-1] for name in scene.boxes()] == ["1", "7", "8"]
    scene.agree()
    with pytest.raises(BadName, match="reserved for the store"):
        put_new(scene.store, "fdstore/box/9.1")


def test_too_few_open_files_for_a_box(scene: Scene) -> None:
    scene.guest("a")
    expected = scene.guest("b")
    inherited = scene.pid1.hand_over()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, limit = scene.store, max(inherited) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        scene.store = scene.start(inherited)
        before.close()
        assert "fdstore/box/1.1" in scene.store.names()
        assert "qemu/b/log" not in scene.store
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    scene.restart()
    assert scene.inodes().items() >= expected.items()
    scene.agree()


def test_what_was_taken_out_stays_in_its_box(scene: Scene) -> None:
    scene.guest("a")
    expected = scene.guest("b")
    os.close(scene.store.take("qemu/b/log"))
    scene.guest("c")
    scene.restart()
    assert scene.inodes().items() >= expected.items()


def test_a_dump_from_before_a_change_of_others_counts(scene: Scene) -> None:
    scene.guest("a")
    scene.guest("b")
    before = entries(scene.pid1)
    scene.guest("c")
    difference = scene.store.verify(before)
    assert difference == Difference(missing=tuple(sorted(f"qemu/c/{slot}" for slot in SLOTS)))
    # Another socket under the box's name isn't the box.
    swapped = [entry if entry.name[:4] == "qemu" else entry._replace(ino=1) for entry in entries(scene.pid1)]
    assert set(scene.store.verify(swapped).missing) == {f"qemu/{name}/{slot}" for name in "bc" for slot in SLOTS}
    assert scene.store.verify(swapped).unknown == ("fdstore/box/1.2",)
    assert scene.store.held([StoredEntry("x/y", 1, 2)]) == {"x/y": [(1, 2)]}


def test_doubles_in_and_out_of_a_box_are_settled_by_identity(scene: Scene) -> None:
    """An older version puts a slot of its own beside the one in a box that it can't read."""
    scene.guest("a")
    expected = scene.guest("b")
    send = connect(scene.pid1.path)
    other = os.memfd_create("other")
    send("FDSTORE=1\nFDPOLL=0\nFDNAME=qemu/b/log", [other])
    scene.pid1.read()
    store = scene.restart()
    assert len(store.duplicates()["qemu/b/log"]) == 2
    status = os.fstat(other)
    boxed = expected["qemu/b/log"]
    assert store.resolve("qemu/b/log", status.st_dev, boxed).ino == boxed
    scene.agree()
    assert scene.inodes().items() >= expected.items()
    os.close(other)


@pytest.mark.parametrize("name", ["fdstore/box/1", "fdstore/box/0.1", "fdstore/box/1.01", "qemu/box/1.1", "1.1"])
def test_names_that_are_not_boxes(name: str) -> None:
    assert boxes.parse(name) is None
