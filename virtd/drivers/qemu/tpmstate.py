# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's TPM keeps, in a directory named for the guest's uuid, which no other guest ever gets.

It belongs to root while the guest is off, and to the guest's user while it runs: swtpm replaces its files and doesn't
change them, so it needs the directory. What is in there was written by a process that the guest may have taken over.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from ... import errors, files, untrusted

if TYPE_CHECKING:
    from collections.abc import Iterator

# What swtpm makes there for a TPM 2.0, besides temporary files, which are worthless once it has ended.
KNOWN = frozenset({"tpm2-00.permall", "tpm2-00.savestate", "tpm2-00.volatilestate", ".lock"})
LARGEST = 16 << 20  # bytes of one file; that of a TPM has a few KB


def hand_over(directory: str, uid: int, gid: int) -> None:
    """Give it to the guest's user; an empty one, for a new TPM, if there is none. Raises HostError."""
    try:
        files.make_directory(os.path.dirname(directory), 0o700)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        _own(directory, uid, gid)
    except OSError as exc:
        raise errors.HostError(
            f"Cannot give {directory} to user {uid}: {exc.strerror}", hint=files.hint(exc)
        ) from exc


def give_back(directory: str) -> None:
    """Give it back to root. Idempotent. Raises HostError."""
    try:
        _own(directory, os.geteuid(), os.getegid())
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise errors.HostError(f"{directory} can't be given back: {exc.strerror}") from exc


def _own(directory: str, uid: int, gid: int) -> None:
    """Make it that user's, with swtpm's own files in it; whatever else is there is removed."""
    with _opened(directory) as fd:
        os.fchown(fd, os.geteuid(), os.getegid())  # from here on nobody else changes what is in it
        os.fchmod(fd, 0o700)
        for name in os.listdir(fd):
            if name not in KNOWN or not _owned(name, fd, uid, gid):
                _remove(name, directory, fd)
        os.fchown(fd, uid, gid)


def _owned(name: str, directory: int, uid: int, gid: int) -> bool:
    """Make one file that user's; False if it is no file that swtpm has made."""
    try:
        file = untrusted.open_regular(name, dir_fd=directory)
    except untrusted.Unfit:
        return False
    try:
        if os.fstat(file).st_nlink != 1:
            return False
        os.fchmod(file, 0o600)
        os.fchown(file, uid, gid)
        return True
    finally:
        os.close(file)


def _remove(name: str, directory: str, fd: int) -> None:
    try:
        os.unlink(name, dir_fd=fd)
    except IsADirectoryError:
        files.remove_tree(f"{directory}/{name}")


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
