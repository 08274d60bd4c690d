# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which user and group IDs of the host a container has: whole ranges, none shared by two containers.

A range is chosen, after looking at definitions, owners of root file systems, and containers that run or are being
started or made, in one step that nothing can interrupt, since the event loop has one thread. A range that was
chosen for a container stays its own, in a table in /var/lib/virtd that is written before the range is used.
Containers that share a root file system, which nobody does by accident, share its IDs.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ... import errors, files, hostroot
from ...hints import do
from ...model import container as model
from .. import ids
from ..ids import Range
from . import grants
from .kept import Kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .container import Container

log = logging.getLogger(__name__)


class Claim(NamedTuple):
    """IDs that container `name` has or will have; `name` is "" for a root file system without one.

    `root`: see `root_of`.
    """

    name: str
    ids: Range
    root: str
    active: bool  # it runs, or is being started or made

    def in_the_way(self, other: Range, root: str) -> bool:
        return self.ids.meets(other.first, other.many) and not (root and root == self.root)


class Table(msgspec.Struct, frozen=True):
    """The file: by the container's UUID, the first ID and how many."""

    ids: dict[str, tuple[int, int]] = {}
    schema: int = 1


class Maps:
    """All ranges.

    `containers`: the driver's own table; `directory`: where root file systems are made; `table`: the file's path;
    `guests`: the IDs of domains.
    """

    def __init__(
        self,
        containers: Mapping[str, Container],
        directory: str,
        table: str,
        guests: Range = ids.GUESTS,
        *,
        etc: str = "/etc",
    ) -> None:
        self._containers = containers
        self._directory = directory
        self._path = table
        self._guests = guests
        self._etc = etc
        self._reserved: dict[str, Claim] = {}

    # Taking IDs

    def reserve(
        self, container: Container, definition: model.Container, root: str, source: str
    ) -> tuple[model.IdMap | None, bool]:
        """The map that a container is started with, and whether its files have to be shifted by an idmapped mount.

        None for a privileged one. The IDs are its own from now on until `release`, or until it ends if its record has
        them by then. Raises InvalidDefinition when the owner of the root file system isn't in the map, or another
        container has some of these IDs; HostError when none are left.
        """
        if definition.privileged:
            return None, False
        owner = os.stat(hostroot.seen(root)).st_uid
        found = definition.idmap or (model.IdMap(owner) if owner else self._own(container))
        grants.check(found, source, self._guests, etc=self._etc)
        if owner and not found.first <= owner < found.first + found.count:
            raise errors.InvalidDefinition(
                source,
                "idmap",
                f"expected IDs with {owner}, to whom {root} belongs, "
                f"got {found.first} to {found.first + found.count - 1}",
            )
        claim = _claim(container.name, found, root_of(definition), active=True)
        for other in self.claims(container.name):
            if other.active and other.in_the_way(claim.ids, claim.root):
                raise overlap(claim, other, source)
        self._reserved[container.name] = claim
        return found, not owner

    def reserve_new(self, name: str, count: int = model.IDS) -> model.IdMap:
        """IDs for a container that is being made. Raises HostError, or InvalidState for an impossible `count`."""
        if not 1 <= count <= model.ID_MAX:
            raise errors.InvalidState(f"Cannot create {name} with {count} IDs: expected 1 to {model.ID_MAX}")
        found = self._free(self.claims(name), count)
        self._reserved[name] = _claim(name, found, "", active=True)
        return found

    def release(self, name: str) -> None:
        self._reserved.pop(name, None)

    def _own(self, container: Container) -> model.IdMap:
        """The range chosen for it earlier, or a new one, which is recorded first."""
        claims = self.claims(container.name)
        table = self._load()
        if kept := table.ids.get(container.uuid):
            found = model.IdMap(*kept)
            if not any(claim.ids.meets(*kept) for claim in claims):
                return found
        found = self._free(claims)
        present = {one.uuid for one in self._containers.values()}
        others = {uuid: kept for uuid, kept in table.ids.items() if uuid in present}
        files.write(self._path, msgspec.json.encode(Table(others | {container.uuid: (found.first, found.count)})))
        return found

    def _free(self, claims: Iterable[Claim], count: int = model.IDS) -> model.IdMap:
        """The first free map of that size. Raises HostError."""
        taken = [claim.ids for claim in claims] + grants.others(self._etc, self._guests)
        taken += [Range("", *kept) for kept in self._load().ids.values()]
        for users in grants.own(self._etc, "subuid"):
            for groups in grants.own(self._etc, "subgid"):
                first = max(users.first, groups.first)
                both = Range("", first, min(users.last, groups.last) - first + 1)
                if (found := ids.free(both, count, taken, step=model.IDS)) is not None:
                    return model.IdMap(found, count)
        raise errors.HostError(
            f"There are no {count} IDs in a row left for another container",
            hint="Grant root more in /etc/subuid and /etc/subgid.",
        )

    def _load(self) -> Table:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=Table)
        except FileNotFoundError:
            return Table()
        except (OSError, msgspec.MsgspecError, ValueError) as exc:
            log.warning("%s can't be read, and IDs are chosen anew: %s", self._path, exc)
            return Table()

    # Who has which

    def claims(self, besides: str = "") -> list[Claim]:
        """Those of all containers but one, and of root file systems that belong to no container any more."""
        found = [claim for name, claim in self._reserved.items() if name != besides]
        roots = set()
        for name, one in self._containers.items():
            root = root_of(one.definition)
            roots.add(root)
            if name == besides:
                continue
            if one.alive and (mapped := Kept.of(one.record).ids) is not None:
                found.append(_claim(name, mapped, root_of(one.running_definition), active=True))
            if (defined := defined_ids(one.definition)) is not None:
                found.append(_claim(name, defined, root, active=False))
        for path, owner in _owners(self._directory):
            if path not in roots:
                found.append(Claim("", Range(path, owner, model.IDS), path, active=False))
        return found

    def check(self, definition: model.Container, source: str) -> None:
        """Refuse a new definition whose IDs people or other containers have. Raises InvalidDefinition."""
        if definition.idmap is not None:
            grants.check(definition.idmap, source, self._guests, etc=self._etc)
        if (wanted := defined_ids(definition)) is None:
            return
        claim = _claim(definition.name, wanted, root_of(definition), active=False)
        for other in self.claims(definition.name):
            if other.in_the_way(claim.ids, claim.root):
                raise overlap(claim, other, source)

    def overlaps(self) -> dict[str, Claim]:
        """By container, one that has some of the same IDs: earlier versions allowed that, and files are edited."""
        found: dict[str, Claim] = {}
        claims = sorted(self.claims(), key=lambda claim: claim.ids.first)
        for at, claim in enumerate(claims):
            for other in claims[at + 1 :]:
                if other.ids.first > claim.ids.last:
                    break
                if other.name != claim.name and other.in_the_way(claim.ids, claim.root):
                    found.setdefault(claim.name, other)
                    found.setdefault(other.name, claim)
        found.pop("", None)
        return found


HINT = (
    "Each needs IDs of its own: "
    + do("create", "container", "NEW", image="ROOTFS")
    + " makes a copy that has some, of the root file system of a container that doesn't run; or change [idmap] and "
    "the files' owners."
)


def overlap(claim: Claim, other: Claim, source: str) -> errors.InvalidDefinition:
    return errors.InvalidDefinition(
        source,
        "idmap",
        f"expected IDs that nobody else has, got {claim.ids.first} to {claim.ids.last}, "
        f"of which {other.ids.owner} has some ({other.ids.first} to {other.ids.last})",
        hint=HINT,
    )


def defined_ids(definition: model.Container | None) -> model.IdMap | None:
    """The IDs that a definition has by itself or by the owner of its root file system."""
    if definition is None or definition.privileged:
        return None
    if definition.idmap is not None:
        return definition.idmap
    try:
        owner = os.lstat(hostroot.seen(definition.directory)).st_uid if definition.directory is not None else 0
    except OSError:
        return None
    return model.IdMap(owner) if owner else None


def root_of(definition: model.Container | None) -> str:
    """What its root file system is: a directory, or POOL/VOLUME."""
    if definition is None:
        return ""
    if (root := definition.volume) is not None:
        return f"{root.pool}/{root.volume}"
    return os.path.realpath(definition.directory or "")


def _claim(name: str, found: model.IdMap, root: str, *, active: bool) -> Claim:
    return Claim(name, Range(f"container {name}", found.first, found.count), root, active)


def _owners(directory: str) -> list[tuple[str, int]]:
    """The root file systems in `directory`, each with the first ID of its owner's range."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.path, entry.stat(follow_symlinks=False).st_uid) for entry in entries]
    except OSError:
        return []
    return [(os.path.realpath(path), owner) for path, owner in found if owner]
