# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening a file by a path no component of which anybody but root could replace.

When root is told a path and changes the file's owner, shows it to a guest or reads it, a user could otherwise put
something else in its place at that moment, by a link, a rename or a new file. So the path is walked one name at a
time, and a directory that others can write is refused. The result also holds for systemd, which resolves the same
path again when it sets up a sandbox, at the start of a unit and before its ExecStop=.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from . import errors, hostroot
from .text import word

if TYPE_CHECKING:
    from collections.abc import Iterator

LINKS = 40  # as many symbolic links as the kernel follows, path_resolution(7)
ACL = "system.posix_acl_access"
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS, _GROUP = 0o002, 0o020
EVERYBODY = -1
_ROOT = f"{hostroot.PREFIX}/"


class Reached(NamedTuple):
    """The file at the end of a path. `fd` is an O_PATH descriptor, see open(2); `path` contains no links."""

    fd: int
    path: str
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        return (self.status.st_dev, self.status.st_ino)

    @property
    def itself(self) -> str:
        """A path to this very file, whatever its path leads to by now; valid in this process while `fd` is open."""
        return f"/proc/self/fd/{self.fd}"


class Trust(Enum):
    """Who may be able to replace the file that is reached."""

    ROOT = "root"
    OWNER = "owner"  # nor anybody but the file's own owner, who could have put anything into it anyway
    ANYBODY = "anybody"


@contextlib.contextmanager
def reached(path: str, trust: Trust = Trust.ROOT) -> Iterator[Reached]:
    """Walk an absolute path, following links.

    Raises OSError like open(2), and HostError if somebody who isn't trusted could replace the file.
    """
    fd, canonical = _walk(path, trust)
    try:
        yield Reached(fd, canonical, os.fstat(fd))
    finally:
        os.close(fd)


def look(path: str, trust: Trust = Trust.ROOT) -> os.stat_result:
    """stat(2) of the file that `reached` finds, with its errors."""
    with reached(path, trust) as found:
        return found.status


def trouble(path: str) -> str:
    """Why `look` fails, for a person; "" if it doesn't."""
    try:
        look(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"no such file: {path}"
    except OSError as exc:
        return f"cannot open {path}: {exc.strerror}"
    except errors.HostError as exc:
        return exc.message
    return ""


def defined(path: str, source: str, key: str) -> os.stat_result:
    """`look` at the path in `key` of a definition. Raises InvalidDefinition."""
    try:
        return look(path)
    except OSError:
        raise errors.InvalidDefinition(source, key, trouble(path)) from None
    except errors.HostError as exc:
        raise errors.InvalidDefinition(source, key, exc.message, hint=exc.hint) from exc


def opened(path: str, flags: int) -> int:
    """open(2) of the file that `reached` finds, with its errors; the caller closes it."""
    with reached(path) as found:
        return os.open(found.itself, flags | os.O_CLOEXEC)


def require_directory(found: Reached) -> None:
    """Raise HostError if others could replace the directory's contents."""
    if (others := _others(found.fd, found.path, "what is", found.status)) is not None:
        raise others.error


def make_directory(path: str, mode: int) -> bool:
    """mkdir(2), with missing parents; False if the directory exists. Raises like `reached`."""
    try:
        with reached(path):
            return False
    except FileNotFoundError:
        pass
    above, name = os.path.split(path.rstrip("/"))
    make_directory(above, 0o755)
    with reached(above) as found:
        try:
            os.mkdir(name, mode, dir_fd=found.fd)
            os.chmod(name, mode, dir_fd=found.fd)  # our umask has restricted it
        except FileExistsError:
            return False
    return True


def _walk(path: str, trust: Trust) -> tuple[int, str]:
    pending, names, links = _names(path), list[str](), 0
    others: list[Others] = []
    here = os.open(_ROOT, _PATH | os.O_DIRECTORY)
    try:
        while pending:
            name = pending.pop()
            if name == ".." and not names:
                continue  # what is above the root is itself, also where the host's root isn't ours
            there = _step(name, here)
            try:
                status = os.fstat(there)
                asked = trust is not Trust.ANYBODY and name != ".."
                if asked and (found := _others(here, "/" + "/".join(names), name, status)) is not None:
                    if trust is Trust.ROOT:
                        raise found.error
                    others.append(found)
                if stat.S_ISLNK(status.st_mode):
                    if (links := links + 1) > LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    target = os.readlink("", dir_fd=there)
                    pending += _names(target)
                    if target.startswith("/"):
                        names.clear()
                        root = os.open(_ROOT, _PATH | os.O_DIRECTORY)
                        os.close(here)
                        here = root
                elif name == "..":
                    del names[-1:]
                    here, there = there, here
                else:
                    names.append(name)
                    here, there = there, here
            finally:
                os.close(there)
        if trust is Trust.OWNER:
            owner = os.fstat(here).st_uid
            for other in others:
                if other.user != owner:
                    raise other.error
    except BaseException:
        os.close(here)
        raise
    return here, "/" + "/".join(names)


def _names(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [name for name in path.split("/") if name not in ("", ".")][::-1]


def _step(name: str, here: int) -> int:
    try:
        # With O_DIRECTORY the kernel triggers automounts; O_PATH alone doesn't.
        return os.open(name, _PATH | os.O_DIRECTORY, dir_fd=here)
    except NotADirectoryError:
        return os.open(name, _PATH, dir_fd=here)


class Others(NamedTuple):
    """Who could replace a name in a directory: one user, or EVERYBODY for several; and the error that says so."""

    user: int
    error: errors.HostError


def _others(here: int, directory: str, name: str, entry: os.stat_result) -> Others | None:
    """Who else could replace `entry`, which is `name` in the open directory `here`."""
    status = os.fstat(here)
    ours = (0, os.geteuid())
    if user := _mounted_by(status, entry):
        text = f"{directory.rstrip('/')}/{name} is a file system of user {user}, who could replace what is in it"
        return Others(user, errors.HostError(text, hint="Use a file elsewhere."))
    if status.st_uid not in ours:
        text = f"{directory} belongs to user {status.st_uid}, who could replace {name} in it"
        hint = f"Only root may write there: chown root {word(directory)}; or use a file elsewhere."
        user = EVERYBODY if status.st_mode & (_OTHERS | _GROUP) else status.st_uid
        return Others(user, errors.HostError(text, hint=hint))
    if status.st_mode & _OTHERS:
        who, what = "everybody", f"chmod o-w {word(directory)}"
    elif status.st_mode & _GROUP and (status.st_gid or _has_acl(here)):
        # With an access control list these bits are the most that the list may grant, see acl(5).
        who, what = f"group {status.st_gid} or an ACL", f"chmod g-w {word(directory)}"
    else:
        return None
    # As in /tmp: only its owner can rename or remove it. But anybody could have hard-linked a file.
    alone = bool(status.st_mode & stat.S_ISVTX) and (stat.S_ISDIR(entry.st_mode) or entry.st_nlink == 1)
    if alone and entry.st_uid in ours:
        return None
    text = f"{directory} can be written by {who}, who could replace {name} in it"
    hint = f"Only root may write there: {what}; or use a file elsewhere."
    return Others(entry.st_uid if alone else EVERYBODY, errors.HostError(text, hint=hint))


def _has_acl(fd: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", ACL)
    except OSError:
        return False
    return True


def _mounted_by(above: os.stat_result, entry: os.stat_result) -> int:
    """The user who serves the file system mounted at `entry`, fuse(4); 0 for root, or if none is mounted there."""
    if entry.st_dev == above.st_dev or os.major(entry.st_dev):
        return 0
    from . import mountinfo  # few file systems belong to a user

    device = f"{os.major(entry.st_dev)}:{os.minor(entry.st_dev)}"
    options = next((mount.options for mount in mountinfo.mounts() if mount.device == device), ())
    return next((int(one[8:]) for one in options if one.startswith("user_id=")), 0)
