# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pipes of a child as FIFOs, which systemd opens by their paths.

PID 1 keeps each descriptor that a unit is given until the unit ends, and at each daemon-reload forks twice to close
it: three for each of a thousand children made a daemon-reload five times as long. A path costs nothing.

The directory is accessible to root only, because systemd opens the FIFOs as root. Once the child has its ends, links
to /dev/null replace the FIFOs: systemd opens the same paths for ExecStop=, and if it has dropped our ends of the
pipes (before 254, at a stop of virtd), it would block there for ever.
"""

from __future__ import annotations

import contextlib
import os

from .. import errors, files

NAMES = ("stdin", "stdout", "stderr")


def make(directory: str, names: tuple[str, ...]) -> list[int]:
    """Make a FIFO for each of NAMES in `directory`: the read and write end of each, like pipe2(2).

    Raises OSError, with nothing left behind.
    """
    opened: list[int] = []
    try:
        remove(directory)
        files.make_directory(os.path.dirname(directory), 0o700)
        os.mkdir(directory, 0o700)
        for name in names:
            path = f"{directory}/{name}"
            os.mkfifo(path, 0o600)
            # The read end comes first: opening a FIFO for writing blocks, or fails, as long as it has no reader.
            opened.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            opened.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            os.set_blocking(opened[-2], True)
    except OSError:
        for fd in opened:
            os.close(fd)
        remove(directory)
        raise
    return opened


def retire(directory: str) -> None:
    """To be called when the child has its ends, and again before the unit is stopped, in case that failed."""
    for name in NAMES:
        path = f"{directory}/{name}"
        with contextlib.suppress(OSError):
            if not os.path.islink(path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.symlink(os.devnull, path)


def remove(directory: str) -> None:
    """Idempotent; what can't be removed stays."""
    for name in NAMES:
        with contextlib.suppress(OSError):
            os.unlink(f"{directory}/{name}")
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def clear(directory: str) -> None:
    """Like `remove`, but raises HostError if something is left."""
    remove(directory)
    if os.path.lexists(directory):
        raise errors.HostError(f"{directory} can't be removed")


def owners(directory: str) -> list[tuple[str, str]]:
    """Driver and name of each child with a directory in `directory`."""
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    return [(driver, name) for driver, _, name in (entry.partition(".") for entry in sorted(entries))]


def fresh(directory: str) -> bool:
    """Whether the links don't exist yet: the child may not have opened its FIFOs, or they haven't even been made."""
    return not os.path.islink(f"{directory}/{NAMES[-1]}")
