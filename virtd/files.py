# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that replaces files: readers and crashes see either the old or the new content, never a part."""

from __future__ import annotations

import contextlib
import logging
import os
import stat

from . import errors

log = logging.getLogger(__name__)


def write(path: str, data: bytes, *, mode: int = 0o600, group: int = -1, sync_directory: bool = True) -> None:
    """Replace the content of `path` by `data`: temporary file, fsync, rename, fsync of the directory.

    `group` -1: our own. Raises HostError (mostly for a full or read-only file system); then the old file is
    unchanged.
    """
    temporary = unfinished(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            if group != -1:
                os.fchown(fd, -1, group)
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        if sync_directory:
            sync(os.path.dirname(path))
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise errors.HostError(f"Cannot write {path}: {exc.strerror}", hint=hint(exc)) from exc


def make_directory(path: str, mode: int) -> None:
    """Make `path` if it doesn't exist, with its parents, in that mode whatever the umask. Raises OSError."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        make_directory(os.path.dirname(path), 0o755)
        make_directory(path, mode)
    else:
        os.chmod(path, mode)


def unfinished(path: str) -> str:
    """Where a file is made that becomes `path` once it is complete.

    A fixed name, so that the next attempt overwrites what a crash leaves, instead of leftovers piling up. Writers of
    one path take turns, since each object has one lock.
    """
    directory, name = os.path.split(path)
    return f"{directory}/.{name}.new"


def finished(entry: str) -> str:
    """The name that an unfinished file was to have; "" for any other entry of a directory."""
    return entry[1:-4] if entry.startswith(".") and entry.endswith(".new") else ""


def leftovers(directory: str) -> list[str]:
    """What `write` has left in `directory` where a crash cut it off, to be removed by whoever knows that none is at
    work there.
    """
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    return [f"{directory}/{entry}" for entry in sorted(entries) if finished(entry)]


def remove(path: str) -> bool:
    """Unlink `path`; False when it wasn't there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise errors.HostError(f"Cannot remove {path}: {exc.strerror}", hint=hint(exc)) from exc
    sync(os.path.dirname(path))
    return True


def remove_tree(directory: str) -> None:
    """Remove a directory with its contents, or whatever is in its place; what can't be removed stays."""
    import shutil  # 4 ms, and no start of the daemon needs it

    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            os.unlink(directory)  # rmtree() would open it, and wait for a writer if it is a FIFO
            return
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except RecursionError:  # deeper than any tree that wasn't made on purpose
        _flatten(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _flatten(directory: str) -> None:
    """Move all directories inside it, however deep, to its top. What can't be moved stays."""
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        pending, count = _directories(top), 0
        while pending:
            name = pending.pop()
            with contextlib.suppress(OSError):
                here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
                try:
                    for below in _directories(here):
                        count += 1
                        moved = f".flat.{count}"
                        os.rename(below, moved, src_dir_fd=here, dst_dir_fd=top)
                        pending.append(moved)
                finally:
                    os.close(here)
    finally:
        os.close(top)


def _directories(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def sync(directory: str) -> None:
    """Make a rename in `directory` survive a power cut, as far as the file system allows it.

    Errors are ignored: the rename or removal is already visible to everybody, so it hasn't failed.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        log.warning("%s may not survive a power cut: %s", directory, exc.strerror)


def hint(exc: OSError) -> str:
    """What a person can do about `exc`, if that is known."""
    import errno

    match exc.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "The file system is full: free some space and try again."
        case errno.EROFS:
            return "The file system is mounted read-only."
        case errno.EMFILE | errno.ENFILE:
            return "Too many open files: raise LimitNOFILE= of virtd.service."
        case _:
            return ""
