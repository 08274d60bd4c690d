# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container as a person defines it, typed and checked, without looking at the host."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import msgspec

from .. import errors
from . import document, naming, size
from .document import shown
from .naming import MAC, NAME, VOLUME

HOSTNAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
INTERFACE = r"[A-Za-z0-9_.-]{1,15}"
CAPABILITY = r"[a-z_]{3,32}"
SIGNAL = r"SIG(?:[A-Z0-9]{1,8}|RTMIN\+[0-9]{1,2})"
IDS = 65536  # user and group IDs of one container, unless its definition says otherwise
ID_MAX = 4294967294
MEMORY_MIN = 1 << 20
MEMORY_MAX = 64 << 40
MODES = ("network", "host")

_Refuse = Callable[[str, str], errors.InvalidDefinition]


class IdMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The IDs of the host that the container's own, 0 to `count` - 1, are mapped to, for users and groups alike."""

    first: Annotated[int, msgspec.Meta(ge=1, le=ID_MAX)]
    count: Annotated[int, msgspec.Meta(ge=1, le=ID_MAX)] = IDS


class Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A volume of a storage pool with a file system on it, in place of a directory."""

    pool: str
    volume: str


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file or directory of the host, `source`, that the container sees as `target`."""

    source: str
    target: str
    readonly: bool = False


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A device node of the host's that the container may use, under the same name."""

    path: str


class Nic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A veth pair into a virtd network; or, with `mode = "host"` and as the only one, the host's network."""

    network: str | None = None
    mode: str = "network"
    mac: str | None = None
    name: str | None = None
    trusted: bool = False


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the container may use at most; None: no limit of its own."""

    memory: str | int | None = None
    cpus: Annotated[float, msgspec.Meta(gt=0, le=4096)] | None = None
    pids: Annotated[int, msgspec.Meta(ge=1, le=4194304)] | None = None

    @property
    def memory_bytes(self) -> int | None:
        return size.parse(self.memory) if self.memory is not None else None


class Container(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A container's definition."""

    name: str
    rootfs: str | Root
    uuid: str | None = None
    init: str | None = None
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    hostname: str | None = None
    autostart: bool = False
    privileged: bool = False
    terminal: bool = True
    shutdown_signal: str | None = None
    drop_capabilities: tuple[str, ...] = ()
    idmap: IdMap | None = None
    limits: Limits = Limits()
    mount: tuple[Mount, ...] = ()
    device: tuple[Device, ...] = ()
    nic: tuple[Nic, ...] = ()

    @property
    def argv(self) -> tuple[str, ...]:
        """What runs as the container's first program."""
        return self.command or (self.init or "/sbin/init",)

    @property
    def directory(self) -> str | None:
        """The directory that is its root file system, without a final "/"; None when that is in a volume."""
        return self.rootfs.rstrip("/") if isinstance(self.rootfs, str) else None

    @property
    def volume(self) -> Root | None:
        """The volume that its root file system is in."""
        return self.rootfs if isinstance(self.rootfs, Root) else None

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that its interfaces are in, in their order."""
        return tuple(nic.network for nic in self.nic if nic.network is not None)

    @property
    def shares_network(self) -> bool:
        """Whether it has the host's network and none of its own."""
        return any(nic.mode == "host" for nic in self.nic)


def parse(text: str, source: str) -> Container:
    """The definition that `text` (TOML) holds. `source` is the file's name in errors.

    Raises InvalidDefinition with the key and what was expected.
    """
    container = document.decode(text, source, Container)
    check(container, source)
    return naming.canonical(container, container.uuid)


def check(container: Container, source: str) -> None:
    """Everything that a type can't say. Raises InvalidDefinition at the first thing that is wrong."""

    def refuse(key: str, expected: str) -> errors.InvalidDefinition:
        return errors.InvalidDefinition(source, key, expected)

    def absolute(key: str, path: str) -> None:
        # liblxc's configuration file can't hold everything, and no path may lead out of its directory.
        if not path.startswith("/") or _unprintable(path) or len(path) > 4095:
            raise refuse(key, f"expected an absolute path, got {shown(path)}")
        if "/../" in path + "/":
            raise refuse(key, f"expected a path without '..', got {shown(path)}")

    naming.check(container, refuse)
    if isinstance(container.rootfs, Root):
        if not re.fullmatch(NAME, container.rootfs.pool):
            raise refuse("rootfs.pool", f"expected a pool's name, got {shown(container.rootfs.pool)}")
        if not re.fullmatch(VOLUME, container.rootfs.volume):
            raise refuse("rootfs.volume", f"expected a volume's name, got {shown(container.rootfs.volume)}")
    else:
        absolute("rootfs", container.rootfs)
        if container.rootfs.rstrip("/") == "":
            raise refuse("rootfs", "expected a directory of the container's own, got the host's root")
        if ":" in container.rootfs:
            raise refuse(
                "rootfs", f"expected a path without ':', which LXC can't take, got {shown(container.rootfs)}"
            )
    if container.init is not None and container.command:
        raise refuse("command", "expected either init or command, got both")
    if container.init is not None:
        absolute("init", container.init)
        if any(letter.isspace() for letter in container.init):
            raise refuse("init", f"expected a path without spaces, got {shown(container.init)}")
    for index, word in enumerate(container.command):
        if "\0" in word or (not word and index == 0):
            raise refuse(f"command[{index}]", f"expected a word of a command, got {shown(word)}")
    if container.hostname is not None and not re.fullmatch(HOSTNAME, container.hostname):
        raise refuse("hostname", f"expected letters, digits and '-', at most 64, got {shown(container.hostname)}")
    for key, value in container.environment.items():
        if not re.fullmatch(VARIABLE, key):
            raise refuse(f"environment.{key}", "expected a name of letters, digits and '_'")
        if _unprintable(value):
            raise refuse(f"environment.{key}", f"expected one line of text, got {shown(value)}")
    if container.shutdown_signal is not None and not re.fullmatch(SIGNAL, container.shutdown_signal):
        raise refuse(
            "shutdown_signal",
            f'expected a signal such as "SIGTERM" or "SIGRTMIN+3", got {shown(container.shutdown_signal)}',
        )
    for index, capability in enumerate(container.drop_capabilities):
        if not re.fullmatch(CAPABILITY, capability) or capability.startswith("cap_"):
            raise refuse(
                f"drop_capabilities[{index}]",
                f'expected a capability such as "sys_time", got {shown(capability)}',
            )
    if container.idmap is not None:
        if container.privileged:
            raise refuse("idmap", "expected no id map, since privileged is set")
        if container.idmap.first + container.idmap.count - 1 > ID_MAX:
            raise refuse("idmap.count", f"expected IDs up to {ID_MAX}, got {container.idmap.first} and more")
    _check_limits(container.limits, refuse)
    targets: dict[str, str] = {}
    for index, mount in enumerate(container.mount):
        absolute(f"mount[{index}].source", mount.source)
        absolute(f"mount[{index}].target", mount.target)
        target = mount.target.rstrip("/")
        if not target:
            raise refuse(f"mount[{index}].target", "expected a place below the container's root, got its root")
        if target in targets:
            raise refuse(f"mount[{index}].target", f"{mount.target} is {targets[target]} already")
        targets[target] = f"mount[{index}].target"
    for index, device in enumerate(container.device):
        absolute(f"device[{index}].path", device.path)
        if not device.path.startswith("/dev/"):
            raise refuse(f"device[{index}].path", f"expected a path below /dev, got {shown(device.path)}")
    _check_nics(container, refuse)


def _check_limits(limits: Limits, refuse: _Refuse) -> None:
    if limits.memory is None:
        return
    try:
        memory = size.parse(limits.memory)
    except ValueError:
        raise refuse("limits.memory", f'expected a size such as "256M" or "2G", got {shown(limits.memory)}') from None
    if not MEMORY_MIN <= memory <= MEMORY_MAX:
        raise refuse("limits.memory", f"expected 1M to {size.show(MEMORY_MAX)}, got {shown(limits.memory)}")


def _check_nics(container: Container, refuse: _Refuse) -> None:
    macs: dict[str, str] = {}
    names: dict[str, str] = {}
    for index, nic in enumerate(container.nic):
        key = f"nic[{index}]"
        if nic.mode not in MODES:
            raise refuse(f"{key}.mode", f'expected "network" or "host", got {shown(nic.mode)}')
        if nic.mode == "host":
            if nic.trusted:
                raise refuse(f"{key}.trusted", 'expected nothing here, since mode is "host"')
            if len(container.nic) > 1 or nic.network is not None or nic.mac is not None or nic.name is not None:
                raise refuse(f"{key}.mode", 'expected nothing besides mode = "host": the host\'s network is shared')
            continue
        if nic.network is None:
            raise refuse(f"{key}.network", "expected the name of a network")
        if not re.fullmatch(NAME, nic.network):
            raise refuse(f"{key}.network", f"expected the name of a network, got {shown(nic.network)}")
        name = nic.name or f"eth{index}"
        if not re.fullmatch(INTERFACE, name) or name in (".", "..", "lo"):
            raise refuse(f"{key}.name", f'expected an interface\'s name such as "eth0", got {shown(name)}')
        if name in names:
            raise refuse(f"{key}.name", f"{name} is the name of {names[name]} already")
        names[name] = key
        if nic.mac is None:
            continue
        mac = nic.mac.lower()
        if not re.fullmatch(MAC, mac) or int(mac[:2], 16) & 1:
            raise refuse(f"{key}.mac", f"expected a unicast address such as 52:54:00:12:34:56, got {shown(nic.mac)}")
        if mac in macs:
            raise refuse(f"{key}.mac", f"{nic.mac} is the address of {macs[mac]} already")
        macs[mac] = key


def paths(container: Container) -> list[tuple[str, str]]:
    """Paths of the host that the definition names besides the root file system, as (key, path)."""
    found = [(f"mount[{index}].source", mount.source) for index, mount in enumerate(container.mount)]
    return found + [(f"device[{index}].path", device.path) for index, device in enumerate(container.device)]


def _unprintable(text: str) -> bool:
    return any(ord(letter) < 32 or ord(letter) == 127 for letter in text)
