# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening what may be anything: put there by hand, by accident, or by a child in a directory of its own.

A FIFO would hold up open(2) for ever, a device do something when it is opened, /dev/zero never end, a link lead
anywhere; a lease (fcntl(2)) makes who opens a file wait for 45 s. So it is first looked at with O_PATH, which opens
nothing, and what was looked at is what is opened, without waiting. A socket's other end is looked at as well.
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
    """It isn't a regular file, or is too large. `strerror` says so, as a sentence's end: "it is a FIFO ..."."""


def open_regular(path: str, flags: int = os.O_RDONLY, *, follow: bool = False, dir_fd: int | None = None) -> int:
    """A descriptor of the regular file at `path`; it doesn't block, and the caller closes it.

    The last component may be a link only with `follow`; then it may lead to a regular file anywhere. Raises Unfit, or
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
    """All of a regular file, which may have `limit` bytes. Raises Unfit, or OSError."""
    fd = open_regular(path, follow=follow, dir_fd=dir_fd)
    try:
        return read_open(fd, path, limit)
    finally:
        os.close(fd)


def read_open(fd: int, path: str, limit: int) -> bytes:
    """As `read`, of a regular file that is open."""
    size = os.fstat(fd).st_size
    found = bytearray()
    # One byte more than it may have, for a file that grows meanwhile.
    while len(found) <= limit >= size and (chunk := os.read(fd, limit + 1 - len(found))):
        found += chunk
    if max(size, len(found)) > limit:
        raise Unfit(errno.EFBIG, f"it has {max(size, len(found))} bytes, and {limit} are the most", path)
    return bytes(found)


def tail(path: str, most: int, *, since: int = 0, dir_fd: int | None = None) -> bytes:
    """The last `most` bytes of a regular file, or what comes after offset `since` if that is less.

    Raises Unfit, or OSError.
    """
    fd = open_regular(path, dir_fd=dir_fd)
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, most, max(0, size - most, min(since, size)))
    finally:
        os.close(fd)


def connect(path: str, pid: int, start: int, *, dir_fd: int | None = None) -> socket.socket:
    """A stream connection, in non-blocking mode, to process `pid`, which listens on the Unix socket at `path`.

    `pid` and `start` as in `process`. Raises Unfit for what isn't a socket, and when another process listens
    there; OSError: ENOENT and ECONNREFUSED when nobody listens yet, or any more, EAGAIN when it doesn't accept.
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
                raise Unfit(errno.EACCES, f"process {peer} listens there, and not {pid}", path)
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(where)


def listener(connection: socket.socket) -> int:
    """The PID of who called listen(2) at the other end (unix(7), SO_PEERCRED); 0 if it can't be seen from here."""
    credentials = struct.Struct("3i")  # pid, uid, gid
    return int(credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[0])
