# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's command line for a domain. Pure: nothing is looked up here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ...model.domain import Domain, OnCrash, OnPoweroff, OnReboot
from .. import nodes
from .images import Image, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Host(msgspec.Struct, frozen=True):
    """What the command line must know of the host."""

    binary: str
    kvm: bool
    runtime: str  # the guest's own directory, see `monitor_socket` and its neighbours
    taps: dict[int, str] = {}  # the interface of each NIC that is in a network
    vhost: bool = False


def monitor_socket(runtime: str) -> str:
    return f"{runtime}/qmp.sock"


def shutdown_socket(runtime: str) -> str:
    """A second monitor, for the unit's ExecStop: a QMP monitor talks to one client at a time, and that is us."""
    return f"{runtime}/shutdown.sock"


def vnc_socket(runtime: str) -> str:
    return f"{runtime}/vnc.sock"


def events(runtime: str) -> str:
    """The stem of two files, `.in` and `.out`, through which QEMU wrote every event, when virtd 0.1.0 was young."""
    return f"{runtime}/events"


def mac_of(uuid: str, index: int) -> str:
    """A MAC address that stays the same for one domain: QEMU's prefix and three bytes of the uuid."""
    tail = (int(uuid.replace("-", "")[-6:], 16) + index) & 0xFFFFFF
    return "52:54:00:" + ":".join(f"{tail >> shift & 255:02x}" for shift in (16, 8, 0))


def argv(domain: Domain, uuid: str, host: Host, images: Sequence[Image] | None = None) -> list[str]:
    """The whole command line, the program first. `images` are the disks' files; None: as the definition has them."""
    machine = f"{domain.machine},accel={'kvm' if host.kvm else 'tcg'}"
    cpu = domain.cpu or ("host" if host.kvm else "max")
    # fmt: off
    arguments = [
        host.binary,
        "-name", f"guest={domain.name},debug-threads=on",
        "-uuid", uuid,
        "-machine", machine,
        "-cpu", cpu,
        "-m", f"size={max(domain.memory_bytes >> 10, 1)}k",
        "-smp", f"{domain.vcpus}",
        "-nodefaults", "-no-user-config",
        "-display", "none",
        "-sandbox", SANDBOX,
        # The guest's end shows in the exit status, whether or not virtd is there.
        "-action", f"panic={_panic(domain)},shutdown={_poweroff(domain)},reboot={_reboot(domain)}",
        # What ends it is a line on stderr as well, whether or not anybody is connected: see ends.py. (A pattern, for
        # which a QEMU that was built without such lines doesn't complain.)
        "-trace", "qemu_system_shutdown_request*",
        "-trace", "qemu_system_powerdown_request*",
        *_boot(domain),
        "-chardev", f"socket,id=monitor,path={_escape(monitor_socket(host.runtime))},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=shutdown,path={_escape(shutdown_socket(host.runtime))},server=on,wait=off",
        "-mon", "chardev=shutdown,mode=control",
        # A UART and no virtconsole: when the pipe is full a UART makes the guest wait, while QEMU drops what a
        # virtconsole writes then (hw/char/virtio-console.c, flush_buf). Ten times as fast, and not worth a byte.
        "-chardev", "stdio,id=serial0,signal=off",
        "-serial", "chardev:serial0",
    ]
    # fmt: on
    if domain.machine.startswith(("q35", "pc")):
        arguments += ["-device", "pvpanic"]
    if domain.rng:
        arguments += ["-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"]
    for index, image in enumerate(plain(domain) if images is None else images):
        arguments += [
            *_blockdevs(index, image),
            "-device",
            f"virtio-blk-pci,drive=disk{index},id=virtio-disk{index}{_order(domain, index)}",
        ]
    for index, cdrom in enumerate(domain.cdrom):
        drive = "ide-cd" if domain.has_ide else "virtio-blk-pci"
        medium = _cdrom(index, cdrom.path) if cdrom.path is not None else []
        node = f",drive=cd{index}" if medium else ""
        order = _order(domain, len(domain.disk) + index)
        arguments += [*medium, "-device", f"{drive}{node},id=cdrom{index}{order}"]
    for index, nic in enumerate(domain.nic):
        mac = (nic.mac or mac_of(uuid, index)).lower()
        backend = "user"
        if (tap := host.taps.get(index)) is not None:
            # It is there already, and the guest's user's to open: QEMU needs no privilege for it, and no script.
            backend = f"tap,ifname={_escape(tap)},script=no,downscript=no{',vhost=on' if host.vhost else ''}"
        arguments += [
            "-netdev",
            f"{backend},id=net{index}",
            "-device",
            # No option ROM: nobody boots from the network here, and each costs the firmware a tenth of a second.
            f"virtio-net-pci,netdev=net{index},id=nic{index},mac={mac},romfile=",
        ]
    if domain.vnc is not None and domain.vnc.enabled:
        arguments += ["-device", "VGA", "-vnc", f"unix:{_escape(vnc_socket(host.runtime))}"]
    return arguments


def _boot(domain: Domain) -> list[str]:
    boot = domain.boot
    options = (("-kernel", boot.kernel), ("-initrd", boot.initrd), ("-append", boot.cmdline))
    return [word for option, value in options if value for word in (option, value)]


def _blockdevs(index: int, image: Image) -> list[str]:
    """The nodes of one disk, what it stands on first."""
    found: list[nodes.Node] = []
    below: str | None = None
    for number in range(len(image.backing), 0, -1):
        path, kind = image.backing[number - 1]
        name = f"{index}b{number}"
        found += [
            nodes.file(path, **{"node-name": f"file{name}", "read-only": True, "auto-read-only": False}),
            nodes.over(kind.value, f"file{name}", below, **{"node-name": f"disk{name}", "read-only": True}),
        ]
        below = f"disk{name}"
    common = {"read-only": image.readonly}
    found += [
        nodes.file(image.path, **{"node-name": f"file{index}", "auto-read-only": False, "locking": "auto"}, **common),
        nodes.over(
            image.format.value, f"file{index}", below, **{"node-name": f"disk{index}", "discard": "unmap"}, **common
        ),
    ]
    return [word for node in found for word in ("-blockdev", nodes.text(node))]


def _cdrom(index: int, path: str) -> list[str]:
    found = [
        nodes.file(path, **{"node-name": f"cdfile{index}", "read-only": True}),
        nodes.over("raw", f"cdfile{index}", None, **{"node-name": f"cd{index}", "read-only": True}),
    ]
    return [word for node in found for word in ("-blockdev", nodes.text(node))]


def _order(domain: Domain, index: int) -> str:
    return "" if domain.boot.kernel is not None else f",bootindex={index + 1}"


def _panic(domain: Domain) -> str:
    match domain.on_crash:
        case OnCrash.STOP | OnCrash.RESTART:
            return "exit-failure"
        case OnCrash.KEEP:
            return "pause"


def _poweroff(domain: Domain) -> str:
    return "pause" if domain.on_poweroff is OnPoweroff.KEEP else "poweroff"


def _reboot(domain: Domain) -> str:
    return "shutdown" if domain.on_reboot is OnReboot.STOP else "reset"


def _escape(text: str) -> str:
    """A value inside a QemuOpts list: a comma is doubled (qemu(1), "Device option syntax")."""
    return text.replace(",", ",,")
