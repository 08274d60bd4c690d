# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools, volumes and jobs."""

from __future__ import annotations

from typing import Annotated

from . import Reply, Trouble


class Pool(Reply, frozen=True):
    """A pool in short."""

    name: str
    driver: Annotated[str, "storage"]
    uuid: str
    state: Annotated[str, "inactive, starting, active or stopping"]
    reason: Annotated[str, "why, for a person to read"]
    since: Annotated[str | None, "when it entered this state"]
    autostart: Annotated[bool, "whether it is started at boot"]
    waits: Annotated[bool, "whether its autostart failed, and is being retried"]
    type: Annotated[str, "directory, filesystem or logical; empty without a definition"]
    path: str
    capacity: Annotated[int | None, "bytes; null while it isn't known"]
    allocation: Annotated[int | None, "bytes"]
    available: Annotated[int | None, "bytes"]


class PoolInfo(Pool, frozen=True):
    """Everything known about a pool."""

    source: Annotated[str | None, "what is mounted, or the volume group"]
    fstype: str | None
    options: Annotated[str, "of the mount"]
    persistent: Annotated[bool, "whether there is a definition"]
    pending: Annotated[bool, "whether the definition waits for the next start"]
    definition_path: str | None
    problems: list[Trouble]


class Refreshed(Reply, frozen=True):
    """A pool was refreshed."""

    name: str
    volumes: Annotated[int, "how many there are"]
    removed: Annotated[list[str], "what was left unfinished in it"]


class Backing(Reply, frozen=True):
    """What a volume is based on."""

    pool: str
    volume: str


class Volume(Reply, frozen=True):
    """A volume in short."""

    pool: str
    name: str
    path: str
    format: Annotated[str | None, "raw or qcow2; null for a file that others have put there"]
    capacity: Annotated[int | None, "bytes that a guest sees"]
    allocation: Annotated[int | None, "bytes that it takes up"]
    backing: Backing | None
    used_by: Annotated[list[str], "guests that have it open"]
    job: Annotated[str | None, "that works on it"]
    trouble: Annotated[str, "what is wrong with it; empty if nothing is"]


class Link(Reply, frozen=True):
    """One volume of a chain of backing volumes."""

    pool: str
    volume: str
    format: str
    path: str


class VolumeInfo(Volume, frozen=True):
    """Everything known about a volume."""

    chain: Annotated[list[Link], "what it is based on, nearest first"]
    snapshots: Annotated[int, "how many internal ones"]
    backing_of: Annotated[list[str], "volumes that are based on it, POOL/VOLUME"]


class Snapshot(Reply, frozen=True):
    """An internal snapshot of a qcow2 volume."""

    id: str
    name: str
    at: Annotated[int, "seconds since 1970"]
    state: Annotated[int, "bytes of the guest's memory that it has"]


class Job(Reply, frozen=True):
    """A job, which changes a volume or has done so."""

    job: Annotated[str, "its name"]
    verb: Annotated[str, "create, clone, import, adopt, resize, wipe or upload"]
    pool: str
    volume: str
    state: Annotated[str, "waiting (for its client), running, done, failed or cancelled"]
    progress: Annotated[float | None, "percent, as far as it is known"]
    by: Annotated[str, "who asked for it"]
    since: Annotated[str | None, "when it entered this state"]
    pid: int | None
    error: Annotated[str, "why it failed; empty: it didn't"]


class Begun(Reply, frozen=True):
    """The result of a call about a volume, which may have begun a job."""

    pool: str
    volume: str
    job: Annotated[str, "that goes on; empty: all is done"]


class Uploading(Begun, frozen=True):
    """An upload, whose descriptor comes with this."""

    offset: Annotated[int, "bytes that are there already"]


class Downloading(Reply, frozen=True):
    """A download, whose descriptor comes with this."""

    pool: str
    volume: str
    format: str | None


class Cancelled(Reply, frozen=True):
    """A job was asked to end."""

    job: str
    changed: Annotated[bool, "false: it was over"]
