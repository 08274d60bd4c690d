# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's command line for a domain. Pure: nothing on the host is examined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...model.domain import Domain, OnCrash, OnPoweroff, OnReboot
from .devices import assembly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .devices.device import Device

HostFacts = assembly.HostFacts
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def argv(
    domain: Domain,
    uuid: str,
    host: HostFacts,
    devices: Sequence[Device] | None = None,
    *,
    machine: str = "",
    cpu: str = "",
) -> list[str]:
    """The whole command line, the program first.

    `devices`: those of the guest; None: as in the definition. `machine` and `cpu`: as on record, or "".
    """
    # fmt: off
    arguments = [
        host.binary,
        "-name", f"guest={domain.name},debug-threads=on",
        "-uuid", uuid,
        "-machine", f"{machine or domain.machine},accel={'kvm' if host.kvm else 'tcg'}",
        "-cpu", cpu or domain.cpu or ("host" if host.kvm else "max"),
        "-m", f"size={max(domain.memory_bytes >> 10, 1)}k",
        "-smp", f"{domain.vcpus}",
        "-nodefaults", "-no-user-config",
        "-display", "none",
        "-sandbox", SANDBOX,
        # The exit status shows how the guest ended, whether or not virtd runs.
        "-action", f"panic={_panic(domain)},shutdown={_poweroff(domain)},reboot={_reboot(domain)}",
        # QEMU also writes what ends it to stderr, whether or not anybody is connected: see ends.py. (A pattern,
        # because a QEMU built without these trace events doesn't complain about one.)
        "-trace", "qemu_system_shutdown_request*",
        "-trace", "qemu_system_powerdown_request*",
        *_boot(domain),
    ]
    # fmt: on
    own = assembly.assemble(domain, uuid, host) if devices is None else devices
    return arguments + [word for device in own for word in device.arguments()]


def _boot(domain: Domain) -> list[str]:
    boot = domain.boot
    options = (("-kernel", boot.kernel), ("-initrd", boot.initrd), ("-append", boot.cmdline))
    return [word for option, value in options if value for word in (option, value)]


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
