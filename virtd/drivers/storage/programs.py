# SPDX-License-Identifier: LGPL-2.1-or-later
"""What jobs run: qemu-img's command lines and the copying program's. Pure, but for where a program is."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, NamedTuple

from ...model.domain import Format
from . import host, sandbox
from .job import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...model.pool import Preallocation


class Account(NamedTuple):
    """Whom jobs run as."""

    user: str
    group: str


def _qemu_img() -> str:
    return host.program("qemu-img", "qemu-utils (Fedora: qemu-img)")


def _program(who: Account, argv: Sequence[str], readable: Sequence[str], writable: Sequence[str]) -> Program:
    """In a sandbox that shows these files. Devices are shown by the name that the program is given."""
    devices = [path for path in (*readable, *writable) if path.startswith("/dev/")]
    toplevel = sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False))
    properties = sandbox.properties(
        [path for path in readable if path not in writable],
        writable,
        toplevel=toplevel,
        devices=[os.path.realpath(path) for path in devices],
    )
    return Program(tuple(argv), tuple(properties), who.user, who.group)


def create(
    who: Account,
    path: str,
    size: int,
    preallocation: Preallocation,
    format: Format,  # noqa: A002 (what everybody calls it)
    backing: Sequence[tuple[str, Format]] = (),
) -> Program:
    """`backing`: the chain that the new image stands on, the nearest first."""
    return _program(who, _create(path, size, preallocation, format, backing), [b for b, _ in backing], [path])


def _create(
    path: str,
    size: int,
    preallocation: str,
    format: Format,  # noqa: A002
    backing: Sequence[tuple[str, Format]],
) -> list[str]:
    argv = [_qemu_img(), "create", "-q", "-f", format.value, "-o", f"preallocation={preallocation}"]
    if backing:
        argv += ["-b", backing[0][0], "-F", backing[0][1].value]
    return [*argv, path, str(size)]


def copy(who: Account, source: str, target: str, *, check: bool = False, backing: bool = False) -> Program:
    """Byte by byte; with `check` the copy is a qcow2 image, which is looked at in the end."""
    then = ("--", *_check(target, backing=backing)) if check else ()
    return _program(who, host.worker("copy", source, target, *then), [source], [target])


def check(who: Account, path: str, *, backing: bool) -> Program:
    """See whether a qcow2 image is whole."""
    return _program(who, _check(path, backing=backing), [path], [])


def _check(path: str, *, backing: bool) -> list[str]:
    argv = [_qemu_img(), "check", "-q"]
    if not backing:
        return [*argv, "-f", "qcow2", path]
    # Without what it stands on: that is looked at by itself, and a check needn't open it.
    return [*argv, "json:" + json.dumps({"driver": "qcow2", "backing": None, "file.filename": path})]


def convert(who: Account, source: str, source_format: str, target: str, format: Format) -> Program:  # noqa: A002
    # -n would keep qemu-img from making the target; a file that is there is taken all the same.
    argv = [_qemu_img(), "convert", "-p", "-f", source_format, "-O", format.value, source, target]
    if target.startswith("/dev/"):
        argv.insert(2, "-n")
    return _program(who, argv, [source], [target])


def resize(who: Account, path: str, size: int, backing: Sequence[str], *, shrink: bool) -> Program:
    argv = [_qemu_img(), "resize", "-q", "-f", "qcow2", *(["--shrink"] if shrink else []), path, str(size)]
    return _program(who, argv, backing, [path])


def wipe(who: Account, path: str, size: int, format: Format, backing: Sequence[tuple[str, Format]]) -> Program:  # noqa: A002
    """Overwrite it; a qcow2 image is made anew after that, for zeros aren't one."""
    again = () if format is Format.RAW else ("--", *_create(path, size, "off", format, backing))
    return _program(who, host.worker("wipe", path, *again), [b for b, _ in backing], [path])
