# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on a running container. Each is recorded before it is carried out."""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from ... import errors
from ...guests import power
from ...hints import do
from ...model.state import State, require
from ...objects.turns import first_of, within
from ...text import span
from .first import number_of

if TYPE_CHECKING:
    from .container import Container

log = logging.getLogger(__name__)

KILL_LIMIT = 10.0  # seconds that the end may take once everything in it was killed
DYING = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGABRT", "SIGPWR")


async def shutdown(container: Container, timeout: float, by: str) -> bool:
    """Ask its first program to end and wait for it. Raises TimedOut; the container then runs on."""
    halt = _halt(container)

    async def allowed() -> None:
        require("shut down", container.name, container.state, container.noun)

    async def ask(_was: State) -> None:
        with contextlib.suppress(errors.InvalidState):  # it has just ended
            container.signal_init(halt)

    async def again() -> None:
        # systemd takes a second SIGRTMIN+3 for the first; others may not.
        if halt.startswith("SIGRTMIN"):
            with contextlib.suppress(errors.VirtdError):
                container.signal_init(halt)

    return await power.shutdown(container, timeout, by, require=allowed, ask=ask, again=again)


async def stop(container: Container, by: str) -> bool:
    """End everything in it at once. False if it wasn't running."""

    async def end_first() -> bool:
        # With the first program of a PID namespace the kernel ends all others in it; LXC then tidies up.
        with contextlib.suppress(errors.VirtdError):
            container.signal_init("SIGKILL")
            return await within(container.over, KILL_LIMIT)
        return False

    return await power.stop(
        container,
        by,
        gently=end_first,
        ladder=((signal.SIGKILL, KILL_LIMIT),),
        whole=True,
        hanging="Is a file system of its hanging?",
    )


async def kill(container: Container, number: int, by: str) -> bool:
    """Send a signal to its first program."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        if not signal.SIGRTMIN < number < signal.SIGRTMAX:
            raise errors.InvalidState(f"Cannot kill {container.name}: there is no signal {number}") from None
        name = f"SIGRTMIN+{number - signal.SIGRTMIN}"
    async with container.exclusive("send a signal to"):
        require("send a signal to", container.name, container.state, container.noun)
        if name in DYING:
            container.note(container.state, container.reason, data=container.ask("kill", by))
        container.signal_init(name)
    if number == signal.SIGKILL:
        await within(container.over, 2.0)
    return True


async def freeze(container: Container, by: str) -> bool:
    """Freeze all its processes. False if they were frozen."""
    async with container.exclusive("freeze"):
        require("freeze", container.name, container.state, container.noun)
        if container.state is State.PAUSED:
            return False
        await container.freeze(on=True)
        if container.alive:
            container.note(State.PAUSED, f"frozen by {by}")
        return True


async def thaw(container: Container, by: str) -> bool:
    """Thaw all its processes. False if they weren't frozen."""
    async with container.exclusive("thaw"):
        require("thaw", container.name, container.state, container.noun)
        if container.state is not State.PAUSED:
            return False
        await container.freeze(on=False)
        if container.alive:
            container.note(State.RUNNING, f"thawed by {by}")
        return True


async def reboot(container: Container, timeout: float, by: str) -> bool:
    """Ask its first program to reboot, and wait until it has. Raises TimedOut or InvalidState."""
    async with container.exclusive("reboot"):
        require("reboot", container.name, container.state, container.noun)
        definition = container.running_definition
        if definition is not None and definition.command:
            raise errors.InvalidState(
                f"Cannot reboot {container.name}: it runs a command, and no init that could be asked to",
                hint=do("stop", container.noun, container.name) + ", then start it.",
            )
        container.note(State.RUNNING, f"asked to reboot by {by}", data=container.ask("reboot", by))
        container.started.clear()
        # systemd(1): SIGRTMIN+5 reboots; for others it is Ctrl-Alt-Del.
        container.signal_init("SIGRTMIN+5" if _halt(container) == "SIGRTMIN+3" else "SIGINT")
        await first_of(container.started, container.over, limit=timeout)
        if container.over.is_set():
            raise errors.InvalidState(f"{container.name} ended instead of rebooting: {container.reason}")
        if not container.started.is_set():
            raise errors.TimedOut(
                f"{container.name} did not reboot within {span(timeout)}",
                hint="It runs on. " + do("stop", container.noun, container.name) + " ends it at once.",
            )
        container.note(State.RUNNING, f"rebooted by {by}", data=container.ask("", ""))
        return True


async def finish(container: Container) -> None:
    """After a restart of the daemon: finish what was asked of the container before."""
    request = container.request
    if request is None or not container.alive:
        return
    try:
        match request.verb:
            case "stop":
                await stop(container, request.by)
            case "shutdown" if container.state is State.STOPPING:
                await shutdown(container, container.settings.shutdown_timeout, request.by)
    except errors.VirtdError as exc:  # nobody waits for the answer any more
        log.warning("What a restart of virtd cut off: %s", exc)


def _halt(container: Container) -> str:
    """The signal that asks it to end. Raises InvalidState if there is none of that name."""
    name = container.kept.halt
    number_of(name)
    return name
