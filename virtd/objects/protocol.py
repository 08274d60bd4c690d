# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host asks of every driver, and the types that they share.

A driver owns the objects of one kind: it takes them back at a start (restore, then reconcile), reads their
definitions (load_definitions), and carries out the host's operations. It knows child, records and model, but no front
end. What drivers ask of each other is in virtd.objects.peers.
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
    """Something that needs a person's attention."""

    text: str
    hint: Hint = ""


class Found(msgspec.Struct):
    """What a start of the daemon found, by name."""

    adopted: list[str] = []
    ended: list[str] = []
    rolled_back: list[str] = []
    rebuilt: list[str] = []


class Difference(msgspec.Struct, frozen=True):
    """A contradiction between units, slots, records, definitions and files.

    `kind` is a word: unit, process, slot, record, definition, directory, file, busy; of domains also user and
    hardware; of networks bridge, rules, interface; of pools pool, mount, volume. `object` is the object's name,
    or "" for what belongs to none. `repair` says what a repair does about it, and is empty if only a person can do
    anything. `repaired`: it was done.
    """

    kind: str
    object: str
    text: str
    repair: str = ""
    repaired: bool = False


class Startable(Protocol):
    """An object that can be started at boot."""

    name: str
    waits: Problem | None  # why its autostart failed so far, while it is tried again

    @property
    def active(self) -> bool: ...
    def wait_for(self, failed: Problem | None) -> None:
        """Have it wait for the next try of its autostart, which failed; None: it no longer waits."""

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
        """Second step, with systemd at hand: compare records with units, finish or undo what a crash interrupted."""

    def load_definitions(self) -> list[str]:
        """Read the definitions again; the names of those that changed. A bad one becomes a problem."""

    def read_definitions(self) -> Iterator[str]:
        """The same, bit by bit: after each the name of one that changed, or ""."""

    async def reload(self) -> None:
        """Restore what others may have removed, such as firewall rules. Nothing that runs is touched."""

    def to_autostart(self) -> list[Startable]:
        """What remains to be started at boot: it isn't active, and hasn't run and ended in this boot."""

    async def start(self, name: str, by: str) -> bool:
        """Start an object; False if it was active. Raises a VirtdError, with nothing left behind."""

    def grown(self, key: str) -> None:
        """The pump's callback: a watched log has grown. `key` is the name of one of this driver's slots."""

    def refused(self, key: str, problem: Problem | None) -> None:
        """The pump's callback: the log of a slot can't be written, or, without a problem, it can again."""

    def live(self) -> int:
        """How many objects are active."""

    def settled(self) -> bool:
        """Whether it is known of every object whether it runs."""

    def counts(self) -> dict[str, int]:
        """The number of objects in each state, including the states that none is in."""

    def troubles(self) -> list[tuple[str, Problem]]:
        """All problems, also of definitions and records, each with its object's name."""

    def bad_definitions(self) -> list[tuple[str, Problem]]:
        """Those `troubles` that concern definitions."""

    def known(self) -> Iterator[tuple[str, Reply | None]]:
        """All objects, in their short form; None for one whose state isn't known yet."""

    def describe_named(self, name: str) -> Reply:
        """The short form of an object for events; a Gone if it no longer exists."""

    async def close(self) -> None:
        """Release everything in this process; what runs, its slots and records stay."""


@runtime_checkable
class Comparing(Protocol):
    """A driver whose objects fsck can check."""

    async def compare(self, *, repair: bool) -> list[Difference]:
        """Compare what units, slots, records and files say about its objects; all differences are returned.

        With `repair`, repair what can be repaired without touching anything that runs.
        """


@runtime_checkable
class Looking(Protocol):
    """A driver whose objects may lose something without any notification."""

    async def look(self) -> None:
        """Look for losses, and report them as problems. This takes as long as a file system takes to answer."""


class Use(NamedTuple):
    """A file that a running object has open, or mounted, in which case nobody else may even read it."""

    user: str  # the object, as replies name it
    called: str  # the object, as a person calls it
    path: str
    identity: tuple[int, int]  # device and inode
    writes: bool
    mounted: bool = False


@runtime_checkable
class Using(Protocol):
    """A driver whose objects have files open that others may want to change or delete."""

    def images(self) -> list[Use]:
        """The open files, with their objects."""


Publish = Callable[[str, str], None]  # (event, name): "added", "removed", "changed", "ended"; "job" of a job


class Factory(Protocol):
    """The function `make` of a driver's module."""

    def __call__(self, services: Services, settings: Settings, publish: Publish, peers: Peers) -> Driver: ...
