# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host asks of every driver, and the words that they share.

A driver owns the objects of one kind: it takes them back at a start (restore, then reconcile), reads what they shall
be (load_definitions), and carries out what the host's operations ask of it. It knows child, records and model, and
never a front end. What drivers ask of each other is in virtd.objects.peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import msgspec

from ..hints import Hint

if TYPE_CHECKING:
    from ..children.child import Services
    from ..model.settings import Settings
    from ..replies import Reply
    from .peers import Peers


class Problem(msgspec.Struct, frozen=True):
    """Something that a person should look at."""

    text: str
    hint: Hint = ""


class Found(msgspec.Struct):
    """What a start of the daemon found, by name."""

    adopted: list[str] = []
    ended: list[str] = []
    rolled_back: list[str] = []
    rebuilt: list[str] = []


class Difference(msgspec.Struct, frozen=True):
    """Where units, slots, records, definitions and files don't tell the same.

    `kind` is a word: unit, process, slot, record, definition, directory, file, busy; of domains also user and
    hardware; of networks bridge, rules, interface; of pools pool, mount, volume. `object` is the object's name,
    or "" for what is no object's. `repair` says what a repair does about it; empty if only a person can. `repaired`:
    it did.
    """

    kind: str
    object: str
    text: str
    repair: str = ""
    repaired: bool = False


class Startable(Protocol):
    """An object, as whoever starts it at boot sees it."""

    name: str
    waits: Problem | None  # why it couldn't be autostarted so far, while that is tried again

    @property
    def active(self) -> bool: ...
    def wait_for(self, failed: Problem | None) -> None:
        """Have it wait, for the reason why its start failed; None: no longer."""

    def fields(self) -> dict[str, str]:
        """The journal fields of this object."""


class Driver(Protocol):
    """One driver. All methods are called on the event loop."""

    name: str  # the first part of its slots' names and of its units' names: "qemu"
    noun: str  # what a person calls one of its objects: "domain"
    found: Found

    def restore(self) -> None:
        """First step of a start: records, slots, pumps, definitions; no bus yet."""

    async def reconcile(self) -> None:
        """Second step, with systemd at hand: see each record beside its unit, finish or undo what a crash cut off."""

    def load_definitions(self) -> list[str]:
        """Read the definitions again; the names of those that changed. A bad one is a problem of its own."""

    def read_definitions(self) -> Iterator[str]:
        """The same, bit by bit: after each the name of one that changed, or ""."""

    async def reload(self) -> None:
        """Apply again what others may have removed, such as firewall rules. Nothing that runs is touched."""

    def to_autostart(self) -> list[Startable]:
        """What is to be started at boot and hasn't been: it isn't active, nor has it run and ended in this boot."""

    async def start(self, name: str, by: str) -> bool:
        """Start an object; False if it was active. Raises a VirtdError, with nothing left behind."""

    def grown(self, key: str) -> None:
        """The pump's word that bytes landed in a log that is watched: `key` is a slot's name of this driver."""

    def refused(self, key: str, problem: Problem | None) -> None:
        """The pump's word that the log of a slot can't be written, or, without a problem, that it can again."""

    def live(self) -> int:
        """How many objects have something running."""

    def settled(self) -> bool:
        """Whether it is known of every object what became of it."""

    def counts(self) -> dict[str, int]:
        """The number of objects in each state, those without any included."""

    def troubles(self) -> list[tuple[str, Problem]]:
        """What is wrong: the object's name and the problem, of definitions and records as well as of what runs."""

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        """Those of `troubles` that are about definitions."""

    def known(self) -> Iterator[tuple[str, Reply | None]]:
        """All objects, in their short form; None for one whose state isn't known yet."""

    def describe_named(self, name: str) -> Reply:
        """The short form of an object for events; a Gone when it is gone."""

    async def close(self) -> None:
        """Let go of everything in this process; what runs, its slots and records stay."""


@runtime_checkable
class Comparing(Protocol):
    """A driver that can be asked by fsck."""

    async def compare(self, *, repair: bool) -> list[Difference]:
        """Compare what there is of its objects in all places. With `repair`, mend what can be mended without touching
        anything that runs; what was found is told all the same.
        """


@runtime_checkable
class Looking(Protocol):
    """A driver whose objects may lose something that nobody tells of."""

    async def look(self) -> None:
        """See what is there. It may take as long as a file system takes to answer; problems tell what is wrong."""


class Use(NamedTuple):
    """A file that an object which runs has open, or mounted: then nobody else may have it, not even to read."""

    user: str  # as replies name the object
    called: str  # as a person does
    path: str
    identity: tuple[int, int]  # device and inode
    writes: bool
    mounted: bool = False


@runtime_checkable
class Using(Protocol):
    """A driver whose objects have files open that others may want to change or to delete."""

    def images(self) -> list[Use]:
        """Which object has which file."""


Publish = Callable[[str, str], None]  # (event, name): "added", "removed", "changed", "ended"; "job" of a job


class Factory(Protocol):
    """What each driver's module has as `make`."""

    def __call__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver: ...
