# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit that a container runs in: what LXC may see and do, and thus what a container could if it broke out.

Names and types of the properties: org.freedesktop.systemd1(5); what they mean: systemd.exec(5). What would hinder the
container is left out: NoNewPrivileges= (it could have no sudo), ProcSubset= and ProtectKernelTunables= (the kernel
lets nobody mount a /proc of its own who sees only a part of the host's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...children.hardening import HARDENED, KEPT, LIBRARIES, Property
from . import config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model import container as model


NEEDED = (*LIBRARIES, "/etc/apparmor.d")  # by liblxc itself

# capabilities(7), by number.
CAPABILITIES = {
    "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8, "NET_ADMIN": 12,
    "SYS_CHROOT": 18, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SETFCAP": 31, "MAC_ADMIN": 33,
}  # fmt: skip


# What it takes to have a container's IDs in a user namespace: to write its maps, user_namespaces(7). Whoever is in it
# has all capabilities of that, and none of the host's.
MAPPING = ("SETGID", "SETUID")
CLONE_NEWUSER = 0x10000000
NAMES = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf")  # an archive may name users in an access control list
EVERY_DESCRIPTOR = 1 << 30  # systemd takes what fs.nr_open allows
MAKING_LIMIT = 3600  # seconds that unpacking may take


def making(target: str, source: str, *, toplevel: list[str]) -> list[Property]:
    """For the program that unpacks an archive, or copies directory `source`, into `target`: it sees nothing else."""
    search = ("DAC_READ_SEARCH",) if source else ()
    # Setuid programs are what it has to make.
    hardened = [entry for entry in HARDENED if entry[0] not in ("RestrictSUIDSGID", "RestrictNamespaces")]
    shown = [(path, path, True, 0) for path in (*NEEDED, *NAMES)] + ([(source, source, False, 0)] if source else [])
    return [
        *hardened,
        ("RestrictNamespaces", "t", CLONE_NEWUSER),
        ("CapabilityBoundingSet", "t", _bits((*MAPPING, *search))),
        ("TemporaryFileSystem", "a(ss)", [(f"/{name}", "ro,mode=0755") for name in toplevel if name not in KEPT]),
        ("ProtectSystem", "s", "strict"),
        ("BindReadOnlyPaths", "a(ssbt)", shown),
        ("BindPaths", "a(ssbt)", [(target, target, False, 0)]),
        ("ProtectProc", "s", "invisible"),
        ("ProcSubset", "s", "pid"),
        ("ProtectKernelModules", "b", True),
        ("ProtectHostname", "b", True),
        ("PrivateDevices", "b", True),
        ("PrivateNetwork", "b", True),
        ("PrivateIPC", "b", True),
        ("PrivateTmp", "b", True),
        ("RestrictAddressFamilies", "(bas)", (True, ["AF_UNIX"])),
        ("MemoryDenyWriteExecute", "b", True),
        # With the capability to search, open_by_handle_at(2) would reach any file of the file system.
        ("SystemCallFilter", "(bas)", (False, [
            "open_by_handle_at", "@clock", "@cpu-emulation", "@debug", "@keyring", "@module", "@mount", "@obsolete",
            "@raw-io", "@reboot", "@swap",
        ])),
        ("SystemCallErrorNumber", "i", 1),
        ("UMask", "u", 0o022),
        ("LimitNOFILE", "t", 1024),
        ("TasksMax", "t", 64),
        ("MemoryMax", "t", 1 << 30),
        # Guests come first.
        ("CPUWeight", "t", 50),
        ("IOWeight", "t", 50),
        ("RuntimeMaxUSec", "t", MAKING_LIMIT * 1_000_000),
        ("TimeoutStopUSec", "t", 10_000_000),
    ]  # fmt: skip


# What lxc-attach needs: to enter the namespaces (setns(2)) of processes that aren't root's, to become another user,
# and to move itself into their control group, which it does in a user namespace that has the host's root in it.
ENTERING = ("DAC_OVERRIDE", "SETFCAP", "SETGID", "SETUID", "SETPCAP", "SYS_CHROOT", "SYS_PTRACE", "SYS_ADMIN")
# What neither a container nor a command in one may do, in addition to LXC's own filter.
REFUSED = ["@module", "@obsolete", "@raw-io", "@swap", "kexec_load", "kexec_file_load"]
# Address families that no program in a container is known to need, and whose modules the kernel loads for anybody who
# asks. No namespace separates VSOCK: it leads to the host's guests. Bluetooth and CAN stay, for the host's network.
EXOTIC = [f"AF_{name}" for name in (
    "APPLETALK", "ATMPVC", "ATMSVC", "AX25", "CAIF", "IB", "IEEE802154", "IPX", "KCM", "LLC", "NETROM", "NFC",
    "PHONET", "QIPCRTR", "RDS", "ROSE", "RXRPC", "TIPC", "VSOCK", "X25",
)]  # fmt: skip
# Without CAP_SYS_NICE, which no container has that is in a user namespace, the kernel allows no real-time scheduling.
UNPRIVILEGED: tuple[Property, ...] = (
    ("RestrictAddressFamilies", "(bas)", (False, EXOTIC)),
    ("RestrictRealtime", "b", True),
)


def entering(runtime: str, *, privileged: bool, toplevel: list[str]) -> list[Property]:
    """For lxc-attach until it is in the container, where the container's own limits apply.

    The command inherits all of this, filters above all, so there must be nothing that the first program doesn't have.
    """
    hidden = [(f"/{name}", f"{'rw' if name == 'run' else 'ro'},mode=0755") for name in toplevel if name not in KEPT]
    found: list[Property] = [
        ("TemporaryFileSystem", "a(ss)", hidden),
        ("ProtectSystem", "s", "strict"),
        ("BindReadOnlyPaths", "a(ssbt)", [(path, path, True, 0) for path in NEEDED]),
        ("BindPaths", "a(ssbt)", [(runtime, runtime, False, 0)]),
        ("ReadWritePaths", "as", ["/run", "-/sys/fs/cgroup"]),
        ("PrivateDevices", "b", True),
        ("PrivateMounts", "b", True),
        # These four are of the unit's control group and mounts, and the command is in the container's.
        ("IPAddressDeny", "a(iayu)", [(2, bytes(4), 0), (10, bytes(16), 0)]),
        ("ProtectKernelTunables", "b", True),
        ("ProtectProc", "s", "invisible"),
        ("ProcSubset", "s", "pid"),
        ("ProtectKernelLogs", "b", True),
        ("ProtectKernelModules", "b", True),
        ("SystemCallFilter", "(bas)", (False, REFUSED)),
        ("SystemCallErrorNumber", "i", 1),
        ("UMask", "u", 0o022),
        ("LimitCORE", "t", 0),
    ]
    if not privileged:
        found += [("CapabilityBoundingSet", "t", _bits(ENTERING)), *UNPRIVILEGED]
    return found


def needed(container: model.Container, host: config.HostFacts) -> tuple[str, ...]:
    """The capabilities that LXC needs to make an unprivileged container.

    The container has none of them: LXC makes most of it with those that the kernel gives it in the new user
    namespace. Tried one by one with LXC 6.0.4: SETFCAP is for the host's root in a map, as in ENTERING; DAC_OVERRIDE
    removes control groups that the container's root has made, before it is started again; SYS_ADMIN is for setns(2),
    with which LXC looks for network interfaces at the end, for an idmapped mount, and for a volume's remount.
    """
    found = [*MAPPING, "DAC_OVERRIDE", "KILL", "SETFCAP", "SYS_ADMIN"]
    if container.networks:
        found.append("NET_ADMIN")
    if host.apparmor:
        found.append("MAC_ADMIN")
    return tuple(found)


def _bits(names: Iterable[str]) -> int:
    return sum(1 << CAPABILITIES[name] for name in names)


def properties(
    container: model.Container,
    host: config.HostFacts,
    limits: model.Limits,
    *,
    toplevel: list[str],
    stop_after: float,
) -> list[Property]:
    """Properties for StartTransientUnit.

    `limits`: see prerequisites.limits; `toplevel`: the names in `/`; `stop_after`: seconds that host shutdown gives
    it.
    """
    # /run has to be writable: LXC keeps its locks there.
    hidden = [(f"/{name}", f"{'rw' if name == 'run' else 'ro'},mode=0755") for name in toplevel if name not in KEPT]
    sources = [mount.source for mount in container.mount]
    stop = ("/bin/sh", ["/bin/sh", f"{host.runtime}/stop"], False)
    found: list[Property] = [
        ("Delegate", "b", True),
        ("TemporaryFileSystem", "a(ss)", hidden),
        ("BindReadOnlyPaths", "a(ssbt)", [(path, path, True, 0) for path in NEEDED]),
        ("BindPaths", "a(ssbt)", [(path, path, False, 16384) for path in (host.runtime, host.root, *sources)]),
        ("DevicePolicy", "s", "strict"),
        ("DeviceAllow", "a(ss)", config.devices(container)),
        ("PrivateMounts", "b", True),
        ("ProtectKernelLogs", "b", True),
        ("ProtectKernelModules", "b", True),
        ("SystemCallFilter", "(bas)", (False, REFUSED)),
        ("SystemCallErrorNumber", "i", 1),  # EPERM; without it the caller is killed
        ("UMask", "u", 0o022),
        # LXC listens on an abstract socket, which everybody on the host sees and may connect to, and ends, with its
        # container, when it has no descriptor left to accept with. So it may have as many as the kernel has;
        # the container itself gets the usual ones, see `config.text`.
        ("LimitNOFILE", "t", EVERY_DESCRIPTOR),
        ("OOMPolicy", "s", "continue"),
        ("SendSIGHUP", "b", False),
        ("TimeoutStopUSec", "t", int((stop_after + 15) * 1_000_000)),
        ("ExecStop", "a(sasb)", [stop]),
    ]
    if not container.privileged:
        found += [("CapabilityBoundingSet", "t", _bits(needed(container, host))), *UNPRIVILEGED]
        found.append(("ProtectProc", "s", "invisible"))
        # LXC finds in /dev what it gives to the container.
        if not container.device and not any(f"{source}/".startswith("/dev/") for source in sources):
            found.append(("PrivateDevices", "b", True))
    if limits.memory_bytes is not None:
        found.append(("MemoryMax", "t", limits.memory_bytes))
    if limits.cpus is not None:
        found.append(("CPUQuotaPerSecUSec", "t", int(limits.cpus * 1_000_000)))
    if limits.pids is not None:
        found.append(("TasksMax", "t", limits.pids))
    return found
