# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person can do to a guest that is there.

Each tells the record first, so that the guest's end is understood afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING

from ... import errors
from ...model.domain import OnPoweroff
from ...model.state import State, require

if TYPE_CHECKING:
    from .machine import Machine

QUIT_LIMIT = 5.0  # seconds for QEMU to flush its disks and exit when told to
TERM_LIMIT = 5.0
PRESS_AGAIN = 5.0
KILL_LIMIT = 10.0


async def shutdown(machine: Machine, timeout: float, by: str) -> bool:
    """Press the power button and wait for the end. Raises TimedOut; the guest then runs on."""
    deadline = time.monotonic() + timeout
    async with machine.exclusive("shut down"):
        require("shut down", machine.name, machine.state)
        was = machine.state
        machine.note(State.STOPPING, f"asked to shut down by {by}", data=machine.ask("shutdown", by))
        try:
            await machine.command("system_powerdown")
        except errors.MonitorError:
            if machine.alive:
                machine.note(was, "could not be asked to shut down")
                raise
    while (left := deadline - time.monotonic()) > 0:
        if await _over(machine, min(left, PRESS_AGAIN)):
            return True
        # A guest that is still booting, or dozes, misses the first press.
        with contextlib.suppress(errors.MonitorError):
            if machine.state is State.STOPPING:
                await machine.command("system_powerdown")
    async with machine.exclusive("shut down"):
        if machine.state is State.STOPPING and machine.child is not None and machine.child.alive():
            machine.note(State.RUNNING, f"did not shut down within {timeout:.0f} s")
    raise errors.TimedOut(
        f"{machine.name} did not shut down within {timeout:.0f} s",
        hint=f"It runs on. Give it more time with --timeout, or end it at once: virtctl stop {machine.name}.",
    )


async def stop(machine: Machine, by: str) -> bool:
    """End it at once, as pulling the plug does, but with QEMU's own buffers written. False if it wasn't running."""
    async with machine.exclusive("stop"):
        if not machine.alive:
            return False
        machine.note(State.STOPPING, f"being stopped by {by}", data=machine.ask("stop", by))
        with contextlib.suppress(errors.MonitorError):
            await machine.command("quit", limit=2.0)
            if await _over(machine, QUIT_LIMIT):
                return True
        units = await machine.shared.services.units()
        for number, limit in ((signal.SIGTERM, TERM_LIMIT), (signal.SIGKILL, KILL_LIMIT)):
            with contextlib.suppress(errors.NotFound):
                await units.kill(machine.unit, number)
            if await _over(machine, limit):
                return True
    raise errors.TimedOut(
        f"{machine.name} could not be ended, not even by SIGKILL", hint="Is its disk's storage hanging?"
    )


async def kill(machine: Machine, number: int, by: str) -> bool:
    """Send a signal to QEMU."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        raise errors.InvalidState(f"Cannot kill {machine.name}: there is no signal {number}") from None
    async with machine.exclusive("send a signal to"):
        require("send a signal to", machine.name, machine.state)
        if name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGABRT"):
            machine.note(machine.state, machine.reason, data=machine.ask("kill", by))
        units = await machine.shared.services.units()
        await units.kill(machine.unit, number)
    if number == signal.SIGKILL:
        await _over(machine, 2.0)
    return True


async def suspend(machine: Machine, by: str) -> bool:
    """Stop its CPUs. False if they were."""
    async with machine.exclusive("suspend"):
        require("suspend", machine.name, machine.state)
        if machine.state is State.PAUSED:
            return False
        await machine.command("stop")
        if machine.alive:
            machine.note(State.PAUSED, f"suspended by {by}")
        return True


async def resume(machine: Machine, by: str) -> bool:
    """Let its CPUs go on. False if they did."""
    async with machine.exclusive("resume"):
        require("resume", machine.name, machine.state)
        if machine.state is not State.PAUSED:
            return False
        await machine.command("cont")
        if machine.alive:
            machine.note(State.RUNNING, f"resumed by {by}")
        return True


async def reboot(machine: Machine, *, force: bool, timeout: float, by: str) -> bool:
    """Restart the guest inside the same QEMU: by its power button, or with `force` by the reset button."""
    async with machine.exclusive("reboot"):
        require("reboot", machine.name, machine.state)
        if force:
            await machine.command("system_reset")
            machine.note(State.RUNNING, f"reset by {by}")
            return True
        machine.note(State.RUNNING, f"asked to reboot by {by}", data=machine.ask("reboot", by))
        machine.guest_off.clear()
        # There is no reboot button: the guest is shut down with QEMU told to stay, and then reset.
        await machine.command("set-action", {"shutdown": "pause"})
        try:
            await machine.command("system_powerdown")
            async with asyncio.timeout(timeout):
                while not await _off_or_over(machine, PRESS_AGAIN):
                    await machine.command("system_powerdown")
            await _reset(machine, by)
        except TimeoutError:
            await machine.command("set-action", {"shutdown": _poweroff(machine)})
            # A request still, so that the button in the event journal isn't taken for the host's own shutdown.
            machine.note(
                State.RUNNING,
                f"did not shut down to be rebooted within {timeout:.0f} s",
                data=machine.ask("reboot given up", by),
            )
            raise errors.TimedOut(
                f"{machine.name} did not shut down within {timeout:.0f} s to be rebooted",
                hint=f"Reset it at once: virtctl reboot --force {machine.name}.",
            ) from None
        return True


async def finish_reboot(machine: Machine) -> None:
    """After a restart of the daemon: a reboot that was under way is brought to its end, whatever stage it was in."""
    request = machine.request
    if request is None or request.verb != "reboot" or not machine.alive:
        return
    if machine.guest_off.is_set():
        await _reset(machine, request.by)
    elif machine.monitor is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(machine.shared.settings.shutdown_timeout):
                while not await _off_or_over(machine, PRESS_AGAIN):
                    pass
            await _reset(machine, request.by)


async def _off_or_over(machine: Machine, limit: float) -> bool:
    """Whether the guest is off and QEMU waits, within `limit` seconds.

    Raises InvalidState when all of it has ended instead.
    """
    events = [asyncio.ensure_future(event.wait()) for event in (machine.guest_off, machine.over)]
    try:
        await asyncio.wait(events, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for event in events:
            event.cancel()
    if machine.over.is_set():
        raise errors.InvalidState(f"{machine.name} ended instead of rebooting: {machine.reason}")
    return machine.guest_off.is_set()


async def _reset(machine: Machine, by: str) -> None:
    await machine.command("system_reset")
    await machine.command("set-action", {"shutdown": _poweroff(machine)})
    for _ in range(100):
        try:
            await machine.command("cont")
            break
        except errors.MonitorError:  # "Resetting the Virtual Machine is required", until its main loop has done it
            await asyncio.sleep(0.02)
    machine.guest_off.clear()
    if machine.alive:
        machine.note(State.RUNNING, f"rebooted by {by}", data=machine.ask("", ""))


def _poweroff(machine: Machine) -> str:
    domain = machine.running_definition
    return "pause" if domain is not None and domain.on_poweroff is OnPoweroff.KEEP else "poweroff"


async def _over(machine: Machine, limit: float) -> bool:
    """Whether it ended within `limit` seconds."""
    try:
        async with asyncio.timeout(limit):
            await machine.over.wait()
    except TimeoutError:
        return False
    return True
