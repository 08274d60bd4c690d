# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations on a running guest.

Each puts its request on record first, so that the guest's end is understood afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING

from ... import errors, files
from ...guests import power
from ...hints import do
from ...model.state import State, require
from ...objects.turns import first_of, within
from ...text import span
from .guest import REBOOT_GIVEN_UP
from .news import STANDSTILL

if TYPE_CHECKING:
    from ...paths import Paths
    from .guest import QemuGuest

log = logging.getLogger(__name__)

QUIT_LIMIT = 5.0  # seconds for QEMU to flush its disks and exit


async def shutdown(machine: QemuGuest, timeout: float, by: str) -> bool:
    """Press the power button and wait for the end. Raises TimedOut; the guest then runs on."""

    async def press(was: State) -> None:
        try:
            await machine.command("system_powerdown")
        except errors.MonitorError:
            if machine.alive:
                # The request may still reach it.
                machine.note(was, "could not be asked to shut down", data=machine.ask(power.SHUTDOWN_GIVEN_UP, by))
                raise

    async def again() -> None:
        # A guest that is still booting, or dozes, misses the first press.
        with contextlib.suppress(errors.MonitorError):
            await machine.command("system_powerdown")

    return await power.shutdown(
        machine, timeout, by, require=lambda: _require("shut down", machine), ask=press, again=again
    )


async def stop(machine: QemuGuest, by: str) -> bool:
    """End it at once, as pulling the plug does, but with QEMU's own buffers written. False if it wasn't running."""

    async def leave() -> bool:
        with contextlib.suppress(errors.MonitorError):
            await machine.command("quit", limit=2.0)
            return await within(machine.over, QUIT_LIMIT)
        return False

    return await power.stop(machine, by, gently=leave, hanging="Is its disk's storage hanging?")


async def kill(machine: QemuGuest, number: int, by: str) -> bool:
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
        await within(machine.over, 2.0)
    return True


async def suspend(machine: QemuGuest, by: str) -> bool:
    """Stop its CPUs. False if they were stopped."""
    async with machine.exclusive("suspend"):
        require("suspend", machine.name, machine.state)
        await _know(machine)
        if machine.state is State.PAUSED:
            return False
        await machine.command("stop")
        if machine.alive:
            machine.note(State.PAUSED, f"suspended by {by}")
        return True


async def resume(machine: QemuGuest, by: str) -> bool:
    """Continue its CPUs. False if they ran."""
    async with machine.exclusive("resume"):
        require("resume", machine.name, machine.state)
        await _know(machine)
        if machine.state is not State.PAUSED:
            return False
        stood_still = await machine.standstill.require_over()
        try:
            await machine.command("cont")
        except errors.MonitorError as exc:
            if machine.guest_off.is_set():
                hint = "It has powered off: " + do("stop", "domain", machine.name) + ", and start it."
                raise errors.InvalidState(exc.message, hint=hint) from exc
            raise
        if machine.alive and not machine.standstill.again:
            machine.note(State.RUNNING, f"resumed by {by}")
        if stood_still:
            await machine.standstill.require_none()
        return True


async def upgrade_machine(machine: QemuGuest) -> bool:
    """Let its next start use the machine type and CPU of the QEMU installed by then. False if it would anyway."""
    async with machine.exclusive("upgrade the machine of"):
        return machine.hardware.renew()


async def remove_state(machine: QemuGuest) -> bool:
    """Remove what the guest has stored in its machine: UEFI variables and what its TPM keeps. False if there is
    nothing. Raises InvalidState while it runs.
    """
    what = "remove the state of"
    async with machine.exclusive(what):
        require(what, machine.name, machine.state)
        await machine.over.wait()
        await machine.finishing.tidy(what)
        return await asyncio.to_thread(_remove_state, machine.shared.services.paths, machine.name, machine.uuid)


def _remove_state(paths: Paths, name: str, uuid: str) -> bool:
    found = [files.remove(paths.nvram(name, uuid, secure=secure)) for secure in (False, True)]
    directory = paths.tpm(name, uuid)
    if os.path.lexists(directory):
        files.remove_tree(directory)
        if os.path.lexists(directory):
            raise errors.HostError(f"{directory} can't be removed")
        found.append(True)
    with contextlib.suppress(OSError):  # there may be that of another guest, which had the name before
        os.rmdir(os.path.dirname(directory))
    return any(found)


async def _require(operation: str, machine: QemuGuest) -> None:
    """Raise InvalidState if `operation` makes no sense; for a guest that stands still, with the reason."""
    if machine.state is State.PAUSED and STANDSTILL in machine.problems:
        await machine.standstill.require_none_for(operation)
    require(operation, machine.name, machine.state)


async def _know(machine: QemuGuest) -> None:
    """Make sure that the known state is up to date before it decides anything."""
    if not machine.answers:
        await machine.ask_state()


async def reboot(machine: QemuGuest, *, force: bool, timeout: float, by: str) -> bool:
    """Restart the guest inside the same QEMU: by its power button, or with `force` by the reset button."""
    async with machine.exclusive("reboot"):
        await _require("reboot", machine)
        if force:
            await machine.command("system_reset")
            machine.note(State.RUNNING, f"reset by {by}", data=await machine.another_life())
            return True
        machine.note(State.RUNNING, f"asked to reboot by {by}", data=machine.ask("reboot", by))
        machine.guest_off.clear()
        try:
            await _press_and_reset(machine, timeout, by)
        except errors.MonitorError:
            if machine.alive:  # so that the next restart of virtd doesn't reboot it
                machine.note(State.RUNNING, "could not be asked to reboot", data=machine.ask(REBOOT_GIVEN_UP, by))
            raise
        return True


async def finish(machine: QemuGuest) -> None:
    """After a restart of the daemon: finish the operation on the guest that it interrupted, at whatever stage."""
    request = machine.request
    if request is None or not machine.alive:
        return
    limit = machine.settings.shutdown_timeout
    try:
        match request.verb:
            case "stop":
                await stop(machine, request.by)
            case "shutdown" if machine.state is State.STOPPING:
                await shutdown(machine, limit, request.by)
            case "reboot":
                await _press_and_reset(machine, limit, request.by)
    except errors.VirtdError as exc:  # nobody waits for the answer any more
        log.warning("What a restart of virtd interrupted: %s", exc)


async def _press_and_reset(machine: QemuGuest, timeout: float, by: str) -> None:
    """There is no reboot button: the guest is shut down while QEMU stays, and then reset. Raises TimedOut."""
    # After an interrupted reboot the guest may be off, or waiting for its reset, or not know of it at all.
    if await machine.ask_state() == "shutdown":
        machine.guest_off.set()
    await machine.command("set-action", {"shutdown": "pause"})
    try:
        async with asyncio.timeout(timeout):
            while not machine.guest_off.is_set():
                await machine.command("system_powerdown")
                await _off_or_over(machine, power.ASK_AGAIN)
    except TimeoutError:
        await machine.command("set-action", {"shutdown": machine.at_poweroff})
        # Still a request, so that the press of the button isn't taken for the host's own shutdown.
        machine.note(
            State.RUNNING,
            f"did not shut down to be rebooted within {span(timeout)}",
            data=machine.ask(REBOOT_GIVEN_UP, by),
        )
        raise errors.TimedOut(
            f"{machine.name} did not shut down within {span(timeout)} to be rebooted",
            hint="Reset it at once: " + do("reboot", "domain", machine.name, force=True) + ".",
        ) from None
    await _reset(machine, by)


async def _off_or_over(machine: QemuGuest, limit: float) -> None:
    """Wait at most `limit` seconds until the guest is off and QEMU stays. Raises InvalidState if QEMU has ended."""
    await first_of(machine.guest_off, machine.over, limit=limit)
    if machine.over.is_set():
        raise errors.InvalidState(f"{machine.name} ended instead of rebooting: {machine.reason}")


async def _reset(machine: QemuGuest, by: str) -> None:
    await machine.command("system_reset")
    await machine.command("set-action", {"shutdown": machine.at_poweroff})
    for _ in range(100):
        try:
            await machine.command("cont")
            break
        except errors.MonitorError:  # "Resetting the Virtual Machine is required", until its main loop has done it
            await asyncio.sleep(0.02)
    machine.guest_off.clear()
    if machine.alive:
        data = await machine.another_life()
        machine.note(State.RUNNING, f"rebooted by {by}", data=data | {"request": None})
