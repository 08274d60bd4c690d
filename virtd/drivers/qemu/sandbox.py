# SPDX-License-Identifier: LGPL-2.1-or-later
"""The properties of a guest's unit: what it may see and do.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...children.hardening import HARDENED, KEPT, LIBRARIES, Property
from . import directory
from .devices import assembly
from .limits import memory_max, tasks_max

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...model.domain import Domain
    from .devices.device import Device

RESOLVER = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")
PRIVATE_PIDS_SINCE = 257  # systemd

# What systemd lets any service do, less some, see `systemd-analyze syscall-filter`. QEMU 10.0 under TCG, with disks,
# networks, VNC and block jobs, was seen to make 64 different calls, all of which are left; KVM is ioctl(2) and no
# other. It tries io_uring, whose operations escape the filter, and does without. Its own filter (-sandbox) refuses
# more. A refused call fails and kills nobody, because a library may try it. MemoryDenyWriteExecute= isn't possible:
# TCG writes the code that it runs.
ALLOWED_CALLS = ("@system-service", "seccomp")
REFUSED_CALLS = ("@privileged", "@resources", "@keyring", "@obsolete", "personality", "process_vm_readv",
                 "process_vm_writev", "pidfd_getfd", "kcmp", "userfaultfd", "name_to_handle_at",
                 "io_uring_setup", "io_uring_enter", "io_uring_register")  # fmt: skip
EPERM = 1
CALLS: tuple[Property, ...] = (
    ("SystemCallFilter", "(bas)", (True, list(ALLOWED_CALLS))),
    ("SystemCallFilter", "(bas)", (False, list(REFUSED_CALLS))),
    ("SystemCallErrorNumber", "i", EPERM),
)
EVERYWHERE = [(2, bytes(4), 0), (10, bytes(16), 0)]  # AF_INET and AF_INET6, as IPAddressDeny= has them


def properties(
    domain: Domain,
    runtime: str,
    *,
    toplevel: list[str],
    devices: list[str],
    stop_after: float,
    program: Sequence[str] = (),
    has: Sequence[Device] | None = None,
    own_user: bool = True,
    systemd: int = PRIVATE_PIDS_SINCE,
    kvm: bool = False,
    memory_overhead: int | None = None,
    tasks_overhead: int = 0,
) -> list[Property]:
    """Properties for StartTransientUnit.

    `toplevel`: the names in `/`; `program`: hidden paths that QEMU itself needs; `devices`: those it
    may open besides its disks; `stop_after`: seconds that host shutdown gives it; `has`: the guest's own devices, as
    the definition has them unless given; `own_user`: it runs as a user that nobody else runs as; `systemd`: its
    version; the overheads are those of virtd.toml.
    """
    has = assembly.assemble(domain, "") if has is None else has
    network = any(device.uses_ip for device in has)
    files = [file for device in has for file in device.files()]
    covered = [(f"/{name}", "ro,mode=0755") for name in hidden(toplevel)]
    read_only = [path for path in (domain.boot.kernel, domain.boot.initrd) if path]
    read_only += dict.fromkeys(file.path for file in files if not file.writes)
    writable = [file.path for file in files if file.writes]
    disks = [path for device in has for path in device.host_devices()]
    optional = (*LIBRARIES, *(RESOLVER if network else ()), stop_helper(runtime))
    families = ["AF_UNIX", "AF_INET", "AF_INET6"] if network else ["AF_UNIX"]
    found: list[Property] = [
        *HARDENED,
        ("CapabilityBoundingSet", "t", 0),
        ("ProtectSystem", "s", "strict"),
        ("TemporaryFileSystem", "a(ss)", covered),
        (
            "BindReadOnlyPaths",
            "a(ssbt)",
            # That they exist is checked before the start. Later one may have been moved or unmounted, which mustn't
            # fail ExecStop=, for which all of this is set up once more: the guest's plug would be pulled.
            [_bind(path, missing_ok=True) for path in (*program, *read_only, *optional)],
        ),
        ("BindPaths", "a(ssbt)", [_bind(runtime)] + [_bind(path, missing_ok=True) for path in writable]),
        # Hides other users' processes; with PrivatePIDs=, where available, no others are visible at all.
        ("ProtectProc", "s", "invisible"),
        # Of /proc it sees only processes. This also spares systemd a mount for each file that
        # ProtectKernelTunables= would have to cover: a quarter of what the whole sandbox costs.
        ("ProcSubset", "s", "pid"),
        ("ProtectKernelModules", "b", True),
        ("PrivateIPC", "b", True),
        ("ProtectHostname", "b", True),
        ("KeyringMode", "s", "private"),
        ("RestrictAddressFamilies", "(bas)", (True, families)),
        *CALLS,
        ("UMask", "u", 0o077),
        ("LimitNOFILE", "t", 65536),
        ("OOMPolicy", "s", "continue"),
        ("TimeoutStopUSec", "t", int((stop_after + 10) * 1_000_000)),
        # At host shutdown systemd stops the unit itself, with or without virtd: the guest is asked first.
        ("ExecStop", "a(sasb)", [_stop_command(runtime, stop_after)]),
    ]
    found += apart(systemd, own_user=own_user)
    if not network:
        found += [("IPAddressDeny", "a(iayu)", EVERYWHERE)]
    if (memory := memory_max(domain, kvm=kvm, overhead=memory_overhead)) is not None:
        found += [("MemoryMax", "t", memory)]
    if (tasks := tasks_max(domain, overhead=tasks_overhead)) is not None:
        found += [("TasksMax", "t", tasks)]
    if after := sorted({unit for device in has for unit in device.after()}):
        found += [("After", "as", after)]
    if devices:
        found += [("DevicePolicy", "s", "closed")]
    else:
        found += [("PrivateDevices", "b", True)]
    if allowed := [*devices, *disks]:
        found += [("DeviceAllow", "a(ss)", [(device, "rw") for device in allowed])]
    return found


def apart(systemd: int, *, own_user: bool) -> list[Property]:
    """What keeps a process from others, as far as this version of systemd, and its user, allow."""
    found: list[Property] = [("PrivatePIDs", "s", "yes")] if systemd >= PRIVATE_PIDS_SINCE else []
    return [*found, ("RemoveIPC", "b", True)] if own_user else found


def hidden(toplevel: Iterable[str]) -> list[str]:
    """The names in `/` that guests don't see."""
    return [name for name in toplevel if name not in KEPT]


def _bind(path: str, *, missing_ok: bool = False) -> tuple[str, str, bool, int]:
    return (path, path, missing_ok, 0)


def stop_helper(runtime: str) -> str:
    """Where the package's scriptlet puts a copy of the helper that stops guests, when the package is erased: beside
    the guests' directories, because guests may write to those.
    """
    return f"{os.path.dirname(os.path.dirname(runtime))}/guest-stop.py"


def _stop_command(runtime: str, seconds: float) -> tuple[str, list[str], bool]:
    helper = "/usr/libexec/virtd-guest-stop"
    socket = directory.shutdown_socket(runtime)
    # systemd runs ExecStop for a process that has ended by itself too, then without $MAINPID: nothing to do, and no
    # time to spend on a Python start. When the package is erased under running guests, its scriptlet leaves them a
    # copy of the helper. (Neither "$" nor ";" nor quotes here: systemd 252 escapes them in the unit's file,
    # and then doesn't know the escapes when it reads the file again.)
    script = (
        "printenv MAINPID >/dev/null || exit 0 && "
        f"test -x {helper} && exec {helper} {socket} {seconds:g} || "
        f"exec python3 -IS {stop_helper(runtime)} {socket} {seconds:g}"
    )
    return ("/bin/sh", ["/bin/sh", "-c", script], False)
