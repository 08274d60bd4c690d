# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit of a guest's TPM is made of: swtpm's arguments, its sandbox, and the socket that it serves.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from ... import errors
from ...children.hardening import HARDENED, LIBRARIES, Property
from . import sandbox, tpmstate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .prerequisites import Account

MEMORY, TASKS, FILES = 128 << 20, 8, 64  # it was seen to use 7 MB, 1 and 8
MESSAGES = 100  # lines in half a minute


def argv(argv0: str, directory: str) -> tuple[str, ...]:
    """Without --flags=startup-*: the guest's firmware starts its TPM, and one that is started twice takes that for a
    power cut.
    """
    state = f"dir={directory},mode=0600"
    return (argv0, "socket", "--tpm2", "--tpmstate", state, "--ctrl", "type=unixio,fd=0", "--terminate")


def properties(directory: str, toplevel: list[str], systemd: int, *, own_user: bool = True) -> list[Property]:
    """Those of its unit: it sees programs, and what it keeps."""
    covered = [(f"/{name}", "ro,mode=0755") for name in sandbox.hidden(toplevel)]
    return [
        *HARDENED,
        # Ubuntu confines swtpm to libvirt's directories and libvirt's QEMU. What is said here is stricter.
        ("AppArmorProfile", "(bs)", (True, "unconfined")),
        ("CapabilityBoundingSet", "t", 0),
        ("ProtectSystem", "s", "strict"),
        ("TemporaryFileSystem", "a(ss)", covered),
        ("BindReadOnlyPaths", "a(ssbt)", [(path, path, True, 0) for path in LIBRARIES]),
        ("BindPaths", "a(ssbt)", [(directory, directory, False, 0)]),
        ("ProtectProc", "s", "invisible"),
        ("ProcSubset", "s", "pid"),
        ("ProtectKernelModules", "b", True),
        ("ProtectHostname", "b", True),
        ("PrivateDevices", "b", True),
        ("PrivateNetwork", "b", True),
        ("PrivateIPC", "b", True),
        ("IPAddressDeny", "a(iayu)", sandbox.EVERYWHERE),
        ("KeyringMode", "s", "private"),
        ("MemoryDenyWriteExecute", "b", True),
        ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX"])),
        *sandbox.CALLS,
        ("UMask", "u", 0o077),
        ("MemoryMax", "t", MEMORY),
        ("TasksMax", "t", TASKS),
        ("LimitNOFILE", "t", FILES),
        ("LimitFSIZE", "t", tpmstate.LARGEST),
        ("LogRateLimitIntervalUSec", "t", 30_000_000),
        ("LogRateLimitBurst", "u", MESSAGES),
        ("TimeoutStopUSec", "t", 5_000_000),
        *sandbox.apart(systemd, own_user=own_user),
    ]


@contextlib.contextmanager
def listening(path: str, who: Account) -> Iterator[socket.socket]:
    """The socket that QEMU connects to, as the guest's user. Raises HostError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            listener.bind(path)
            os.chown(path, who.uid, who.gid, follow_symlinks=False)
            listener.listen(1)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {path}: {exc.strerror}") from exc
        yield listener
