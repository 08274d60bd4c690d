# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units that jobs run in. Images come from anywhere: their readers see the job's own files and no others.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...children.hardening import FILTERED, HARDENED, KEPT, LIBRARIES, Property

if TYPE_CHECKING:
    from collections.abc import Iterable

MEMORY = 1 << 30
CAP_DAC_READ_SEARCH = 1 << 2
# lvm(8) makes device nodes and talks to the kernel's device mapper.
LVM_CAPABILITIES = sum(
    1 << number
    for number in (
        0,
        1,
        2,
        3,
        14,
        18,
        21,
        27,
    )  # CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER IPC_LOCK SYS_CHROOT SYS_ADMIN MKNOD
)

_LIMITS: list[Property] = [
    *HARDENED,
    ("UMask", "u", 0o077),
    ("LimitNOFILE", "t", 1024),
    ("TasksMax", "t", 128),
    # Guests come first.
    ("CPUWeight", "t", 50),
    ("IOWeight", "t", 50),
    ("TimeoutStopUSec", "t", 10_000_000),
]


def properties(
    readable: Iterable[str], writable: Iterable[str], *, toplevel: Iterable[str], devices: Iterable[str] = ()
) -> list[Property]:
    """For qemu-img and the copying program; `toplevel`: the names in `/`.

    The process can read whatever it sees, whoever owns it (such as a user's image that is imported), but write only
    to files of the guests' user.
    """
    nodes = sorted(devices)
    kept = KEPT if nodes else KEPT - {"sys"}  # where qemu-img reads a device's largest transfer
    found: list[Property] = [
        *_LIMITS,
        ("CapabilityBoundingSet", "t", CAP_DAC_READ_SEARCH),
        ("AmbientCapabilities", "t", CAP_DAC_READ_SEARCH),
        ("ProtectSystem", "s", "strict"),
        # In the formats that are converted, an image can name any file as a part of itself.
        ("TemporaryFileSystem", "a(ss)", [(f"/{name}", "ro,mode=0755") for name in toplevel if name not in kept]),
        (
            "BindReadOnlyPaths",
            "a(ssbt)",
            [(path, path, False, 0) for path in readable] + [(path, path, True, 0) for path in LIBRARIES],
        ),
        ("ProtectProc", "s", "invisible"),
        ("ProcSubset", "s", "pid"),  # spares systemd a mount for each file of ProtectKernelTunables=
        ("ProtectKernelModules", "b", True),
        ("ProtectHostname", "b", True),
        ("PrivateNetwork", "b", True),
        ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX"])),
        # With the capability, open_by_handle_at(2) could reach any file of a file system of which one is visible.
        ("SystemCallFilter", "(bas)", (False, ["open_by_handle_at", *FILTERED])),
        ("SystemCallErrorNumber", "i", 1),
        ("MemoryMax", "t", MEMORY),
    ]
    if binds := [(path, path, False, 0) for path in writable]:
        found.append(("BindPaths", "a(ssbt)", binds))  # an empty list would reset all of the above
    if nodes:
        found += [("DevicePolicy", "s", "closed"), ("DeviceAllow", "a(ss)", [(node, "rw") for node in nodes])]
    else:
        found.append(("PrivateDevices", "b", True))
    return found


def privileged() -> list[Property]:
    """For the tools of LVM, which run as root."""
    return [
        *_LIMITS,
        ("CapabilityBoundingSet", "t", LVM_CAPABILITIES),
        ("ProtectSystem", "s", "full"),
        ("ReadWritePaths", "as", ["-/etc/lvm"]),  # backups of each volume group's metadata
        ("ProtectHome", "s", "yes"),
        ("ProtectProc", "s", "invisible"),
        ("ProtectKernelModules", "b", True),
        ("ProtectHostname", "b", True),
        ("MemoryDenyWriteExecute", "b", True),
        ("PrivateNetwork", "b", True),
        # A volume group may be on any block device, and its volumes' nodes have to be made.
        ("DevicePolicy", "s", "closed"),
        ("DeviceAllow", "a(ss)", [("block-*", "rwm"), ("/dev/mapper/control", "rw")]),
        ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX", "AF_NETLINK"])),  # syslog and udev
        ("SystemCallFilter", "(bas)", (False, [*FILTERED])),
        ("SystemCallErrorNumber", "i", 1),
        ("MemoryMax", "t", MEMORY),
    ]
