# SPDX-License-Identifier: LGPL-2.1-or-later
"""liblxc's configuration of one container, lxc.container.conf(5), and the script that starts it."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from ... import hostroot

if TYPE_CHECKING:
    from ...model import container as model

# What a privileged container must not do to the host's kernel: the list in LXC's own common.conf.
DROPPED = ("mac_admin", "mac_override", "sys_module", "sys_rawio", "sys_time")
MONITOR, PAYLOAD = "monitor", "payload"  # control groups below the unit's
# The usual limits of a service. Programs that close all possible descriptors, or use select(2), expect the first.
DESCRIPTORS_SOFT, DESCRIPTORS = 1024, 524288
PIVOT = "lxc.pivot"  # the group that LXC 6 puts them into at a reboot


class Link(NamedTuple):
    """One veth pair: the host's end, its bridge, and the container's end with its MAC."""

    host: str
    bridge: str
    name: str
    mac: str


class HostFacts(NamedTuple):
    """What is known about the host when a container is started. `tty`: its terminal, or ""."""

    path: str  # lxcpath: the parent of LXC's own directory for the container, see Container.secret_path
    runtime: str
    root: str
    ids: model.IdMap | None
    shifted: bool  # by an idmapped mount
    tty: str
    halt: str
    seccomp: str
    apparmor: bool
    start: str  # lxc-start, or lxc-execute for a command
    descriptors: int = DESCRIPTORS  # limit of open files for each process of the container


def text(container: model.Container, host: HostFacts, links: list[Link]) -> str:
    """The configuration file."""
    lines = [
        f"lxc.uts.name = {container.hostname or container.name.replace('_', '-').replace('.', '-')[:63].strip('-')}",
        f"lxc.rootfs.path = dir:{host.root}",
        # The first program inherits standard input and output, or our terminal is its /dev/console. LXC's own console
        # would be a relay, which blocks while nobody reads.
        "lxc.console.path = none",
        "lxc.tty.max = 0",
        "lxc.pty.max = 1024",
        "lxc.autodev = 1",
        # Only below the unit's control group, which systemd has delegated to us.
        "lxc.cgroup.relative = 1",
        f"lxc.cgroup.dir.monitor = {MONITOR}",
        f"lxc.cgroup.dir.container = {PAYLOAD}",
        *_kernel(container, host),
        f"lxc.signal.halt = {host.halt}",
        f"lxc.prlimit.nofile = {DESCRIPTORS_SOFT}:{host.descriptors}",
        f"lxc.apparmor.profile = {'generated' if host.apparmor else 'unconfined'}",
        # In addition to the unit's filter, which LXC would otherwise consider sufficient.
        f"lxc.seccomp.profile = {host.seccomp}",
        "lxc.seccomp.allow_nesting = 1",
        f"lxc.cap.drop = {' '.join((*DROPPED, *container.drop_capabilities))}",
    ]
    if host.ids is not None:
        lines += [f"lxc.idmap = {kind} 0 {host.ids.first} {host.ids.count}" for kind in "ug"]
    if host.shifted:
        lines.append("lxc.rootfs.options = idmap=container")
    if host.tty:
        lines.append(f"lxc.mount.entry = {host.tty} dev/console none bind,create=file 0 0")
    for mount in container.mount:
        lines.append(_mount(mount.source, mount.target, readonly=mount.readonly))
    for device in container.device:
        lines.append(_mount(device.path, device.path, readonly=False))
    lines += [f"lxc.environment = {key}={value}" for key, value in container.environment.items()]
    if not container.command:
        lines.append(f"lxc.init.cmd = {container.argv[0]}")
    lines += _network(container, links)
    return "\n".join(lines) + "\n"


def _kernel(container: model.Container, host: HostFacts) -> list[str]:
    """The kernel's own file systems.

    A sysfs belongs to a network namespace, and only its owner may mount one. So a container that shares the host's
    network gets the host's /sys, with a hierarchy of control groups of its own mounted over the host's.
    """
    if host.ids is not None and container.shares_network:
        return ["lxc.mount.auto = proc:mixed cgroup:mixed", "lxc.mount.entry = /sys sys none rbind,ro 0 0"]
    return ["lxc.mount.auto = proc:mixed sys:mixed cgroup:mixed"]


def _network(container: model.Container, links: list[Link]) -> list[str]:
    if container.shares_network:
        return ["lxc.net.0.type = none"]
    if not links:
        return ["lxc.net.0.type = empty"]
    lines = []
    for index, link in enumerate(links):
        lines += [
            f"lxc.net.{index}.type = veth",
            f"lxc.net.{index}.veth.pair = {link.host}",
            f"lxc.net.{index}.link = {link.bridge}",
            f"lxc.net.{index}.name = {link.name}",
            f"lxc.net.{index}.hwaddr = {link.mac}",
            f"lxc.net.{index}.flags = up",
        ]
    return lines


def _mount(source: str, target: str, *, readonly: bool) -> str:
    kind = "dir" if os.path.isdir(hostroot.seen(source)) else "file"
    options = ["rbind" if kind == "dir" and not readonly else "bind", f"create={kind}"]
    options += ["ro"] if readonly else []
    return f"lxc.mount.entry = {_escaped(source)} {_escaped(target.lstrip('/'))} none {','.join(options)} 0 0"


def _escaped(path: str) -> str:
    """As fstab(5) has it."""
    return path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")


def quoted(words: tuple[str, ...]) -> str:
    """For sh."""
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)


def start_script(container: model.Container, host: HostFacts, *, held: bool = False) -> str:
    """What the unit runs.

    Its standard error becomes LXC's log, which says when the container's first program runs, reboots and ends.
    systemd would make a terminal on standard input LXC's own controlling terminal, so that LXC would be hung up
    together with the container's console. So the terminal comes as standard output and is moved to its place here.
    `held`: the pipe of LXC's log comes as standard input (see children/pipes.py).
    """
    lxc: tuple[str, ...] = (host.start, "-q", "-P", host.path, "-n", container.name, "-f", f"{host.runtime}/config")
    lxc = (*lxc, "-l", "INFO", "-o", "/proc/self/fd/3")
    if not container.command:
        lxc = (*lxc, "-F", "-C")
    if container.command:
        lxc = (*lxc, "--", *container.command)
    # A volume is mounted nosuid; only the unit's own view of it is changed here.
    mount = quoted(("mount", "-o", "remount,bind,rw,nodev,suid", host.root))
    suid = f"{mount} || exit 1\n" if container.volume is not None else ""
    return f"{suid}exec 3>&{0 if held else 2} {'<&1 ' if host.tty else ''}2>&1 && exec {quoted(lxc)}\n"


def stop_script(container: model.Container, host: HostFacts, stop: str, seconds: float) -> str:
    """ExecStop=: ends the container when the host goes down, with or without the daemon.

    systemd also runs it after the container has ended by itself, then without $MAINPID.
    """
    words = (stop, "-q", "-P", host.path, "-n", container.name, "-t", str(int(seconds)))
    # A frozen container couldn't shut down.
    return f"""printenv MAINPID >/dev/null || exit 0
: >{quoted((f"{host.runtime}/host-shutdown",))}
group=$(sed -n 's/^0:://p' /proc/$MAINPID/cgroup)
echo 0 >"/sys/fs/cgroup${{group%/{MONITOR}}}/{PAYLOAD}/cgroup.freeze"
exec {quoted(words)}
"""


def devices(container: model.Container) -> list[tuple[str, str]]:
    """For DeviceAllow=: the devices that every container has, and those that the definition lists."""
    common = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
    found = [(f"/dev/{name}", "rwm") for name in common] + [("char-pts", "rw")]
    for device in container.device:
        kind = "block" if stat.S_ISBLK(os.stat(hostroot.seen(device.path)).st_mode) else "char"
        number = os.stat(hostroot.seen(device.path)).st_rdev
        found.append((f"/dev/{kind}/{os.major(number)}:{os.minor(number)}", "rw"))
    return found
