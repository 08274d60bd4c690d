# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the files that running guests have open are still whole, and where everybody looks for them.

Deleting the disk of a running guest has no visible effect, not even inside the guest, until it is off and its data is
lost. From a truncated one the guest reads zeros, or gets errors, where its data was.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ... import journal, reach
from ...messages import Message
from ...objects.protocol import Difference, Problem
from .news import LOST

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .guest import QemuGuest

LOOK = 10.0  # seconds that a file system may take to answer
GONE = "Copy what is in it, from inside the guest or with QEMU's drive-backup, before the guest is stopped."
CUT_SHORT = " was truncated to "
CUT = "Stop the guest and restore the disk from a backup: what was behind its end is lost."


class File(NamedTuple):
    """An open file. `identity`: device and inode; `size`: bytes at the guest's start, or 0 if unknown."""

    identity: tuple[int, int]
    path: str
    size: int = 0


def wrong(files: Iterable[File]) -> list[str]:
    """What is wrong with those that have changed; those that can't be examined are left out."""
    found = []
    for identity, path, size in files:
        try:
            status = reach.look(path, reach.Trust.ANYBODY)
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{path} was deleted, and the guest has it open")
        except OSError:
            continue
        else:
            if (status.st_dev, status.st_ino) != identity:
                found.append(f"{path} is another file by now, and the guest has the old one open")
            elif status.st_size < size:
                found.append(f"{path}{CUT_SHORT}{status.st_size} of {size} bytes under the guest")
    return found


def _problem(text: str) -> Problem:
    return Problem(text, CUT if all(CUT_SHORT in one for one in text.split("; ")) else GONE)


def opened(machine: QemuGuest) -> list[File]:
    """By its record; older ones have no list, and what the definition names by now proves nothing."""
    if not isinstance(machine.data.get("images"), list):
        return []
    sizes = machine.data.get("sizes")
    known = sizes if isinstance(sizes, dict) else {}
    hardware = machine.hardware.running
    # An upgrade of the host exchanges UEFI's program, which QEMU has read by then and nobody wants back.
    program = hardware.firmware.program if hardware is not None and hardware.firmware is not None else ""
    return [
        File(identity, path, int(known.get(path, 0)))
        for identity, (path, _writes) in machine.images().items()
        if path != program
    ]


async def look(machines: Iterable[QemuGuest]) -> None:
    """Make lost files problems of their guests, and log those that are new."""
    wanted = {machine.name: (machine, opened(machine)) for machine in machines if machine.alive}
    found = await asyncio.to_thread(lambda: {name: wrong(files) for name, (_, files) in wanted.items()})
    for name, (machine, _) in wanted.items():
        if not machine.alive:
            continue
        text = "; ".join(found[name])
        if text == _recorded(machine):
            continue
        _record(machine, text)
        if text:
            machine.problems[LOST] = _problem(text)
            journal.send(f"{name}: {text}", message_id=Message.DISK_LOST, level="error", **machine.fields())
        else:
            machine.problems.pop(LOST, None)


def recall(machine: QemuGuest) -> None:
    """Restore the problem that an earlier daemon has found, until the next look."""
    if text := _recorded(machine):
        machine.problems[LOST] = _problem(text)


def _recorded(machine: QemuGuest) -> str:
    """What was found last. It is on record so that the next daemon knows of it, and doesn't log it again."""
    return str(machine.data.get(LOST, ""))


def _record(machine: QemuGuest, text: str) -> None:
    data = {key: value for key, value in machine.data.items() if key != LOST}
    machine.keep(data=data | ({LOST: text} if text else {}))


async def differences(machines: Iterable[QemuGuest]) -> list[Difference]:
    """The same for fsck."""
    running = [machine for machine in machines if machine.alive]
    try:
        async with asyncio.timeout(LOOK):
            await look(running)
    except TimeoutError:
        return [
            Difference("file", "", "the files of running guests can't be looked at: a file system doesn't answer")
        ]
    return [
        Difference("file", machine.name, machine.problems[LOST].text)
        for machine in running
        if LOST in machine.problems
    ]
