# SPDX-License-Identifier: LGPL-2.1-or-later
"""What no child of any driver may do. A driver adds what its own children don't need.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5).
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
    # A core dump of a guest's memory, or of whatever was read from an image, is nobody's business.
    ("LimitCORE", "t", 0),
)

# What programs need of the host's file system; the rest of it is hidden behind empty directories.
KEPT = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "proc", "sys", "dev", "nix"})
LIBRARIES = ("/etc/ld.so.cache", "/etc/alternatives")

# What no program that we start asks of the kernel, for SystemCallFilter=.
FILTERED = (
    "@clock", "@cpu-emulation", "@debug", "@keyring", "@module", "@mount", "@obsolete", "@raw-io", "@reboot",
    "@resources", "@swap",
)  # fmt: skip

# For a tool that needs nothing but a unix socket, and is over in a moment.
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
