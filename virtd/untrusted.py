# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening files that may be anything: put there by hand, by accident, or by a child in its own directory.

A FIFO would block open(2) for ever, opening a device may have effects, /dev/zero never ends, a link may lead
anywhere, and a lease (fcntl(2)) delays open(2) by 45 s. So the file is first inspected through O_PATH, which opens
nothing, and then exactly this file is opened, without blocking. The peer of a socket is checked as well.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

from . import process

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


class Unfit(OSError):
    """It isn't a regular file, or is too large. `strerror` says so, as the end of a sentence: "it is a FIFO ..."."""


def open_regular(path: str, flags: int = os.O_RDONLY, *, follow: bool = False, dir_fd: int | None = None) -> int:
    """A non-blocking descriptor of the regular file at `path`; the caller closes it.

    The last component may be a link only with `follow`, and then lead to a regular file anywhere. Raises Unfit or
    OSError.
    """
    where = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), dir_fd=dir_fd)
    try:
        kind = stat.S_IFMT(os.fstat(where).st_mode)
        if kind != stat.S_IFREG:
            raise Unfit(errno.EINVAL, f"it is {KINDS.get(kind, 'no file')}, not a regular file", path)
        return os.open(f"/proc/self/fd/{where}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(where)


def read(path: str, limit: int, *, follow: bool = False, dir_fd: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises Unfit or OSError."""
    fd = open_regular(path, follow=follow, dir_fd=dir_fd)
    try:
        return read_open(fd, path, limit)
    finally:
        os.close(fd)


def read_open(fd: int, path: str, limit: int) -> bytes:
    """Like `read`, for an open regular file."""
    size = os.fstat(fd).st_size
    found = bytearray()
    # One byte more than allowed, to notice a file that grows meanwhile.
    while len(found) <= limit >= size and (chunk := os.read(fd, limit + 1 - len(found))):
        found += chunk
    if max(size, len(found)) > limit:
        raise Unfit(errno.EFBIG, f"it has {max(size, len(found))} bytes; at most {limit} are allowed", path)
    return bytes(found)


def tail(path: str, most: int, *, since: int = 0, dir_fd: int | None = None) -> bytes:
    """The last `most` bytes of a regular file, or those after offset `since` if they are fewer.

    Raises Unfit, or OSError.
    """
    fd = open_regular(path, dir_fd=dir_fd)
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, most, max(0, size - most, min(since, size)))
    finally:
        os.close(fd)


def connect(path: str, pid: int, start: int, *, dir_fd: int | None = None) -> socket.socket:
    """A non-blocking stream connection to process `pid`, which listens on the UNIX socket at `path`.

    `pid` and `start` as in `process`. Raises Unfit if it isn't a socket, or if another process listens; OSError:
    ENOENT and ECONNREFUSED if nobody listens yet, or any more, EAGAIN if the process doesn't accept.
    """
    where = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        kind = stat.S_IFMT(os.fstat(where).st_mode)
        if kind != stat.S_IFSOCK:
            raise Unfit(errno.EINVAL, f"it is {KINDS.get(kind, 'a file')}, not a socket", path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(f"/proc/self/fd/{where}")
            if (peer := listener(connection)) != pid or not process.alive(pid, start):
                raise Unfit(errno.EACCES, f"process {peer} listens there, not {pid}", path)
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(where)


def listener(connection: socket.socket) -> int:
    """The PID of the process that called listen(2) (unix(7), SO_PEERCRED); 0 if it isn't visible from here."""
    credentials = struct.Struct("3i")  # pid, uid, gid
    return int(credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[0])
