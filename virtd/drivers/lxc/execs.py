# SPDX-License-Identifier: LGPL-2.1-or-later
"""Further commands in a running container: lxc-attach, each in a transient unit.

Only the client holds the command's terminal or pipes: no byte passes through the daemon, and neither side notices a
restart of it. The unit keeps the exit status until somebody has asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

from ... import errors, process
from ...children.programs import HOMELESS
from ...systemd import aliases
from ...systemd.state import CLD_EXITED, signal_name
from ...systemd.transient import UnitSpec
from . import config, prerequisites, sandbox
from .container import DRIVER, Container
from .first import children_of, status_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...systemd.units import Units

log = logging.getLogger(__name__)

PREFIX = "virtd-exec-lxc-"  # of the units; not the driver's own prefix, since they aren't containers
UNCLAIMED = 60.0  # seconds that an exit status waits for a client that has lost its connection


class Run(NamedTuple):
    """A command that was started. `fds`: the terminal, or the pipes of standard input, output and error."""

    unit: str
    fds: list[int]


class Result(NamedTuple):
    code: int | None
    signal: str | None


async def begin(
    container: Container, command: Sequence[str], environment: Mapping[str, str], *, terminal: bool
) -> Run:
    """Start `command`. Raises a VirtdError, with nothing left behind."""
    if not command or not all(word and "\0" not in word for word in (*command[:1], *environment)):
        raise errors.InvalidState(f"Cannot run a command in {container.name}: there is none")
    attach = prerequisites.program("lxc-attach")
    units = await container.shared.services.units()
    number = os.urandom(4).hex()
    unit, script = f"{PREFIX}{container.name}-{number}.service", f"{container.runtime}/exec-{number}"
    words = (
        attach, "-P", container.lxc_path(), "-n", container.name, "--clear-env",
        *(f"--set-var={key}={value}" for key, value in environment.items()), "--", *command,
    )  # fmt: skip
    # In a file, since systemd expands a unit's command line, and everybody may read it.
    try:
        with open(script, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"rm -f {config.quoted((script,))}\nexec {config.quoted(words)}\n")
    except OSError as exc:
        raise errors.HostError(f"Cannot write {script}: {exc.strerror}") from exc
    theirs, ours = _ends(terminal=terminal)
    spec = UnitSpec(
        name=unit,
        description=f"A command in container {container.name}",
        slice=f"virtd-{DRIVER}.slice",
        argv=("/bin/sh", script),
        environment=HOMELESS,
        properties=tuple(
            sandbox.entering(
                container.runtime, privileged=container.kept.privileged, toplevel=prerequisites.toplevel()
            )
        ),
        aliases=f"{script}.paths",
    )
    try:
        await units.start(spec, (theirs[0], theirs[1], theirs[2]))
    except BaseException:
        for fd in ours:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(script)
        with contextlib.suppress(errors.VirtdError):
            await units.stop(unit)  # it may run all the same, if PID 1 went before it could answer
            await units.collect(unit)
        raise
    finally:
        for fd in set(theirs):
            os.close(fd)
        aliases.remove(spec.aliases)  # its sandbox is set up by now, and nothing else will be run in it
    return Run(unit, ours)


def _ends(*, terminal: bool) -> tuple[list[int], list[int]]:
    """The command's standard input, output and error, and the client's ends of them. Raises HostError."""
    opened: list[int] = []
    try:
        if terminal:
            master, slave = os.openpty()
            return [slave, slave, slave], [master]
        for _ in range(3):
            opened += os.pipe2(os.O_CLOEXEC)
    except OSError as exc:
        for fd in opened:
            os.close(fd)
        raise errors.HostError(f"Cannot make pipes for a command: {exc.strerror}") from exc
    return [opened[0], opened[3], opened[5]], [opened[1], opened[2], opened[4]]


def belongs(unit: str, container: Container) -> bool:
    """Whether a client's token names a unit of this container."""
    number = unit.removeprefix(f"{PREFIX}{container.name}-").removesuffix(".service")
    return unit == f"{PREFIX}{container.name}-{number}.service" and len(number) == 8 and number.isalnum()


async def result(units: Units, unit: str) -> Result:
    """Wait for the command's end, then have systemd forget its unit. Raises NotFound."""
    state = await units.state(unit)
    if state is None:
        raise errors.NotFound("Nothing is known of this command any more")
    if state.running:
        await process.ended(state.main_pid, process.start_time(state.main_pid))
        state = await units.ended(unit)
    if state is None:
        raise errors.NotFound("Nothing is known of this command any more")
    await units.collect(unit)
    if state.exec_code == CLD_EXITED:
        # As in a shell: lxc-attach returns 128 plus the signal's number.
        killed = state.exec_status > 128 and state.exec_status - 128 in set(signal.Signals)
        return Result(state.exec_status, signal_name(state.exec_status - 128) if killed else None)
    return Result(None, signal_name(state.exec_status))


async def send(units: Units, unit: str, number: int) -> None:
    """Send a signal to the command. Raises NotFound."""
    state = await units.state(unit)
    if state is None or not state.running:
        raise errors.NotFound("The command has ended")
    main = state.main_pid
    inside = [pid for pid in children_of(main) if len(status_of(pid).get("NSpid", "").split()) > 1]
    for pid in inside:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                # From here on the number can't belong to another process.
                if status_of(pid).get("PPid") == str(main):
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
    if not inside:
        await units.kill(unit, number)


async def clear(units: Units) -> None:
    """At a start of the daemon: forget commands that have ended and whose clients are gone."""
    try:
        there = await units.list(f"{PREFIX}*.service")
    except errors.VirtdError as exc:
        log.warning("Commands in containers that have ended aren't forgotten: %s", exc)
        return
    for listed in there:
        if listed.sub != "running":
            await asyncio.sleep(UNCLAIMED)
            with contextlib.suppress(errors.VirtdError):
                await units.collect(listed.name)
