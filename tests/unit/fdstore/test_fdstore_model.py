# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any sequence of puts, drops, crashes and restarts, against a dict that says what must be there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.doubles.fake_pid1 import FakePid1
from virtd.fdstore import AlreadyStored, MissingSlot, Store, StoredEntry, StoreFull
from virtd.fdstore.notify import connect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

# Few and alike, so that they meet; the prefixes are each other's beginnings.
NAMES = st.sampled_from(["q/a/in", "q/a/out", "q/ab/in", "q/a", "q/ab", "l/a/in"])
MOST = 4


class Killed(BaseException):
    """The daemon ends here."""


class Slots(RuleBasedStateMachine):
    direct: int | None = None
    most = MOST

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.pid1 = FakePid1(Path(self.directory.name), store_max=MOST)
        self.send = connect(self.pid1.path)
        # How many messages the process gets out before it is killed; None: it isn't.
        self.messages_left: int | None = None
        self.taken: list[int] = []
        self.expected: dict[str, int] = {}

    @initialize()
    def first_start(self) -> None:
        self.store = self.start({})

    def start(self, inherited: dict[int, str]) -> Store:
        return Store.from_environment(
            self.pid1.environment(), inherited=inherited, notify=self.transport, direct=self.direct
        )

    def transport(self, text: str, fds: Sequence[int]) -> None:
        if self.messages_left is not None:
            if not self.messages_left:
                raise Killed
            self.messages_left -= 1
        self.send(text, fds)
        # A store that sends much meets a short queue; this manager isn't slow.
        self.pid1.read()

    def new_file(self, name: str) -> int:
        """Put a file of its own; returns its inode."""
        fd = os.memfd_create("slot")
        try:
            self.store.put(name, fd)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    @rule(name=NAMES)
    def put(self, name: str) -> None:
        if name not in self.expected and len(self.expected) == self.most:
            with pytest.raises(StoreFull):
                self.new_file(name)
        else:
            self.expected[name] = self.new_file(name)

    @rule(name=NAMES, other=NAMES)
    def put_what_is_there(self, name: str, other: str) -> None:
        try:
            fd = self.store.get(name)
        except MissingSlot:
            return
        if other == name:
            self.store.put(other, fd)
            if len(self.expected) == self.most:
                # PID 1 looks for room before it sees that it has this one; it's only a line in its log.
                assert self.pid1.warnings.pop() == "full"
        elif other in self.expected or len(self.expected) < self.most:
            with pytest.raises(AlreadyStored):
                self.store.put(other, fd)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        self.store.drop(name)
        self.expected.pop(name, None)

    @rule(prefix=st.sampled_from(["q", "q/a", "q/ab/", "l/", "x"]))
    def drop_prefix(self, prefix: str) -> None:
        parts = prefix.rstrip("/").split("/")
        gone = sorted(name for name in self.expected if name.split("/")[: len(parts)] == parts)
        assert self.store.drop_prefix(prefix) == gone
        for name in gone:
            del self.expected[name]

    @rule(name=NAMES)
    def take(self, name: str) -> None:
        try:
            fd = self.store.take(name)
        except MissingSlot:
            return
        self.taken.append(fd)
        assert os.fstat(fd).st_ino == self.expected[name]

    @rule(random=st.randoms(use_true_random=False))
    def restart(self, random: Random) -> None:
        """PID 1 passes the descriptors in any order; a daemon-reload turns it around."""
        random.shuffle(self.pid1.entries)
        inherited = self.pid1.hand_over()
        self.store.close()
        self.store = self.start(inherited)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), messages=st.integers(0, 3), replace=st.booleans())
    def killed_in_the_middle(self, data: st.DataObject, messages: int, replace: bool) -> None:
        """SIGKILL after any number of messages: what was not being changed is there, what was is old, new or gone."""
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.messages_left = messages
        old, new = self.expected[name], None
        alone = self.store.kept_as(name) == name
        try:
            if replace:
                new = self.new_file(name)
            else:
                self.store.drop_prefix(name)
        except Killed:
            pass
        self.messages_left = None
        self.store.close()
        self.store = self.start(self.pid1.hand_over())
        self.store.tidy()
        found = self.store.slots()
        for other in self.expected.copy():
            changing = other == name or (not replace and other.startswith(name + "/"))
            if other in found and not (changing and replace):
                assert found[other].ino == self.expected[other]
            elif other in found:
                assert messages != 1 or not alone, "it was removed and not put yet"
                assert (found[other].ino == old) == (messages == 0)
                self.expected[other] = found[other].ino
            else:
                assert changing
                assert messages > 0
                assert new is None
                assert alone or not replace, "in a box nothing is ever gone meanwhile"
                del self.expected[other]

    @invariant()
    def everything_agrees(self) -> None:
        assert self.store.names() == sorted(self.expected)
        assert len(self.pid1.names()) == self.store.budget().entries
        assert {name: slot.ino for name, slot in self.store.slots().items()} == self.expected
        assert not self.store.verify(StoredEntry.from_dump(entry) for entry in self.pid1.dump())
        assert self.store.budget().used == len(self.expected)
        assert self.store.duplicates() == {}
        assert self.pid1.warnings == []
        for slot in self.store.slots().values():
            assert slot.fd < 0 or os.fstat(slot.fd).st_ino == slot.ino

    def teardown(self) -> None:
        self.store.close()
        for fd in self.taken:
            os.close(fd)
        self.pid1.close()
        self.directory.cleanup()


class Boxed(Slots):
    """The same with one slot by itself and the others in boxes, in which there is room for all."""

    direct = 1
    most = 1000


TestSlots = Slots.TestCase
TestBoxed = Boxed.TestCase
TestSlots.settings = TestBoxed.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
