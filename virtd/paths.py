# SPDX-License-Identifier: LGPL-2.1-or-later
"""All paths. They are in one object so that a test can have a whole host in a directory of its own."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from .model.naming import NAME


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
        """The object's own directory for sockets and the like, removed when it ends."""
        return f"{self.run}/{driver}/{name}"

    def fifos(self, driver: str = "", name: str = "") -> str:
        """The directory of a child's pipes, see fifos.py; without a child, the one of all."""
        return f"{self.run}/fifos" + (f"/{driver}.{name}" if driver else "")

    def aliases(self, driver: str = "", name: str = "") -> str:
        """The directory of a unit's harmless names for odd paths, see aliases.py; without a unit, the one of all."""
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
        """The directory for records of transient users, nss-systemd(8)."""
        return f"{self.root}/run/userdb"

    @property
    def qemu_ids(self) -> str:
        """The file that says which domain has which user ID."""
        return f"{self.lib}/qemu-ids.json"

    @property
    def transient(self) -> str:
        """The directory of systemd's files of loaded transient units, systemd.unit(5)."""
        return f"{self.root}/run/systemd/transient"

    @property
    def quarantine(self) -> str:
        return f"{self.run}/quarantine"

    @property
    def autostarted(self) -> tuple[str, str]:
        """Files that mark the boot in which everything was autostarted. If only the one in /run existed and somebody
        cleared /run, objects stopped on purpose would be started again; older versions look for it in /run.
        """
        return f"{self.lib}/autostarted", f"{self.run}/autostarted"

    @property
    def waiting(self) -> str:
        """What couldn't be autostarted in this boot yet, beside the mark that nobody clears by accident."""
        return f"{self.lib}/waiting.json"

    def hardware(self, domain: str) -> str:
        """The hardware that a domain's guest sees."""
        return f"{self.lib}/qemu/{domain}.json"

    def nvram(self, domain: str, uuid: str, *, secure: bool) -> str:
        """A domain's UEFI variables, others with secure boot than without. Its name may be another's later, its uuid
        not.
        """
        return f"{self.lib}/qemu/{domain}/{uuid}{'.secure' if secure else ''}.fd"

    def tpm(self, domain: str, uuid: str) -> str:
        """The directory with what a domain's TPM keeps."""
        return f"{self.lib}/qemu/{domain}/{uuid}.tpm"

    @property
    def events(self) -> str:
        """The latest changes of state, for subscribers."""
        return f"{self.run}/events.log"

    def mountpoint(self, pool: str) -> str:
        """The file system that a directory pool was on when it was last active."""
        return f"{self.lib}/storage/{pool}.json"

    @property
    def launched(self) -> str:
        """The mark of a run that hasn't ended regularly (yet); /usr/libexec/virtd makes it."""
        return f"{self.run}/launched"

    @property
    def socket(self) -> str:
        return f"{self.run}/virtd.sock"


class Listing(NamedTuple):
    """The content of a directory: `names` of objects, `odd` files, whose names no object can have, and in `wrong` why
    the directory can't be read.
    """

    names: list[str]
    odd: list[str]
    wrong: str = ""


def listing(directory: str, suffix: str) -> Listing:
    """The files in `directory` that end in `suffix`, without it, sorted; hidden (half-written) ones are left out.

    It is not an error if the directory doesn't exist.
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
