# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains and containers."""

from __future__ import annotations

from typing import Annotated

from . import Reply, Summary, Trouble


class Guest(Summary, frozen=True):
    """A domain or a container, in short."""

    id: Annotated[int | None, "a number, while it runs; never used twice by one daemon"]


class Exit(Reply, frozen=True):
    """How it ended."""

    code: Annotated[int | None, "the exit status, if it exited"]
    signal: Annotated[str | None, 'the signal that killed it, such as "SIGKILL"']
    cause: Annotated[
        str, "guest-shutdown, shutdown, stop, killed, oom, panic, failed, exited, host-shutdown, unknown"
    ]
    at: Annotated[str, "when"]
    by: Annotated[str | None, "who asked for it"]


class GuestInfo(Guest, frozen=True):
    """Everything known about either kind."""

    unit: Annotated[str, "systemd's"]
    slots: Annotated[list[str], "what systemd's FD store holds for it, by name"]
    exit: Annotated[Exit | None, "that of its last run"]
    definition_path: Annotated[str | None, "the definition's file; null if it was removed while this runs"]
    pending: Annotated[bool, "whether the definition has changed since the start"]
    persistent: Annotated[bool, "whether there is a definition"]
    log: Annotated[str, "the file with QEMU's or LXC's own messages"]
    console_log: Annotated[str, "the file with the console's output"]
    problems: list[Trouble]


class Nic(Reply, frozen=True):
    """A domain's network card."""

    network: Annotated[str | None, "of virtd; null for user networking"]
    mode: Annotated[str | None, '"user", or null with a network']
    mac: str
    interface: Annotated[str | None, "on the host, while it is connected"]
    addresses: Annotated[list[str], "as far as they are known"]


class Standstill(Reply, frozen=True):
    """Why the guest is stopped although nobody asked for it."""

    kind: Annotated[str, "io-error, guest-panicked, internal-error or watchdog"]
    since: str
    disk: Annotated[str | None, 'by its place in the definition: "disk[0]"']
    path: Annotated[str | None, "of the disk"]
    operation: Annotated[str | None, "that failed: read or write"]
    full: Annotated[bool, "whether the disk's file system is full"]
    reason: Annotated[str | None, "as QEMU reports it"]


class Events(Reply, frozen=True):
    """Events from QEMU's monitor."""

    taken: Annotated[int, "how many were processed"]
    hung_up: Annotated[int, "how often the connection was closed because there were too many"]


class Device(Reply, frozen=True):
    """A domain's device, as the guest finds it."""

    id: Annotated[str, 'its own for as long as it is defined, such as "disk0"']
    what: Annotated[str, "a path, POOL/VOLUME, an address, a network or a model; empty where there is only one"]
    bus: Annotated[str | None, "QEMU's name for it; null if QEMU chooses the place, or there is only one"]
    slot: Annotated[int | None, "PCI slot, SCSI target, or unit on an IDE bus"]


class Hardware(Reply, frozen=True):
    """The hardware that a guest sees, from its first start on."""

    machine: Annotated[str | None, 'the type with its version, such as "pc-q35-10.0"; null until QEMU has told']
    cpu: Annotated[str | None, "as QEMU's option -cpu; null until QEMU has reported it"]
    firmware: Annotated[str | None, "the file of its UEFI; null for QEMU's own BIOS"]
    renew: Annotated[bool, "whether the next start asks QEMU anew"]
    devices: list[Device]


class Provided(Reply, frozen=True):
    """What a guest's own system is set up with."""

    cloud_init: Annotated[list[str], "the files in its volume for cloud-init; empty if it has none"]
    credentials: Annotated[list[str], "the names of systemd's credentials"]
    ignition: Annotated[bool, "whether it has a configuration for Ignition"]


class Tpm(Reply, frozen=True):
    """A domain's TPM."""

    model: Annotated[str, "crb or tis"]
    version: Annotated[str, '"2.0"']
    state: Annotated[str, "the directory with what it keeps"]
    unit: Annotated[str | None, "systemd's, of swtpm; null while the domain isn't running"]
    pid: Annotated[int | None, "of swtpm; null if it doesn't run"]


class DomainInfo(GuestInfo, frozen=True):
    """Everything known about a domain."""

    memory: Annotated[int | None, "bytes"]
    vcpus: int | None
    machine: Annotated[str | None, "QEMU's machine type, as in the definition"]
    hardware: Annotated[Hardware | None, "as recorded; null before the first start"]
    disks: Annotated[list[str], "paths, or POOL/VOLUME"]
    cdroms: Annotated[list[str | None], "paths; null for an empty one"]
    nics: list[Nic]
    monitor: Annotated[
        str | None, "the state of the connection to QEMU's monitor; null while the domain isn't running"
    ]
    standstill: Standstill | None
    events: Events
    vnc: Annotated[str | None, "the socket, while there is one"]
    guest: Annotated[Provided | None, "null if its definition has nothing for its system"]
    tpm: Annotated[Tpm | None, "null if it has none"]


class ContainerInfo(GuestInfo, frozen=True):
    """Everything known about a container."""

    rootfs: Annotated[str | None, "the directory; a volume's is known while it is mounted"]
    volume: Annotated[dict[str, str] | None, "pool and volume, if the root file system is one"]
    argv: Annotated[list[str], "the first program; empty for /sbin/init"]
    hostname: str | None
    privileged: bool | None
    ids: Annotated[list[int] | None, "the range that its user IDs are mapped to: the first, and how many"]
    limits: Annotated[dict[str, float | None], "memory in bytes, cpus, pids; null: none"]
    used: Annotated[dict[str, int], "memory in bytes, pids; at this moment, as far as the kernel reports it"]
    addresses: list[str]
    interfaces: Annotated[list[str], "on the host"]


class Started(Reply, frozen=True):
    """A start has succeeded."""

    name: str
    changed: Annotated[bool, "false: it was running already"]
    pid: Annotated[int, "of QEMU, or of the container's first program, on the host"]


class Made(Reply, frozen=True):
    """A container was made of an archive or a directory."""

    name: str
    uuid: str
    path: Annotated[str, "of the definition's file"]


class Place(Reply, frozen=True):
    """A place in a log."""

    file: Annotated[str, "its id, for the next call"]
    offset: Annotated[int, "bytes"]
    more: bool
    ended: bool
    state: str
    missed: Annotated[int | None, "bytes that were rotated away before they were read; -1: unknown"]
    refused: Annotated[str | None, "why the log can't be written at present"]


class Opened(Reply, frozen=True):
    """A console was attached, or a command started in a container; the descriptors come with this."""

    token: Annotated[str, "to claim the console again, or to ask how the command ended"]
    name: str


class Over(Reply, frozen=True):
    """Why a console session has ended."""

    name: str
    event: Annotated[str, "taken-over or ended"]
    by: Annotated[str | None, "who took the console over"]


class Ran(Reply, frozen=True):
    """A command in a container has ended."""

    name: str
    event: str
    code: int | None
    signal: str | None
