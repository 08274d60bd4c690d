# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container's first program, as a process of the host: proc(5), pid_namespaces(7)."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from ... import errors, process

if TYPE_CHECKING:
    from .kept import Init


def number_of(name: str) -> int:
    """A signal's number: SIGTERM, SIGRTMIN+3. Raises InvalidState."""
    word, _, more = name.partition("+")
    try:
        return int(signal.Signals[word]) + int(more or 0)
    except (KeyError, ValueError):
        raise errors.InvalidState(f"There is no signal {name}") from None


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; none if it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def children_of(pid: int) -> list[int]:
    """The children of a process that has one thread; none if it has ended."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return []


def is_first(pid: int, monitor: int) -> bool:
    """Whether `pid` is a child of LXC's monitor, and the first process of its PID namespace.

    Nothing written into a log can make another process of the host pass for one.
    """
    fields = status_of(pid)
    return fields.get("PPid") == str(monitor) and fields.get("NSpid", "").split()[-1:] == ["1"]


def find(monitor: int) -> int:
    """The first program of the container that `monitor` runs; 0 if there is none."""
    return next((pid for pid in children_of(monitor) if is_first(pid, monitor)), 0)


def send(init: Init | None, name: str, container: str) -> None:
    """Send it a signal by its name. Raises InvalidState if it doesn't run, HostError."""
    number = number_of(name)
    pidfd = process.open_pidfd(init.pid, init.start) if init is not None else None
    if pidfd is None:
        raise errors.InvalidState(f"{container} has no first program that could be sent a signal")
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    except OSError as exc:
        raise errors.HostError(f"Cannot send {name} to {container}: {exc.strerror}") from exc
    finally:
        os.close(pidfd)
