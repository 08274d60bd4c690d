# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware that a guest sees, on record beside its definition: the same at every start until a person asks for
newer.

`/var/lib/virtd/qemu/NAME.json` has the machine type by its versioned name ("pc-q35-10.0", because "q35" means a
different one with each QEMU), the CPU, the uuid, and the identity and address of each device. It is
written before a guest may run; at its first start only once QEMU has answered, and until then the record in /run has
what is known.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors, files, untrusted
from ...hints import do
from ...model.domain import MACHINE, Firmware
from .devices import placing
from .devices.placing import Placed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ...model.domain import Domain

    Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]  # one QMP command and its arguments

log = logging.getLogger(__name__)

LIMIT = 1 << 18
MACHINE_PATH, CPU_PATH = "/machine", "/machine/unattached/device[0]"
# query-cpu-model-expansion says 0 for these of "max", whatever they are (QEMU 10.0 and 11.1, TCG).
MISTOLD = ("family", "model", "stepping")
FEATURES = 1024  # QEMU 11 knows some 400


class Build(msgspec.Struct, frozen=True):
    """One build of UEFI: its program and the template of its variable store, each with its format.

    `secure`: with secure boot switched on; `smm`: System Management Mode protects the store from the guest's kernel.
    """

    program: str
    program_format: str
    template: str
    template_format: str
    secure: bool = False
    smm: bool = False


class Hardware(msgspec.Struct, frozen=True):
    """That of one guest.

    `machine` and `cpu` are what was asked for, by the definition or by default, such as "q35" and "max"; `type` and
    `model` are what that means, as QEMU's arguments -machine and -cpu take it, each "" until QEMU has been asked.
    `firmware` is its build of UEFI, or None for QEMU's own BIOS. `renew`: a person wants whatever the definition
    means to the next QEMU.
    """

    uuid: str
    machine: str
    cpu: str
    type: str = ""
    model: str = ""
    devices: tuple[Placed, ...] = ()
    firmware: Build | None = None
    renew: bool = False
    schema: int = 1

    @property
    def known(self) -> bool:
        return bool(self.type and self.model)


def read(path: str) -> Hardware | None:
    """The hardware on record, or None. Raises HostError if it can't be read."""
    try:
        return msgspec.json.decode(untrusted.read(path, LIMIT), type=Hardware)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise errors.HostError(f"{path} can't be read: {exc}") from exc


def write(path: str, hardware: Hardware) -> None:
    """Record it. Raises HostError, and then leaves the record as it was."""
    try:
        files.make_directory(os.path.dirname(path), 0o700)
    except OSError as exc:
        raise errors.HostError(f"Cannot write {path}: {exc.strerror}", hint=files.hint(exc)) from exc
    files.write(path, msgspec.json.format(msgspec.json.encode(hardware), indent=1) + b"\n")


def assign(before: Hardware | None, domain: Domain, uuid: str, *, kvm: bool) -> Hardware:
    """The hardware for the next start; `before` is what is on record."""
    if before is not None and before.uuid != uuid:
        before = None  # it belongs to another guest that had the name
    cpu = domain.cpu or ("host" if kvm else "max")
    kind, model, build = "", "", None
    if before is not None and not before.renew and before.machine == domain.machine:
        kind = before.type
        model = before.model if kind and before.cpu == cpu else ""
        build = before.firmware  # not every machine can run every build
    placed = placing.place(domain, before.devices if before is not None else ())
    if build is not None and (domain.boot.firmware is not Firmware.UEFI or build.secure != domain.boot.secure_boot):
        build = None
    return Hardware(uuid, domain.machine, cpu, kind, model, tuple(placed), build)


def require_places(hardware: Hardware, domain: Domain, source: str) -> None:
    """Raise InvalidDefinition if the machine has no place for one of the devices."""
    if (one := placing.lacks_place(domain, hardware.devices)) is not None:
        index = placing.of_kind(hardware.devices, one.kind).index(one)
        hint = "Take something out of the definition."
        raise errors.InvalidDefinition(
            source, f"{one.kind}[{index}]", f"{domain.machine} has no place left for it", hint=hint
        )


def damaged(exc: errors.HostError, name: str) -> errors.HostError:
    """The error of a start whose hardware record is damaged: the guest must not see other hardware than before."""
    hint = do("upgrade-machine", "domain", name) + " puts it on record anew; the guest may see other hardware then."
    return errors.HostError(f"What hardware {name} has isn't known: {exc.message}", hint=hint)


async def learn(hardware: Hardware, ask: Ask) -> Hardware:
    """Add what only the running QEMU knows. Raises MonitorError.

    Its guest may have taken it over, so its answers are checked, and used for this guest only.
    """
    kind, model = hardware.type, hardware.model
    if not kind:
        said = await ask("qom-get", {"path": MACHINE_PATH, "property": "type"})
        kind = said.removesuffix("-machine") if isinstance(said, str) else ""
        if not re.fullmatch(MACHINE, kind):
            raise errors.MonitorError(f"QEMU says that its machine is of no type: {str(said)[:80]!r}")
    if not model:
        model = await _expanded(hardware.cpu, ask)
    return msgspec.structs.replace(hardware, type=kind, model=model)


async def _expanded(cpu: str, ask: Ask) -> str:
    """The CPU "max", which differs with each QEMU, as a list of features, which don't. Any other is given by its name
    and the machine type, or, "host", by the host.
    """
    name, _, given = cpu.partition(",")
    if name != "max":
        return cpu
    try:
        said = await ask("query-cpu-model-expansion", {"type": "static", "model": {"name": name}})
        props = dict(said["model"]["props"]) if said["model"]["name"] == "base" else {}
        for prop in (prop for prop in MISTOLD if props.get(prop) == 0):
            props[prop] = await ask("qom-get", {"path": CPU_PATH, "property": prop})
    except (errors.MonitorError, KeyError, TypeError, ValueError) as exc:
        log.info("CPU %s can't be expanded into features: %s", cpu, exc)
        return cpu
    features = _spelled(props)
    return ",".join(["base", *features, *([given] if given else [])]) if features else cpu


def _spelled(props: Mapping[str, Any]) -> list[str]:
    """Properties as -cpu takes them; an empty list if any of them is invalid."""
    found: list[str] = []
    for name, value in sorted(props.items()):
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or len(found) > FEATURES:
            return []
        if value is True:
            found.append(f"{name}=on")
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(f"{name}={value}")
        elif isinstance(value, str) and len(value) <= 48 and value.isascii() and value.isprintable():
            found.append(f"{name}={value.replace(',', ',,')}")
        elif value is not False:
            return []
    return found
