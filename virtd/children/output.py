# SPDX-License-Identifier: LGPL-2.1-or-later
"""The path of a child's output into its logs: the two logs, the pump, and a feeder for a terminal."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from ..logs.logfile import LogFile
from .renewal import Renewal
from .slots import CONSOLE_LOG, STDERR, STDERR_LOG, STDIN, STDOUT

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ..fdstore import Store
    from ..logs.feeder import Feeder
    from ..logs.pump import Pump
    from ..model.settings import Log


class Output:
    """The output of the child whose slots are `key`/NAME. `paths`: those of the console log and of the one for
    stderr."""

    def __init__(self, key: str, paths: tuple[str, str], store: Store, pump: Pump, limits: Log) -> None:
        self.console: LogFile | None = None
        self.stderr: LogFile | None = None
        self._key = key
        self._paths = dict(zip((CONSOLE_LOG, STDERR_LOG), paths, strict=True))
        self._store = store
        self._pump = pump
        self._limits = limits
        self._feeder: Feeder | None = None
        self._renewal = Renewal(store)

    def open(self) -> dict[str, int]:
        """Open the logs; the descriptors for their slots remain this object's. Raises HostError."""
        self.console = self._log(CONSOLE_LOG)
        try:
            self.stderr = self._log(STDERR_LOG)
        except BaseException:
            self.close_logs()
            raise
        return {CONSOLE_LOG: self.console.fd, STDERR_LOG: self.stderr.fd}

    def adopt(self) -> None:
        """Reopen the logs, from their slots if possible. Raises HostError."""
        held = {name: self._slot(name) in self._store for name in (CONSOLE_LOG, STDERR_LOG)}
        self.console = self._log(CONSOLE_LOG, held=held[CONSOLE_LOG])
        self.stderr = self._log(STDERR_LOG, held=held[STDERR_LOG])
        for name, file in ((CONSOLE_LOG, self.console), (STDERR_LOG, self.stderr)):
            if not held[name]:
                self._renewal.rotated(self._slot(name), file.fd)

    def start(self) -> None:
        """Begin to move data from the slots' pipes."""
        store = self._store
        if self._feeder is None and self._slot(STDIN) in store and self._slot(STDOUT) in store:
            stdin = store.get(self._slot(STDIN))
            if os.isatty(stdin):
                from ..logs.feeder import Feeder  # few children have a terminal

                # Before the pump, which treats a pipe without a writer as ended.
                self._feeder = Feeder(stdin, store.get(self._slot(STDOUT)))
        if self.console is not None and self._slot(STDOUT) in store:
            self._pump.add(self._slot(STDOUT), store.get(self._slot(STDOUT)), self.console)
        if self.stderr is not None and self._slot(STDERR) in store:
            self._pump.add(self._slot(STDERR), store.get(self._slot(STDERR)), self.stderr, size=1)
            self._pump.watch(self._slot(STDERR))  # it should reach the journal soon

    async def move_words(self) -> None:
        """Move what has been written to stderr so far to the log."""
        if self._slot(STDERR) in self._store:
            await asyncio.wrap_future(self._drain(STDERR))

    async def drain(self) -> None:
        """Move what is left in the pipes to the logs. For a child that has ended."""
        if self._feeder is not None:
            await self._feeder.drain(lambda: asyncio.wrap_future(self._drain(STDOUT)))
        await asyncio.gather(*(asyncio.wrap_future(self._drain(name)) for name in (STDOUT, STDERR)))

    async def close(self) -> None:
        """Close the logs and pipes; PID 1 keeps the slots. Idempotent."""
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None
        removed = [self._pump.remove(self._slot(name)) for name in (STDOUT, STDERR)]
        await asyncio.gather(*map(asyncio.wrap_future, removed))
        self.close_logs()
        await self._renewal.close()

    def close_logs(self) -> None:
        """Close logs that nothing is moved to. Idempotent."""
        for file in (self.console, self.stderr):
            if file is not None:
                file.close()
        self.console = self.stderr = None

    def _slot(self, name: str) -> str:
        return f"{self._key}/{name}"

    def _drain(self, name: str) -> Future[int]:
        return self._pump.drain(self._slot(name))

    def _log(self, name: str, *, held: bool = False) -> LogFile:
        slot = self._slot(name)
        return LogFile(
            self._paths[name],
            limit=self._limits.max_bytes,
            backups=self._limits.backups,
            on_rotate=lambda fd: self._renewal.rotated(slot, fd),
            # A duplicate, because the store may have to send its own to PID 1 once more.
            fd=os.dup(self._store.get(slot)) if held else None,
        )
