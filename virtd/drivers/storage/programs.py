# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command lines of jobs: qemu-img's and the copying program's. Pure, apart from finding programs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...model.drives import Format
from .. import nodes
from . import prerequisites, sandbox
from .task import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...model.pool import Preallocation
    from .prerequisites import Account


STDIN = "/proc/self/fd/0"


def _qemu_img() -> str:
    return prerequisites.program("qemu-img", "qemu-utils (Fedora: qemu-img)")


def _program(
    who: Account, argv: Sequence[str], readable: Sequence[str], writable: Sequence[str], *, source: int = -1
) -> Program:
    """A program in a sandbox that shows these files. Devices are shown by the names that are in `argv`.

    `source`: its standard input, which it can reopen as STDIN.
    """
    devices = [path for path in (*readable, *writable) if path.startswith("/dev/")]
    toplevel = sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False))
    properties = sandbox.properties(
        [path for path in readable if path not in writable],
        writable,
        toplevel=toplevel,
        devices=[os.path.realpath(path) for path in devices],
    )
    return Program(tuple(argv), tuple(properties), who.user, who.group, source)


def create(
    who: Account,
    path: str,
    size: int,
    preallocation: Preallocation,
    format: Format,  # noqa: A002 (what everybody calls it)
    backing: tuple[str, Format] | None = None,
) -> Program:
    """`backing`: what the new image stands on."""
    return _program(who, _create(path, size, preallocation, format, backing), [], [path])


def _create(
    path: str,
    size: int,
    preallocation: str,
    format: Format,  # noqa: A002
    backing: tuple[str, Format] | None,
) -> list[str]:
    argv = [_qemu_img(), "create", "-q", "-f", format.value, "-o", f"preallocation={preallocation}"]
    if backing is not None:
        # -u: don't open it, nor whatever its header names.
        argv += ["-u", "-b", backing[0], "-F", backing[1].value]
    return [*argv, path, str(size)]


def copy(who: Account, source: str | int, target: str, *, check: bool = False) -> Program:
    """Copy byte by byte; with `check` the copy is a qcow2 image, which is checked at the end.

    `source`: a path or, where others may exchange that, an open file.
    """
    then = ("--", *_check(target)) if check else ()
    if isinstance(source, int):
        return _program(who, prerequisites.worker("copy", STDIN, target, *then), [], [target], source=source)
    return _program(who, prerequisites.worker("copy", source, target, *then), [source], [target])


def check(who: Account, path: str) -> Program:
    """Check a qcow2 image by itself, without what it stands on."""
    return _program(who, _check(path), [path], [])


def _check(path: str) -> list[str]:
    return [_qemu_img(), "check", "-q", nodes.name(nodes.image(path, "qcow2"))]


def convert(who: Account, source: int, source_format: str, target: str, format: Format) -> Program:  # noqa: A002
    """`source`: an open file."""
    # An existing file is used even without -n, which a device needs.
    argv = [_qemu_img(), "convert", "-p", "-O", format.value, nodes.name(nodes.image(STDIN, source_format)), target]
    if target.startswith("/dev/"):
        argv.insert(2, "-n")
    return _program(who, argv, [], [target], source=source)


def resize(who: Account, path: str, size: int, backing: Sequence[tuple[str, Format]], *, shrink: bool) -> Program:
    # With all that it stands on: a larger size must not make any of that visible, but read as zeros.
    node = nodes.name(nodes.image(path, "qcow2", backing))
    argv = [_qemu_img(), "resize", "-q", *(["--shrink"] if shrink else []), node, str(size)]
    return _program(who, argv, [lower for lower, _format in backing], [path])


def wipe(who: Account, path: str, size: int, format: Format, backing: tuple[str, Format] | None) -> Program:  # noqa: A002
    """Overwrite it with zeros; a qcow2 image is then made anew."""
    again = () if format is Format.RAW else ("--", *_create(path, size, "off", format, backing))
    return _program(who, prerequisites.worker("wipe", path, *again), [], [path])
