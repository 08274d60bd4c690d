# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's two connections to D-Bus, reopened whenever they are lost: one to systemd, one for org.virtd1."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, NoReturn

from . import errors, later
from .hints import do
from .objects.turns import within
from .text import span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from .api import dbus
    from .api.limits import Limits
    from .host import Host
    from .systemd.bus import Bus
    from .systemd.units import Units

log = logging.getLogger("virtd")

CLIENT_NAME = "org.virtd1.Client"  # the bus's policy forbids sending anything to this name
BUS_RETRY = 1.0
NAME_RETRY = 10.0
GRACE = 0.05  # seconds after READY=1 for answering clients that waited for it, before connecting to D-Bus
UNITS_LIMIT = 20.0  # seconds that an operation waits for D-Bus to be connected (again)
HANG_LIMIT = 80.0  # and so much longer if the bus is connected but hangs, see bus.PATIENCE
HUNG = 5.0  # seconds to connect, after which the bus counts as hanging
HANGING = (
    "D-Bus hangs: it accepts connections but doesn't answer",
    "Operations wait for it, usually less than a minute. To prevent it, see systemd-machined in virtd(8).",
)


def give_way() -> NoReturn:
    """Exit and leave the work to the next daemon: a restart costs nobody anything, and this one would be of no
    use."""
    os._exit(1)


class Connections:
    """`task(function)` runs the coroutine that the function returns in the background."""

    def __init__(self, task: Callable[[Callable[[], Any]], asyncio.Task[None]]) -> None:
        self._task = task
        self._units: Units | None = None
        self._units_there = asyncio.Event()
        self._units_wanted = asyncio.Event()
        self._hangs_since: float | None = None
        self._front_end: dbus.Server | None = None
        self._served: Bus | None = None

    async def units(self) -> Units:
        """systemd, as soon as it can be reached. Raises HostError if D-Bus doesn't come up."""
        if not self._units_there.is_set():
            self._units_wanted.set()
            there = await within(self._units_there, UNITS_LIMIT)
            if not there and not (self._hangs_since and await within(self._units_there, HANG_LIMIT)):
                raise errors.HostError(
                    "systemd can't be reached over D-Bus",
                    hint="See: systemctl status dbus.service; " + do("status") + ".",
                )
        assert self._units is not None
        return self._units

    async def leave(self) -> None:
        """Answer the calls that have arrived, and accept no more."""
        if self._front_end is not None:
            await self._front_end.close()

    async def keep(self, host: Host, limits: Limits, connected: Callable[[Units, bool], Awaitable[None]]) -> None:
        """Bring up D-Bus and everything that needs it, again whenever the bus is lost.

        `connected` is awaited before org.virtd1 is served; its argument says whether it is for the first time.
        """
        from .systemd.bus import Bus
        from .systemd.units import Units

        # Importing gi holds the GIL for tens of milliseconds: so not before the first listing has been sent.
        if host.settled():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    await self._units_wanted.wait()
        later.catch_up()
        first = True
        while True:
            try:
                with self._watched(host):
                    bus = await Bus.open()
            except errors.HostError as exc:
                # If the bus hangs, the timeout of one call explains nothing.
                if self._hangs_since is None:
                    host.problems["bus"] = (exc.message, str(exc.hint))
                await asyncio.sleep(BUS_RETRY)
                continue
            host.problems.pop("bus", None)
            lost, machines = asyncio.Event(), None
            bus.on_closed(lost.set)
            self._units = Units(bus)
            self._units_there.set()
            with contextlib.suppress(errors.VirtdError):  # an older policy may be in force
                await bus.own_name(CLIENT_NAME)
            try:
                await connected(self._units, first)
                if first and lost.is_set():
                    # This process would never retry what failed then.
                    log.warning(
                        "The bus was lost while guests were being recovered: the next daemon will do that again"
                    )
                    give_way()
                first = False
                machines = self._machined(host, self._units)
                while not lost.is_set():
                    if await self._serve_bus(host, limits, lost):
                        await lost.wait()
                    elif await within(lost, NAME_RETRY):
                        break
            except errors.VirtdError as exc:
                host.problems["bus"] = (exc.message, str(exc.hint))
                log.warning("D-Bus: %s", exc)
                await asyncio.sleep(BUS_RETRY)
            finally:
                self._units_there.clear()
                if machines is not None:
                    machines.cancel()
                await self._leave_bus()
                await bus.close()

    @contextlib.contextmanager
    def _watched(self, host: Host) -> Iterator[None]:
        """Around an attempt to connect: the bus counts as hanging once that takes too long, until the attempt
        ends."""
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def hangs() -> None:
            self._hangs_since = self._hangs_since or begun
            host.problems["bus"] = HANGING

        timer = loop.call_later(HUNG, hangs)
        try:
            yield
        except errors.HostError:
            if loop.time() - begun < HUNG:  # refused
                self._hangs_since = None
            raise
        finally:
            timer.cancel()
        if self._hangs_since is not None:
            log.info("D-Bus answers again, after %s", span(loop.time() - self._hangs_since))
            self._hangs_since = None

    async def _serve_bus(self, host: Host, limits: Limits, lost: asyncio.Event) -> bool:
        """Publish org.virtd1; False if the bus refuses, most likely by a policy that isn't in force yet.

        It has a connection of its own, so that messages to that name don't delay systemd's answers. `lost` is set
        when that connection breaks.
        """
        from .systemd.bus import Bus

        try:
            from .api import dbus

            await self._leave_bus()
            self._served = await Bus.open()
            self._served.on_closed(lost.set)
            self._front_end = dbus.Server(host, self._served, limits)
            await self._front_end.start()
            host.problems.pop("org.virtd1", None)
            return True
        except Exception as exc:  # only D-Bus clients are affected, not guests and virtdctl
            log.exception("org.virtd1 is not served")
            host.problems["org.virtd1"] = (
                f"org.virtd1 is not served on D-Bus: {exc}",
                "virtdctl works all the same. See: systemctl reload dbus.service.",
            )
            return False

    async def _leave_bus(self) -> None:
        if self._front_end is not None:
            with contextlib.suppress(errors.VirtdError):
                await self._front_end.close()
            self._front_end = None
        if self._served is not None:
            await self._served.close()
            self._served = None

    def _machined(self, host: Host, units: Units) -> asyncio.Task[None]:
        """Register what runs with systemd-machined, if available, for `machinectl list`. Nothing depends on it."""
        from .host.machined import Registrar

        async def machined() -> None:
            with contextlib.suppress(errors.VirtdError):  # the bus was lost
                await Registrar(host, units).run()

        return self._task(machined)
