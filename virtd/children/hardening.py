# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sandbox properties for the children of all drivers. Each driver adds what its own children don't need.

Names and types of the properties are from org.freedesktop.systemd1(5), their meanings in systemd.exec(5).
"""

from __future__ import annotations

from typing import Any

Property = tuple[str, str, Any]

CLONE_NEWCGROUP = 0x02000000  # clone(2)

HARDENED: tuple[Property, ...] = (
    ("NoNewPrivileges", "b", True),
    ("ProtectKernelTunables", "b", True),
    ("ProtectKernelLogs", "b", True),
    ("ProtectControlGroups", "b", True),
    ("ProtectClock", "b", True),
    ("RestrictSUIDSGID", "b", True),
    ("RestrictRealtime", "b", True),
    # "None" would be written as nothing, which a daemon-reload takes for "no restriction". Control group
    # namespaces reveal least, and without CAP_SYS_ADMIN not even these can be made.
    ("RestrictNamespaces", "t", CLONE_NEWCGROUP),
    ("LockPersonality", "b", True),
    ("SystemCallArchitectures", "as", ["native"]),
    # A core dump would expose a guest's memory, or data read from an image.
    ("LimitCORE", "t", 0),
)

# The parts of the host's file system that programs need; the rest is hidden behind empty directories.
KEPT = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "proc", "sys", "dev", "nix"})
LIBRARIES = ("/etc/ld.so.cache", "/etc/alternatives")

# System calls that none of our programs needs, for SystemCallFilter=.
FILTERED = (
    "@clock", "@cpu-emulation", "@debug", "@keyring", "@module", "@mount", "@obsolete", "@raw-io", "@reboot",
    "@resources", "@swap",
)  # fmt: skip

# For a short-lived tool that needs nothing but a UNIX socket.
TOOL: tuple[Property, ...] = (
    *HARDENED,
    ("CapabilityBoundingSet", "t", 0),
    ("ProtectSystem", "s", "strict"),
    ("ProtectHome", "s", "yes"),
    ("PrivateDevices", "b", True),
    ("PrivateNetwork", "b", True),
    ("ProtectProc", "s", "invisible"),
    ("ProcSubset", "s", "pid"),
    ("ProtectKernelModules", "b", True),
    ("ProtectHostname", "b", True),
    ("MemoryDenyWriteExecute", "b", True),
    ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX"])),
    ("SystemCallFilter", "(bas)", (False, [*FILTERED])),
    ("SystemCallErrorNumber", "i", 1),
    ("UMask", "u", 0o077),
    ("MemoryMax", "t", 256 << 20),
    ("TasksMax", "t", 16),
)
