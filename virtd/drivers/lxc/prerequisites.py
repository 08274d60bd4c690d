# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the LXC driver must know about the host: programs, limits, and what a root file system holds."""

from __future__ import annotations

import os
import resource
import stat
import sys
from typing import TYPE_CHECKING

from ... import errors, hostroot, reach
from ...children import programs
from ...hints import do
from ...model import container as model
from ...model import size
from . import config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...hints import Hint
    from ...model.settings import Lxc

SECCOMP = ("/usr/share/lxc/config/common.seccomp", "/usr/local/share/lxc/config/common.seccomp")
APPARMOR = "/sys/module/apparmor/parameters/enabled"
PARSERS = ("/usr/sbin/apparmor_parser", "/sbin/apparmor_parser")  # without one LXC can't load a profile
# Where a command is looked for, since the container's own PATH isn't known before its program runs.
SEARCH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
LINKS = 40  # as many symbolic links in a row as the kernel follows


def program(name: str) -> str:
    """Where one of LXC's programs is. Raises HostError."""
    if (path := programs.find(name)) is not None:
        return path
    raise errors.HostError(f"LXC is missing: no {programs.PLACES[0]}/{name}", hint="Install lxc.")


def seccomp() -> str:
    """LXC's filter of system calls, besides which a container has only the unit's. Raises HostError."""
    for path in SECCOMP:
        if os.path.isfile(path):
            return path
    raise errors.HostError(
        f"LXC's seccomp profile is missing: no {SECCOMP[0]}",
        hint="Install the package that has it: liblxc-common on Debian, lxc-libs on Fedora.",
    )


def unpacker(job: str) -> tuple[str, ...]:
    """The command line of unpack.py."""
    here = os.path.dirname(os.path.abspath(__file__))
    return (os.path.realpath(sys.executable), "-IS", f"{here}/unpack.py", job)


def toplevel() -> list[str]:
    """The names in `/` that a sandbox may have to hide."""
    return sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False))


def apparmor() -> bool:
    """Whether the kernel has AppArmor enabled, and LXC can load a profile."""
    try:
        with open(APPARMOR, encoding="ascii") as file:
            enabled = file.read().strip() == "Y"
    except OSError:
        return False
    return enabled and any(os.access(path, os.X_OK) for path in PARSERS)


# The root file system


def inside(root: str, path: str, mounts: Mapping[str, str] | None = None) -> str:
    """Where `path` of a container is on the host, with every symbolic link followed as its processes would.

    `mounts`: paths of the host, by where the container sees them. Raises OSError. Nothing is opened, and the answer
    can change at any time, so this is for checks only.
    """

    def place(parts: list[str]) -> str:
        for count in range(len(parts), 0, -1):
            if (source := (mounts or {}).get("/" + "/".join(parts[:count]))) is not None:
                return "/".join([source, *parts[count:]])
        return "/".join([root, *parts])

    links = 0
    pending = [part for part in path.split("/") if part not in ("", ".")][::-1]
    found: list[str] = []
    while pending:
        part = pending.pop()
        if part == "..":
            del found[-1:]
            continue
        here = place([*found, part])
        if stat.S_ISLNK(os.lstat(hostroot.seen(here)).st_mode):
            links += 1
            if links > LINKS:
                raise OSError(40, "Too many levels of symbolic links")
            target = os.readlink(hostroot.seen(here))
            if target.startswith("/"):
                found.clear()
            pending += [part for part in target.split("/") if part not in ("", ".")][::-1]
        else:
            found.append(part)
    return place(found)


def mounts_of(container: model.Container) -> dict[str, str]:
    """Paths of the host, by where the container sees them."""
    return {mount.target.rstrip("/"): mount.source.rstrip("/") for mount in container.mount}


def check_root(container: model.Container, root: str, source: str) -> None:
    """Check that `root` is a root file system with the program in it. Raises InvalidDefinition."""

    def refuse(key: str, expected: str, hint: Hint = "") -> errors.InvalidDefinition:
        return errors.InvalidDefinition(source, key, expected, hint=hint)

    make = do("create", "container", container.name, image="ROOTFS.tar.xz") + " makes one."
    if not os.path.exists(hostroot.seen(root)):
        raise refuse("rootfs", f"no such directory: {root}", make)
    if not os.path.isdir(hostroot.seen(root)):
        raise refuse("rootfs", f"expected a directory: {root}", make)
    if not any(os.path.lexists(f"{hostroot.seen(root)}/{name}") for name in ("usr", "bin", "sbin", "init", "etc")):
        raise refuse("rootfs", f"expected a root file system, which {root} isn't: it has no usr, bin or etc", make)
    key, word = ("command[0]", container.command[0]) if container.command else ("init", container.argv[0])
    places = [word] if word.startswith("/") else [f"{place}/{word}" for place in SEARCH]
    for place in places:
        try:
            status = os.stat(hostroot.seen(inside(root, place, mounts_of(container))))
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
            raise refuse(key, f"expected a program: {place} of {root} isn't one")
        return
    raise refuse(key, f"no such program in {root}: {word}")


def halt_signal(container: model.Container, root: str) -> str:
    """The signal that asks the container's first program to end."""
    if container.shutdown_signal is not None:
        return container.shutdown_signal
    if container.command:
        return "SIGTERM"
    try:
        program = inside(root, container.argv[0], mounts_of(container))
    except OSError:
        return "SIGPWR"
    # systemd(1), "Signals"; SIGPWR is what sysvinit, OpenRC's init and busybox's understand.
    return "SIGRTMIN+3" if "systemd" in os.path.basename(program) else "SIGPWR"


def check_host(container: model.Container, source: str) -> None:
    """Check that whatever it names besides the root exists, and that the host has the memory. InvalidDefinition."""
    for key, path in model.paths(container):
        reach.defined(path, source, key)
    for index, device in enumerate(container.device):
        mode = os.stat(hostroot.seen(device.path)).st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise errors.InvalidDefinition(source, f"device[{index}].path", f"expected a device: {device.path}")
    memory, total = container.limits.memory_bytes, total_memory()
    if memory is not None and memory > total:
        raise errors.InvalidDefinition(
            source,
            "limits.memory",
            f"expected at most what the host has, {size.show(total >> 20 << 20)}, got {container.limits.memory}",
        )


def total_memory() -> int:
    """The host's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limits(container: model.Container, settings: Lxc) -> model.Limits:
    """The definition's limits, with defaults for those that it leaves out."""
    memory = container.limits.memory_bytes
    pids = container.limits.pids or settings.pids
    if memory is None:
        memory = min(settings.memory_bytes(total_memory()), total_memory())
    return model.Limits(memory=memory, cpus=container.limits.cpus, pids=pids or usual_pids())


def descriptors() -> int:
    """The hard limit of open files for a container's processes: the usual one, or the host's where that is less.

    virtd.service asks for the host's limit; LXC can't raise its own.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return config.DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, config.DESCRIPTORS)


def usual_pids() -> int:
    """An eighth of the host's kernel.pid_max, proc_sys_kernel(5), at least 1,024 and at most 16,384."""
    try:
        with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
            most = int(file.read())
    except (OSError, ValueError):
        most = 32768
    return max(1024, min(16384, most // 8))


def missing(container: model.Container) -> list[tuple[str, str]]:
    """Paths that the definition names and that are missing, or that others could exchange, as (key, text)."""
    found = [(key, reach.trouble(path)) for key, path in model.paths(container)]
    return [(key, text) for key, text in found if text]
