# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl volume upload and download: the daemon hands out a descriptor, and the bytes don't pass through it.

So a restart of the daemon in the middle has no effect. Holes stay holes, and an interrupted transfer continues where
it ended: the file's size says how far it got.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from virtd.cli import jobs
from virtd.cli.client import Call, constant
from virtd.cli.exits import OK
from virtd.cli.volume import format_option, volume_arguments
from virtd.errors import VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

CHUNK = 4 << 20


def upload(args: argparse.Namespace, session: Session) -> int:
    source = 0 if args.file == "-" else _open(args.file, os.O_RDONLY)
    try:
        return _upload(args, session, source)
    finally:
        _close(source)


def _upload(args: argparse.Namespace, session: Session, source: int) -> int:
    status = os.fstat(source)
    size = status.st_size if stat.S_ISREG(status.st_mode) else args.size
    parameters = {
        "pool": args.pool,
        "name": args.name,
        "format": args.format,
        "size": size,
        "resume": args.resume,
        "token": jobs.token(),
    }
    with Call(session, "Volume.Upload", constant(parameters), limit=jobs.WORK) as call:
        reply = call.result()
    if not reply.fds:
        raise VirtdError("virtd sent no descriptor to write to")
    target = reply.fds[0]
    job = str(reply.parameters["job"])
    offset = int(reply.parameters["offset"])
    try:
        copy(source, target, offset, f"Uploading {args.name}")
    except KeyboardInterrupt:
        _resumable(args, job)
        raise
    except OSError as exc:
        _resumable(args, job)
        raise VirtdError(exc.strerror or str(exc)) from exc
    finally:
        reply.close()
    jobs.run(session, "Volume.Uploaded", {"job": job}, f"Checking {args.name}")
    return OK


def _resumable(args: argparse.Namespace, job: str) -> None:
    print(
        f"To continue: virtdctl volume upload --resume {args.pool} {args.name} {args.file}\n"
        f"To give up: virtdctl volume cancel {job}",
        file=sys.stderr,
    )


def download(args: argparse.Namespace, session: Session) -> int:
    parameters = {"pool": args.pool, "name": args.name}
    with Call(session, "Volume.Download", constant(parameters), limit=jobs.WORK) as call:
        reply = call.result()
    if not reply.fds:
        raise VirtdError("virtd sent no descriptor to read from")
    target = 1
    try:
        target, offset = _target(args)
        copy(reply.fds[0], target, offset, f"Downloading {args.name}")
    except OSError as exc:
        raise VirtdError(exc.strerror or str(exc)) from exc
    finally:
        reply.close()
        _close(target)
    return OK


def _target(args: argparse.Namespace) -> tuple[int, int]:
    """The target of a download, and how much of it exists already."""
    if args.file == "-":
        return 1, 0
    flags = os.O_RDWR if args.resume else os.O_RDWR | os.O_CREAT | (0 if args.force else os.O_EXCL)
    target = _open(args.file, flags)
    if args.resume:
        return target, os.fstat(target).st_size
    os.ftruncate(target, 0)
    return target, 0


def _close(fd: int) -> None:
    """Close it unless it is standard input or output."""
    if fd > 2:
        os.close(fd)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        hint = "--force overwrites it, --resume continues it" if exc.errno == errno.EEXIST else ""
        raise VirtdError(f"Can't open {path}: {exc.strerror}", hint=hint) from exc


def copy(source: int, target: int, offset: int, what: str) -> None:
    """Copy from `offset` to the end. Holes stay holes between regular files; elsewhere all bytes are written."""
    show = jobs.Progress(what)
    regular = all(stat.S_ISREG(os.fstat(fd).st_mode) for fd in (source, target))
    if not regular:
        _stream(source, target, offset)
        return
    size = os.fstat(source).st_size
    try:
        at = offset
        while at < size:
            try:
                start = os.lseek(source, at, os.SEEK_DATA)
                end = os.lseek(source, start, os.SEEK_HOLE)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                break  # only a hole is left
            while start < end:
                start += _piece(source, target, start, min(CHUNK, end - start))
                show.at(start * 100 / size)
            at = end
        if os.fstat(target).st_size < size:
            os.ftruncate(target, size)
    finally:
        show.end()


def _piece(source: int, target: int, at: int, length: int) -> int:
    try:
        count = os.copy_file_range(source, target, length, at, at)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF):
            raise
        data = os.pread(source, length, at)
        _write(target, data, at)
        count = len(data)
    if not count:
        raise OSError(errno.EIO, "The source became shorter")
    return count


def _write(target: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


def _stream(source: int, target: int, offset: int) -> None:
    """Copy from or to a pipe or a device."""
    skip = offset
    try:
        os.lseek(source, skip, os.SEEK_SET)
        skip = 0
    except OSError:
        pass  # a pipe: skip what exists already by reading it
    seekable = True
    try:
        os.lseek(target, offset, os.SEEK_SET)
    except OSError:
        seekable = False
    at = offset
    while data := os.read(source, CHUNK):
        if skip:
            data, skip = data[skip:], max(0, skip - len(data))
        view = memoryview(data)
        while view:
            count = os.pwrite(target, view, at) if seekable else os.write(target, view)
            view, at = view[count:], at + count


def _upload_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument("file", metavar="FILE|-", help="what to upload; - reads standard input")
    format_option(parser, "its format (default: raw)")
    parser.add_argument(
        "--size", metavar="BYTES", type=int, help="of standard input, where a logical volume needs it"
    )
    parser.add_argument("--resume", action="store_true", help="continue an upload that was cut off")


def _download_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument("file", metavar="FILE|-", help="where to put it; - writes to standard output")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--resume", action="store_true", help="continue a download that was cut off")


OPTIONS: dict[str, Callable[[Parser], None]] = {"upload": _upload_options, "download": _download_options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"upload": upload, "download": download}
