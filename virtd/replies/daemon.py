# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from . import Problem, Reply

if TYPE_CHECKING:
    from .storage import Job


class Recovered(Reply, frozen=True):
    """What the last start of the daemon found; names are those of domains, or DRIVER/NAME."""

    objects: Annotated[int, "how many were running"]
    ms: Annotated[float, "milliseconds from the process's first instruction until they were recovered"]
    adopted: list[str]
    ended: Annotated[list[str], "while no daemon ran"]
    rolled_back: Annotated[list[str], "starts that were interrupted"]
    rebuilt: Annotated[list[str], "whose records were lost"]


class Budget(Reply, frozen=True):
    """How full the FD store is."""

    used: Annotated[int, "descriptors"]
    max: Annotated[int, "descriptors"]
    limited_by: Annotated[str, "the setting that has to be raised for more"]


class Status(Reply, frozen=True):
    """The daemon."""

    version: str
    pid: int
    since: Annotated[str, "when it started"]
    recovered: Recovered
    budget: Budget
    domains: Annotated[dict[str, int], "how many are in each state"]
    objects: Annotated[dict[str, dict[str, int]], "the same for every driver in use"]
    jobs: list[Job]
    problems: list[Problem]
    degraded: Annotated[list[str], "what this host or this systemd doesn't offer"]


class Slot(Reply, frozen=True):
    """A descriptor that systemd keeps."""

    name: Annotated[str, 'such as "qemu/web1/stdin"']
    kept_as: Annotated[str, "the entry of systemd's store: the slot's own name, or a box that it shares with others"]
    what: Annotated[str, 'a path, or as the kernel calls it: "pipe:[4711]"']


class Difference(Reply, frozen=True):
    """Where units, slots, records, definitions and files disagree."""

    kind: Annotated[str, "unit, process, slot, record, definition, file, bridge, rules, volume and the like"]
    object: Annotated[str, 'such as "qemu/web1"; empty if it concerns no object']
    text: str
    repair: Annotated[str, "what Repair does about it; empty if only a person can"]
    repaired: bool


class Checked(Reply, frozen=True):
    """A comparison, or a repair."""

    differences: list[Difference]
    objects: Annotated[int, "how many were examined"]


class Reloaded(Reply, frozen=True):
    """The definitions were read again."""

    changed: Annotated[list[str], "names of domains, or DRIVER/NAME"]
    problems: Annotated[list[Problem], "definitions that couldn't be read"]
