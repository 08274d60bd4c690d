# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first step of a start of the daemon: objects are taken over from their records, before there is a bus."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from .. import errors, files, journal
from ..messages import Message
from .protocol import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..records import Record, Records
    from .object import Object

log = logging.getLogger(__name__)


class Owner(Protocol):
    """The driver that has the records; see inventory.Inventory."""

    name: str
    noun: str
    taken_back: str
    records: Records
    problems: dict[str, Problem]

    @property
    def objects(self) -> Mapping[str, Object]: ...
    def half_written(self) -> list[str]: ...
    def take_back(self, name: str, record: Record) -> None: ...
    def left_alone(self, name: str, problem: Problem) -> None: ...


def restore(owner: Owner) -> None:
    """Take over the objects on record. No record can keep the daemon from the others."""
    for path in owner.half_written():
        with contextlib.suppress(errors.HostError):  # a file system that is read-only by now, perhaps
            files.remove(path)
    loaded = owner.records.load()
    if loaded.wrong:
        owner.problems["records"] = Problem(loaded.wrong, owner.taken_back)
        log.error("%s", loaded.wrong)
    for bad in loaded.quarantined:
        text = f"The record of {owner.noun} {bad.name} can't be read: {bad.reason}"
        owner.problems[f"record {bad.name}"] = Problem(text, f"It was moved to {bad.moved_to}. {owner.taken_back}")
        journal.send(
            text, message_id=Message.RECORD_QUARANTINED, level="error",
            VIRTD_DRIVER=owner.name, VIRTD_NAME=bad.name, VIRTD_FILE=bad.moved_to,
        )  # fmt: skip
    for name, record in loaded.records.items():
        try:
            owner.take_back(name, record)
        except Exception as exc:
            log.exception("%s can't be adopted", name)
            owner.left_alone(name, Problem(f"{name} could not be adopted: {exc}", "It was left alone."))


def recall(owner: Owner) -> None:
    """At the end of the step: restore the problems on record before anybody asks."""
    for one in [one for one in owner.objects.values() if one.record is not None]:
        try:
            one.recall()
        except Exception as exc:  # the others are still restored
            log.exception("The problems of %s can't be recalled", one.name)
            one.problems["internal"] = Problem(
                f"Its problems can't be recalled: {exc}", "This is a bug: see journalctl -u virtd."
            )
