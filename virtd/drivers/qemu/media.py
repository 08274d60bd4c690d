# SPDX-License-Identifier: LGPL-2.1-or-later
"""CD-ROM drives whose image doesn't exist when a guest starts: they are empty, and that is a problem while it runs.

The definition stays as it is, so the next start finds the image if it exists by then. The record names the empty
drives, for the next daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ... import journal, reach
from ...messages import Message
from ...objects.protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...model.domain import Domain

MEDIA = "media"  # in the data of a record, by key of the drive: the path; and the name of the problem
HINT = "Put the image there and restart the domain, or remove the path from its definition: a drive may be empty."


class Owner(Protocol):
    """The domain; see guest.QemuGuest."""

    name: str
    problems: dict[str, Problem]

    @property
    def data(self) -> dict[str, Any]: ...
    def fields(self) -> dict[str, str]: ...


def missing(domain: Domain) -> dict[str, str]:
    """The path of each image that doesn't exist, by key of its drive; of drives that can be empty only."""
    found = {}
    for index, cdrom in enumerate(domain.cdrom):
        if cdrom.path is None or not domain.can_be_empty(cdrom):
            continue
        try:
            reach.look(cdrom.path, reach.Trust.ANYBODY)
        except (FileNotFoundError, NotADirectoryError):
            found[f"cdrom[{index}]"] = cdrom.path
        except OSError:
            continue  # the start is refused, and says why
    return found


def without(domain: Domain, absent: Mapping[str, str]) -> Domain:
    """The domain with these drives empty."""
    drives = (
        msgspec.structs.replace(cdrom, path=None) if f"cdrom[{index}]" in absent else cdrom
        for index, cdrom in enumerate(domain.cdrom)
    )
    return msgspec.structs.replace(domain, cdrom=tuple(drives))


def recall(machine: Owner) -> None:
    """Make a problem of the empty drives that are on record."""
    if absent := machine.data.get(MEDIA):
        text = "; ".join(f"{key} is empty, no such file: {path}" for key, path in absent.items())
        machine.problems[MEDIA] = Problem(text, HINT)


def report(machine: Owner) -> None:
    """The same for a guest that has just started, with an entry in the journal."""
    recall(machine)
    if (problem := machine.problems.get(MEDIA)) is not None:
        text = f"{machine.name}: {problem.text}"
        journal.send(text, message_id=Message.MEDIUM_MISSING, level="warning", **machine.fields())
