# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making a root file system from an archive or a directory, and the definition that goes with it.

It is unpacked in a transient unit, inside the container's own user namespace: the kernel shifts the files' owners,
and an archive can do no more than the container could. It gets its name once it is complete. From before its first
file until it is defined there is a mark in /run/virtd/lxc: if the daemon ends in between, the next one removes what
is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from ... import errors, files, hostroot, untrusted
from ...children.programs import HOMELESS
from ...hints import do
from ...model import container as model
from ...model.document import shown
from ...model.naming import ENDINGS, NAME
from ...paths import names
from ...systemd import aliases
from ...systemd.transient import UnitSpec
from ..loader import CREATING as MARK
from . import execs, prerequisites, sandbox, unpack
from .container import DRIVER

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader

    from ...systemd.units import Units
    from .container import Container

log = logging.getLogger(__name__)

END_LIMIT = 30.0  # seconds that the unpacking may take to end once it is killed
# tar(1)'s option for an archive on its standard input, by the archive's first bytes.
PACKED = ((b"\xfd7zXZ\0", "-J"), (b"\x1f\x8b", "-z"), (b"BZh", "-j"), (b"\x28\xb5\x2f\xfd", "--zstd"))


class Job(NamedTuple):
    """One root file system to be made."""

    name: str
    image: str
    directory: str  # where root file systems are
    ids: model.IdMap
    run: str  # /run/virtd/lxc

    @property
    def target(self) -> str:
        return f"{self.directory}/{self.name}"

    @property
    def building(self) -> str:
        return files.unfinished(self.target)

    @property
    def mark(self) -> str:
        return f"{self.run}/{self.name}{MARK}"

    @property
    def unit(self) -> str:
        return unit_of(self.name)

    @property
    def aliases(self) -> str:
        return aliases_of(self.run, self.name)

    @property
    def definition(self) -> str:
        return (
            f'name = "{self.name}"\nrootfs = {json.dumps(self.target, ensure_ascii=False)}\n\n'
            f"[idmap]\nfirst = {self.ids.first}\ncount = {self.ids.count}\n"
        )


def unit_of(name: str) -> str:
    return f"virtd-create-lxc-{name}.service"


def aliases_of(run: str, name: str) -> str:
    """The directory of the unit's aliases for odd paths; hidden, since it isn't a container's."""
    return f"{run}/.{name}.paths"


def check(name: str, image: str, directory: str) -> None:
    """Raises a VirtdError if it can't be made."""
    if not re.fullmatch(NAME, name) or name.endswith(ENDINGS):
        raise errors.InvalidState(f"Cannot create {shown(name)}: that can't be a container's name")
    if not image.startswith("/") or not os.path.exists(hostroot.seen(image)):
        raise errors.NotFound(f"Cannot create {name}: no such archive or directory: {image}")
    if os.path.lexists(f"{directory}/{name}"):
        raise errors.Exists(f"Cannot create {name}: there is {directory}/{name} already")


async def run(job: Job, units: Units, define: Callable[[str], Container]) -> Container:
    """Make it, and define the container. Raises a VirtdError, with nothing left behind."""
    try:
        files.make_directory(job.directory, 0o700)
        files.make_directory(job.run, 0o700)
        files.write(job.mark, job.directory.encode())
        await _make(job, units)
        return define(job.definition)
    except BaseException as exc:
        await asyncio.to_thread(files.remove_tree, job.target)
        if isinstance(exc, OSError):
            raise errors.HostError(f"Cannot create {job.name}: {exc.strerror}", hint=files.hint(exc)) from exc
        raise
    finally:
        await asyncio.to_thread(files.remove_tree, job.building)
        aliases.remove(job.aliases)
        files.remove(job.mark)


async def _make(job: Job, units: Units) -> None:
    os.mkdir(job.building, 0o755)
    os.chown(job.building, job.ids.first, job.ids.first)
    await _unpack(job, units)
    if not any(os.path.lexists(f"{job.building}/{name}") for name in ("usr", "bin", "etc")):
        raise errors.InvalidState(f"Cannot create {job.name}: {job.image} holds no root file system")
    os.rename(job.building, job.target)
    files.sync(job.directory)


async def clear(run: str, directory: str, units: Units, defined: Callable[[str], bool]) -> None:
    """At a start of the daemon: remove what the last one left unfinished."""
    for name in names(run, MARK):
        mark = f"{run}/{name}{MARK}"
        try:
            place = os.fsdecode(untrusted.read(mark, 4096))
        except OSError as exc:
            log.warning("%s can't be read: %s", mark, exc.strerror)
            continue
        try:
            await _end(units, unit_of(name))
        except TimeoutError:  # a file system hangs; other containers don't wait for it
            log.warning("%s can't be ended: what it made in %s stays for now", unit_of(name), place)
            continue
        if not defined(name) and place.startswith("/"):
            log.warning("The making of container %s was cut off: %s/%s is removed", name, place, name)
            await asyncio.to_thread(files.remove_tree, f"{place}/{name}")
        if place.startswith("/"):
            await asyncio.to_thread(files.remove_tree, files.unfinished(f"{place}/{name}"))
        aliases.remove(aliases_of(run, name))
        files.remove(mark)
    await _sweep(directory, run)  # of one that was interrupted when the host went down


async def _end(units: Units, unit: str) -> None:
    """Raises TimeoutError if it can't be ended."""
    async with asyncio.timeout(END_LIMIT):
        with contextlib.suppress(errors.VirtdError):
            await units.kill(unit, 9, whole=True)
        with contextlib.suppress(errors.VirtdError):  # one that ended by itself still has to be forgotten
            await execs.result(units, unit)


async def _sweep(directory: str, run: str) -> None:
    """Remove unfinished root file systems that nobody is making any more."""
    alive = {files.unfinished(f"{directory}/{name}") for name in names(run, MARK)}
    for path in set(files.leftovers(directory)) - alive:
        await asyncio.to_thread(files.remove_tree, path)


async def _unpack(job: Job, units: Units) -> None:
    source = await asyncio.to_thread(_open, job)
    with source, tempfile.TemporaryFile() as words:
        directory = os.path.isdir(hostroot.seen(job.image))
        owner = os.stat(hostroot.seen(job.image)).st_uid
        task = unpack.Job(
            target=job.building,
            hostname=job.name.replace("_", "-").replace(".", "-")[:63].strip("-"),
            ids=[job.ids.first, job.ids.count],
            option="" if directory else option(os.pread(source.fileno(), 6, 0)),
            source=job.image if directory else "",
            shifted=[owner, job.ids.count] if directory and owner >= model.IDS else None,
        )
        spec = UnitSpec(
            name=job.unit,
            description=f"Making container {job.name}",
            slice=f"virtd-{DRIVER}.slice",
            argv=prerequisites.unpacker(json.dumps(task._asdict())),
            environment=HOMELESS,
            properties=tuple(
                sandbox.making(job.building, job.image if directory else "", toplevel=prerequisites.toplevel())
            ),
            aliases=job.aliases,
        )
        try:
            await units.start(spec, (source.fileno(), words.fileno(), words.fileno()))
            result = await execs.result(units, job.unit)
        except BaseException:  # also of its start: PID 1 may have carried that out and not answered
            with contextlib.suppress(TimeoutError):
                await _end(units, job.unit)
            raise
        words.seek(0)
        said = words.read(2 * unpack.WORDS).decode(errors="replace").strip().splitlines()
    if result.code != 0:
        if said and (needed := re.fullmatch(unpack.NEEDED.format("([0-9]+)"), said[-1])):
            count = int(needed[1]) + 1
            raise errors.StartFailed(
                f"Cannot create {job.name}: {needed[0]} for the files of {job.image}, and it is to have 0 to "
                f"{job.ids.count - 1}",
                hint=do("create", "container", job.name, ids=str(count), image=job.image),
            )
        how = "it took too long, or was killed" if result.code is None else "unpacking failed"
        raise errors.StartFailed(f"Cannot create {job.name}: {'; '.join(line[:200] for line in said[:2]) or how}")


def _open(job: Job) -> BufferedReader:
    """The archive, or /dev/null in place of a directory. Raises a VirtdError."""
    if os.path.isdir(hostroot.seen(job.image)):
        return open(os.devnull, "rb")
    try:
        return open(untrusted.open_regular(hostroot.seen(job.image), follow=True), "rb")
    except untrusted.Unfit as exc:
        raise errors.InvalidState(f"Cannot create {job.name}: {job.image}: {exc.strerror}") from exc


def option(first: bytes) -> str:
    return next((option for magic, option in PACKED if first.startswith(magic)), "")
