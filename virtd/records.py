# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records: what the daemon knows of each object, in a JSON file that outlives the daemon.

`/run/virtd/<driver>/<name>.json`, mode 0600, replaced atomically. A newer daemon reads every older schema. An older
one (after a rollback) reads the fields that it knows and writes unknown ones back unchanged.
"""

from __future__ import annotations

import datetime as dt
import os
from typing import Any, TypedDict

import msgspec

from . import errors, files, untrusted
from .paths import Paths, listing
from .text import plain, plainly

SCHEMA = 1
LIMIT = 16 << 20  # bytes; the largest part is a definition, as text and parsed


class Exit(msgspec.Struct, frozen=True, omit_defaults=False):
    """How a child ended.

    `code` is its exit status or None; `signal` the name of the signal that killed it, such as "SIGKILL", or None;
    `cause` one word (guest-shutdown, shutdown, stop, killed, oom, panic, failed, host-shutdown, unknown); `at` ISO
    8601 in UTC; `by` who asked for it, or None.
    """

    cause: str
    at: str
    code: int | None = None
    signal: str | None = None
    by: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One object. `slots` maps a slot's name to its "dev:ino"; `data` is the driver's part, plain JSON."""

    driver: str
    name: str
    uuid: str
    state: str
    reason: str
    since: str
    schema: int = SCHEMA
    id: int = 0
    unit: str = ""
    invocation_id: str = ""
    main_pid: int = 0
    main_start: int = 0  # field 22 of /proc/PID/stat: clock ticks since boot; with the PID it names one process
    boot_id: str = ""
    slots: dict[str, str] = {}
    data: dict[str, Any] = {}
    exit: Exit | None = None
    unknown: dict[str, Any] = {}

    @property
    def key(self) -> str:
        return f"{self.driver}/{self.name}"


class Process(TypedDict, total=False):
    """Changes of what a record says of the object's process; see Record."""

    unit: str
    slots: dict[str, str]
    main_pid: int
    main_start: int
    invocation_id: str


class Details(Process, total=False):
    """Changes that may come with a new state."""

    since: str
    id: int
    boot_id: str
    data: dict[str, Any]
    exit: Exit | None


class Changes(Details, total=False):
    """Changes of any kind."""

    state: str
    reason: str


_FIELDS = frozenset(Record.__struct_fields__) - {"unknown"}


def decode(raw: bytes) -> Record:
    """The record in `raw`; raises ValueError with the reason if it can't be read."""
    try:
        table = msgspec.json.decode(raw)
        if not isinstance(table, dict):
            raise ValueError(f"expected an object, got {type(table).__name__}")
        unknown = {key: value for key, value in table.items() if key not in _FIELDS}
        return msgspec.convert(
            {key: value for key, value in table.items() if key in _FIELDS} | {"unknown": unknown}, Record
        )
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ValueError(str(exc)) from exc


def read(path: str) -> Record:
    """The record in a file. Raises OSError, or ValueError with the reason if it can't be read."""
    return decode(untrusted.read(path, LIMIT))


def encode(record: Record) -> bytes:
    table = msgspec.structs.asdict(record)
    table = table.pop("unknown") | table
    try:
        text = msgspec.json.encode(table)
    except UnicodeEncodeError:  # a path or some message contains a name that isn't UTF-8
        text = msgspec.json.encode(plainly(msgspec.to_builtins(table)))
    return msgspec.json.format(text, indent=1) + b"\n"


class Quarantined(msgspec.Struct, frozen=True):
    """A record that couldn't be read: its former path, its present one, and why."""

    driver: str
    name: str
    path: str
    moved_to: str
    reason: str


class Loaded(msgspec.Struct, frozen=True):
    """The content of a driver's directory; `wrong`: why it couldn't be read."""

    records: dict[str, Record] = {}
    quarantined: list[Quarantined] = []
    wrong: str = ""


class Records:
    """The records of one driver."""

    def __init__(self, paths: Paths, driver: str) -> None:
        self._paths = paths
        self._driver = driver
        self._directory = f"{paths.run}/{driver}"

    def load(self) -> Loaded:
        """Load all records; unreadable ones are moved aside, so that one bad file doesn't keep the daemon from
        starting."""
        found = listing(self._directory, ".json")
        loaded = Loaded(wrong=found.wrong and f"{self._directory} can't be read: {found.wrong}")
        for entry in found.odd:
            name, path = entry.removesuffix(".json"), f"{self._directory}/{entry}"
            loaded.quarantined.append(self._quarantine(name, path, "nothing can be called so"))
        for name in found.names:
            path = self._paths.record(self._driver, name)
            try:
                record = read(path)
                if (record.driver, record.name) != (self._driver, name):
                    raise ValueError(f"it names {record.key}")
            except OSError as exc:
                loaded.quarantined.append(self._quarantine(name, path, exc.strerror or str(exc)))
            except ValueError as exc:
                loaded.quarantined.append(self._quarantine(name, path, str(exc)))
            else:
                loaded.records[name] = record
        return loaded

    def save(self, record: Record) -> None:
        """Raises HostError; then the record on disk is still the older one, complete."""
        path = self._paths.record(self._driver, record.name)
        try:
            files.write(path, encode(record))
        except errors.HostError:
            if os.path.isdir(self._directory):
                raise
            try:
                files.make_directory(self._directory, 0o711)
            except OSError as exc:
                raise errors.HostError(
                    f"Cannot make {self._directory}: {exc.strerror}", hint=files.hint(exc)
                ) from exc
            files.write(path, encode(record))

    def remove(self, name: str) -> None:
        files.remove(self._paths.record(self._driver, name))

    def _quarantine(self, name: str, path: str, reason: str) -> Quarantined:
        suffix = f".{now().replace(':', '')}.json"
        target = f"{self._paths.quarantine}/{self._driver}-{plain(name)[:100]}{suffix}"
        try:
            files.make_directory(self._paths.quarantine, 0o700)
            os.rename(path, target)
        except OSError as exc:
            # /run may be full. The file is left in place, ignored, and reported again at the next start.
            return Quarantined(self._driver, plain(name), path, path, f"{reason}; not moved: {exc.strerror}")
        return Quarantined(self._driver, plain(name), path, target, reason)


def now() -> str:
    """The present time in the format of records: ISO 8601, UTC, microseconds."""
    return stamp(dt.datetime.now(dt.UTC).timestamp())


def stamp(seconds: float) -> str:
    """Seconds since the epoch in the format of records."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
