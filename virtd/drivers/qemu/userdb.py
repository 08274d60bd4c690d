# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names for the users and groups of guests: records in /run/userdb, which nss-systemd(8) reads.

Without them systemd runs nothing as such a user (User= takes a number, but of a known user), and `ps` and `ls` show
numbers. For each user there are `NAME.user` and `NAME.group`, and links to these by number
(systemd-userdbd.service(8); for the fields see USER_RECORD and GROUP_RECORD in systemd's documentation). None of it
is secret, and none of it lets anybody log in.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from typing import NamedTuple

import msgspec

from ... import errors, files

PREFIX = "vm-"
LONGEST = 31  # characters of a user's name: utmp(5) has room for no more
KINDS = ("user", "group")
SERVICE = "org.virtd1"  # the service that the records belong to


class Named(NamedTuple):
    """One record: the user's (and group's) name and number."""

    name: str
    uid: int


def name_of(domain: str) -> str:
    """The user's name, made of the domain's, or of its beginning and a checksum if that is too long."""
    name = PREFIX + domain
    # No domain has a "+" in its name.
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}+{zlib.crc32(domain.encode()):08x}"


def add(directory: str, who: Named, domain: str) -> None:
    """Make sure that the records exist. Raises HostError."""
    try:
        if not os.path.isdir(directory):
            os.makedirs(directory, exist_ok=True)
            os.chmod(directory, 0o755)
        for kind, fields in zip(KINDS, _fields(who, domain), strict=True):
            path = f"{directory}/{who.name}.{kind}"
            if _read(path) != (content := _encode(fields)):
                files.write(path, content, mode=0o644)
            _link(f"{who.name}.{kind}", f"{directory}/{who.uid}.{kind}")
    except OSError as exc:
        raise errors.HostError(
            f"Cannot name user {who.name} in {directory}: {exc.strerror}", hint=files.hint(exc)
        ) from exc


def is_whole(directory: str, who: Named, domain: str) -> bool:
    """Whether all of a user's records exist and are correct."""
    return all(
        _read(f"{directory}/{name}.{kind}") == _encode(fields)
        for kind, fields in zip(KINDS, _fields(who, domain), strict=True)
        for name in (who.name, str(who.uid))
    )


def uid_of(directory: str, name: str) -> int | None:
    """The number in virtd's record of that name; None if there is none."""
    return _uid(_read(f"{directory}/{name}.user"))


def remove(directory: str, who: Named) -> None:
    """Remove them, except those that belong to another user by now. Idempotent. Raises HostError."""
    for kind in KINDS:
        link, path = f"{directory}/{who.uid}.{kind}", f"{directory}/{who.name}.{kind}"
        if os.path.islink(link) and os.readlink(link) == f"{who.name}.{kind}":
            files.remove(link)
        if os.path.islink(path) or _uid(_read(path)) in (None, who.uid):
            files.remove(path)


def listing(directory: str) -> set[str]:
    """The directory's entries, for `mentioned` and `left_over`: read once for any number of users."""
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


def mentioned(listed: set[str], who: Named) -> bool:
    """Whether each of a user's records has an entry."""
    return all(f"{name}.{kind}" in listed for name in who for kind in KINDS)


def left_over(directory: str, listed: set[str], needed: set[Named]) -> list[Named]:
    """Users with records of virtd that aren't `needed`."""
    found = set()
    names = {str(part) for who in needed for part in who}
    for entry in sorted(listed):
        name, _, kind = entry.rpartition(".")
        path = f"{directory}/{entry}"
        if kind not in KINDS or name in names:
            continue
        if name.startswith(PREFIX):
            if (uid := _uid(_read(path))) is not None:
                found.add(Named(name, uid))
        elif name.isdecimal() and os.path.islink(path):
            target, _, _ = os.readlink(path).rpartition(".")
            if target.startswith(PREFIX) and (_uid(_read(path)) is not None or not os.path.exists(path)):
                found.add(Named(target, int(name)))
    return sorted(found)


def unfinished(directory: str, listed: set[str]) -> list[str]:
    """The paths of what `add` has left where a crash cut it off; nobody may be at work there."""
    found = []
    for entry in sorted(listed):
        path = f"{directory}/{entry}"
        name = files.finished(entry)
        if name.rpartition(".")[2] not in KINDS:
            continue
        if name.startswith(PREFIX) or (os.path.islink(path) and os.readlink(path).startswith(PREFIX)):
            found.append(path)
    return found


def _fields(who: Named, domain: str) -> tuple[dict[str, object], dict[str, object]]:
    user = {
        "userName": who.name,
        "uid": who.uid,
        "gid": who.uid,
        "realName": f"Domain {domain} of virtd",
        "homeDirectory": "/",
        "shell": "/usr/sbin/nologin",
        "locked": True,
        "disposition": "dynamic",
        "service": SERVICE,
    }
    group = {
        "groupName": who.name,
        "gid": who.uid,
        "description": f"Domain {domain} of virtd",
        "disposition": "dynamic",
        "service": SERVICE,
    }
    return user, group


def _encode(fields: dict[str, object]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(65536)
    except OSError:
        return b""


def _uid(content: bytes) -> int | None:
    """The ID in this record, if it is one of virtd's."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError):
        fields = msgspec.json.decode(content)
        if fields["service"] == SERVICE:
            return int(fields["gid"])
    return None


def _link(target: str, path: str) -> None:
    """Make a symbolic link, replacing whatever is there."""
    with contextlib.suppress(OSError):
        if os.readlink(path) == target:
            return
    temporary = files.unfinished(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.rename(temporary, path)
