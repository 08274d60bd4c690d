# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of one network's dnsmasq: its configuration, its lists, and the leases, which it writes itself."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from ... import errors, files, layout, untrusted
from . import dnsmasq, prerequisites

if TYPE_CHECKING:
    from ...model.network import Network
    from .netrecord import NetRecord


def update(net: NetRecord, network: Network) -> set[str]:
    """Bring the files up to date; returns the paths of those that changed. Raises HostError."""
    mine = dnsmasq.files_in(net.runtime, net.state_directory)
    account = prerequisites.account(net.shared.settings, net.shared.services.facts)
    changed = set()
    try:
        layout.ensure(net.shared.services.paths)
        files.make_directory(net.runtime, 0o755)
        files.make_directory(net.state_directory, 0o710)
        _own_leases(net.state_directory, mine.leases, account)
    except OSError as exc:
        raise errors.HostError(f"Cannot make the directories of network {net.name}: {exc}") from exc
    for path, text in (
        (mine.config, dnsmasq.config(network, mine)),
        (mine.hosts, dnsmasq.hosts(network, net.ports)),
        (mine.names, dnsmasq.names(network)),
    ):
        if content(path) != text:
            files.write(path, text.encode(), mode=0o644)
            changed.add(path)
    return changed


def _own_leases(directory: str, path: str, account: prerequisites.Account) -> None:
    """Create the one file that dnsmasq may write, changing it in place, in a directory that it doesn't own.

    So a compromised dnsmasq can't fill the directory. (An older virtd gave it the directory.) Raises OSError.
    """
    os.chown(directory, os.geteuid(), account.gid)
    os.chmod(directory, 0o710)
    for entry in os.scandir(directory):
        if entry.path != path or not entry.is_file(follow_symlinks=False):
            files.remove_tree(entry.path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
    fd = untrusted.open_regular(path)
    try:
        os.fchown(fd, account.uid, account.gid)
    finally:
        os.close(fd)


def content(path: str) -> str | None:
    """A file's text; None if it can't be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):
        return None
