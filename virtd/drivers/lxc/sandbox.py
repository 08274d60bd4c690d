# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit that a container runs in: what LXC may see and do, and with it the container, should it break out.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5). What would be in the
container's way isn't here: NoNewPrivileges= (no sudo in it), ProtectProc= and ProtectKernelTunables= (the kernel
lets nobody mount a /proc of its own who sees only a part of the host's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import config

if TYPE_CHECKING:
    from ...model import container as model

Property = tuple[str, str, Any]

# What liblxc itself needs of the host; the rest of the file system is hidden behind empty directories.
KEPT = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "proc", "sys", "dev", "nix"})
LIBRARIES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/apparmor.d")

# capabilities(7), by number, for those that LXC needs to make an unprivileged container. It has none of them inside:
# there the kernel gives it all of a user namespace's own.
CAPABILITIES = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6,
    "SETUID": 7, "SETPCAP": 8, "NET_ADMIN": 12, "SYS_CHROOT": 18, "SYS_PTRACE": 19, "SYS_ADMIN": 21,
    "SYS_RESOURCE": 24, "MKNOD": 27, "SETFCAP": 31, "MAC_ADMIN": 33,
}  # fmt: skip


def properties(
    container: model.Container, host: config.Host, *, toplevel: list[str], stop_after: float
) -> list[Property]:
    """Properties for StartTransientUnit.

    `toplevel`: the names in `/`; `stop_after`: seconds that host shutdown gives it.
    """
    # /run has to be written to: LXC keeps its locks there.
    hidden = [(f"/{name}", f"{'rw' if name == 'run' else 'ro'},mode=0755") for name in toplevel if name not in KEPT]
    sources = [mount.source for mount in container.mount]
    stop = ("/bin/sh", ["/bin/sh", f"{host.runtime}/stop"], False)
    found: list[Property] = [
        ("Delegate", "b", True),
        ("TemporaryFileSystem", "a(ss)", hidden),
        ("BindReadOnlyPaths", "a(ssbt)", [(path, path, True, 0) for path in LIBRARIES]),
        ("BindPaths", "a(ssbt)", [(path, path, False, 16384) for path in (host.runtime, host.root, *sources)]),
        ("DevicePolicy", "s", "strict"),
        ("DeviceAllow", "a(ss)", config.devices(container)),
        ("ProtectKernelLogs", "b", True),
        ("SystemCallFilter", "(bas)", (False, ["@module", "@raw-io", "@swap", "kexec_load", "kexec_file_load"])),
        ("SystemCallErrorNumber", "i", 1),  # EPERM; without it the caller is killed
        ("UMask", "u", 0o022),
        ("LimitNOFILE", "t", 524288),
        ("OOMPolicy", "s", "continue"),
        ("SendSIGHUP", "b", False),
        ("TimeoutStopUSec", "t", int((stop_after + 15) * 1_000_000)),
        ("ExecStop", "a(sasb)", [stop]),
    ]
    if not container.privileged:
        found.append(("CapabilityBoundingSet", "t", sum(1 << number for number in CAPABILITIES.values())))
    limits = container.limits
    if limits.memory_bytes is not None:
        found.append(("MemoryMax", "t", limits.memory_bytes))
    if limits.cpus is not None:
        found.append(("CPUQuotaPerSecUSec", "t", int(limits.cpus * 1_000_000)))
    # systemd's own default, 15 % of what the host can have, is none of a container's business.
    found.append(("TasksMax", "t", limits.pids if limits.pids is not None else (1 << 64) - 1))
    return found
