# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's own directory in /run. QEMU creates its sockets there at its start, and nothing afterwards.

So it is given back to root as soon as QEMU answers: a QEMU that its guest has taken over can neither fill /run nor
replace a socket. The guest's user may still search it, because the unit's ExecStop= connects to a socket.
"""

from __future__ import annotations

import contextlib
import os

PROVIDED = "provided"
# events.*: of a guest that an older virtd started; guest-stop.py: put there when the package is erased.
KNOWN = frozenset(
    {"qmp.sock", "shutdown.sock", "vnc.sock", "tpm.sock", PROVIDED, "events.in", "events.out", "guest-stop.py"}
)
SEED, SMBIOS, IGNITION = "seed.iso", "smbios", "ignition"
MODE = 0o710


def monitor_socket(runtime: str) -> str:
    return f"{runtime}/qmp.sock"


def shutdown_socket(runtime: str) -> str:
    """A second monitor, for the unit's ExecStop=: a QMP monitor serves one client, and virtd uses the first."""
    return f"{runtime}/shutdown.sock"


def vnc_socket(runtime: str) -> str:
    return f"{runtime}/vnc.sock"


def provided(runtime: str, name: str = "") -> str:
    """A file for the guest's system, which root has written, see provisioning.py; without a name, where they are."""
    return f"{runtime}/{PROVIDED}/{name}".rstrip("/")


def tpm_socket(runtime: str) -> str:
    """Where QEMU finds the guest's TPM; virtd makes it, see swtpm.py."""
    return f"{runtime}/tpm.sock"


def events(runtime: str) -> str:
    """The stem of two files, `.in` and `.out`, to which QEMU wrote every event under an early virtd 0.1.0."""
    return f"{runtime}/events"


def is_open(path: str) -> bool:
    """Whether it still belongs to the guest's user; False if there is none."""
    try:
        return os.lstat(path).st_uid != os.geteuid()
    except OSError:
        return False


def close(path: str) -> None:
    """Give it back to root, and remove what doesn't belong there. May take a while; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(fd, os.geteuid(), -1)
        os.fchmod(fd, MODE)
        for name in set(os.listdir(fd)) - KNOWN:
            _remove(name, fd)
    finally:
        os.close(fd)


def _remove(name: str, directory: int) -> None:
    import shutil  # 4 ms, and hardly ever needed

    with contextlib.suppress(OSError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            shutil.rmtree(name, ignore_errors=True, dir_fd=directory)
