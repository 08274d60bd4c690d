# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where things are. One object, so that a test can have a whole host under a directory of its own."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from .model.domain import NAME


class Paths:
    """The four directories of hier(7) that virtd uses, below `root`."""

    def __init__(self, root: str = "") -> None:
        self.root = root
        self.etc = f"{root}/etc/virtd"
        self.run = f"{root}/run/virtd"
        self.log = f"{root}/var/log/virtd"
        self.lib = f"{root}/var/lib/virtd"

    def definition(self, driver: str, name: str) -> str:
        return f"{self.etc}/{driver}/{name}.toml"

    def record(self, driver: str, name: str) -> str:
        return f"{self.run}/{driver}/{name}.json"

    def runtime(self, driver: str, name: str) -> str:
        """The object's own directory: sockets and such, gone when it ends."""
        return f"{self.run}/{driver}/{name}"

    def fifos(self, driver: str = "", name: str = "") -> str:
        """A child's pipes, see fifos.py; without a child, where all of them are."""
        return f"{self.run}/fifos" + (f"/{driver}.{name}" if driver else "")

    def aliases(self, driver: str = "", name: str = "") -> str:
        """Harmless names of what a unit is shown, see aliases.py; without a unit, where all of them are."""
        return f"{self.run}/paths" + (f"/{driver}.{name}" if driver else "")

    def console_log(self, driver: str, name: str) -> str:
        return f"{self.log}/{driver}/{name}.console.log"

    def stderr_log(self, driver: str, name: str) -> str:
        return f"{self.log}/{driver}/{name}.log"

    @property
    def settings(self) -> str:
        return f"{self.etc}/virtd.toml"

    @property
    def userdb(self) -> str:
        """Where records of transient users are put, nss-systemd(8)."""
        return f"{self.root}/run/userdb"

    @property
    def qemu_ids(self) -> str:
        """Which domain has which user ID."""
        return f"{self.lib}/qemu-ids.json"

    @property
    def transient(self) -> str:
        """Where systemd has the files of the transient units that it has loaded, systemd.unit(5)."""
        return f"{self.root}/run/systemd/transient"

    @property
    def quarantine(self) -> str:
        return f"{self.run}/quarantine"

    @property
    def autostarted(self) -> tuple[str, str]:
        """Marks of the boot in which everything was autostarted. One in /run alone would be lost where somebody
        clears that, and then what was stopped on purpose would be started; in /run older versions look for it.
        """
        return f"{self.lib}/autostarted", f"{self.run}/autostarted"

    @property
    def waiting(self) -> str:
        """What couldn't be autostarted in this boot yet; where the mark is that nobody clears by chance."""
        return f"{self.lib}/waiting.json"

    def hardware(self, domain: str) -> str:
        """What a domain's guest sees of its machine."""
        return f"{self.lib}/qemu/{domain}.json"

    @property
    def events(self) -> str:
        """The latest changes of state, for subscribers."""
        return f"{self.run}/events.log"

    def mountpoint(self, pool: str) -> str:
        """Which file system a directory pool was on when it was last active."""
        return f"{self.lib}/storage/{pool}.json"

    @property
    def launched(self) -> str:
        """The mark of a run that hasn't come to its regular end (yet); /usr/libexec/virtd makes it."""
        return f"{self.run}/launched"

    @property
    def socket(self) -> str:
        return f"{self.run}/virtd.sock"


class Listing(NamedTuple):
    """What is in a directory: `names` of objects, `odd` files, whose names no object can have, and, in `wrong`, why
    the directory can't be read.
    """

    names: list[str]
    odd: list[str]
    wrong: str = ""


def listing(directory: str, suffix: str) -> Listing:
    """The files in `directory` that end in `suffix`, without it, sorted; hidden ones (half-written) left out.

    A directory that isn't there has nothing wrong with it.
    """
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return Listing([], [])
    except OSError as exc:
        return Listing([], [], exc.strerror or str(exc))
    found = {entry.removesuffix(suffix) for entry in entries if entry.endswith(suffix) and not entry.startswith(".")}
    good = {name for name in found if re.fullmatch(NAME, name)}
    return Listing(sorted(good), [f"{name}{suffix}" for name in sorted(found - good)])


def names(directory: str, suffix: str) -> list[str]:
    """The names of objects that `listing` finds; none in a directory that can't be read."""
    return listing(directory, suffix).names
