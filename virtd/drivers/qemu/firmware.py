# SPDX-License-Identifier: LGPL-2.1-or-later
"""UEFI for a guest: its build, by the descriptors that distributions ship for QEMU, and its variable store.

The descriptors' format and places are those of docs/interop/firmware.json in QEMU's sources. A guest's variables
(boot entries, keys of secure boot) are in a file of its own, named for its uuid, which no other guest ever gets.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from typing import TYPE_CHECKING

import msgspec

from ... import errors, files, untrusted
from .. import qcow2
from .hardware import Build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...model.domain import Domain
    from .devices.flash import Flash
    from .hardware import Hardware

log = logging.getLogger(__name__)

# A descriptor hides those of its name in later directories, and an empty one hides them and counts for nothing.
PLACES = ("/etc/qemu/firmware", "/usr/local/share/qemu/firmware", "/usr/share/qemu/firmware")
LIMIT = 1 << 16
STORE_LIMIT = 64 << 20  # the builds of 2026 have 528 KiB, or as qcow2 less
SECURE, KEYS, SMM = "secure-boot", "enrolled-keys", "requires-smm"
FORMATS = ("raw", "qcow2")


class _File(msgspec.Struct, frozen=True):
    filename: str
    format: str = "raw"


class _Mapping(msgspec.Struct, frozen=True):
    device: str
    mode: str = "split"
    executable: _File | None = None
    template: _File | None = msgspec.field(default=None, name="nvram-template")


class _Target(msgspec.Struct, frozen=True):
    architecture: str
    machines: tuple[str, ...]


class _Descriptor(msgspec.Struct, frozen=True):
    mapping: _Mapping
    interfaces: tuple[str, ...] = msgspec.field(name="interface-types")
    targets: tuple[_Target, ...] = ()
    features: tuple[str, ...] = ()


def choose(hardware: Hardware, domain: Domain, source: str, store: str = "") -> Build:
    """The build for the next start: the one on record as long as it is what the definition asks for and is installed,
    else the first that is. Raises InvalidDefinition.
    """
    if hardware.firmware is not None and os.path.isfile(hardware.firmware.program):
        return hardware.firmware
    return find(hardware.type or domain.machine, source, store, secure=domain.boot.secure_boot)


def find(machine: str, source: str, store: str = "", *, secure: bool) -> Build:
    """The build for a machine type such as "q35" or "pc-q35-10.0". Descriptors are tried in the order of their names.
    One that can use the variables in `store`, if these exist, is preferred.

    `secure`: with secure boot switched on, that is, with the vendors' keys in its store; otherwise without keys.
    Raises InvalidDefinition, naming `source`, when there is none.
    """
    architecture, first = os.uname().machine, None
    for path in _descriptors():
        found = _read(path)
        if found is None or "uefi" not in found.interfaces or not _fits(found, architecture, machine):
            continue
        if secure != (KEYS in found.features) or (secure and SECURE not in found.features):
            continue
        if (build := _build(found, secure=secure)) is not None:
            if not _misfit(store, build):
                return build
            first = first or build
    if first is not None:
        return first
    key, what = ("boot.secure_boot", "UEFI with secure boot's keys") if secure else ("boot.firmware", "UEFI")
    raise errors.InvalidDefinition(
        source,
        key,
        f"{what} for {machine} isn't installed: no file in {', '.join(PLACES)} describes it",
        hint=_hint(machine, secure=secure),
    )


def _hint(machine: str, *, secure: bool) -> str:
    if secure and machine.startswith("pc") and not machine.startswith("pc-q35"):
        return 'Set machine = "q35", which secure boot needs.'
    return "Install it (Debian: ovmf; Fedora: edk2-ovmf)." if machine.startswith(("q35", "pc")) else ""


def _descriptors() -> Iterator[str]:
    """The paths of all that aren't hidden by others, by name."""
    found: dict[str, str] = {}
    for place in PLACES:
        try:
            names = os.listdir(place)
        except OSError:
            continue
        for name in names:
            if name.endswith(".json"):
                found.setdefault(name, f"{place}/{name}")
    yield from (found[name] for name in sorted(found))


def _read(path: str) -> _Descriptor | None:
    """None for one that is empty, or isn't understood."""
    try:
        text = untrusted.read(path, LIMIT, follow=True)
        return msgspec.json.decode(text, type=_Descriptor) if text.strip() else None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as exc:
        log.warning("The description of firmware %s isn't understood: %s", path, exc)
        return None


def _fits(descriptor: _Descriptor, architecture: str, machine: str) -> bool:
    # Before the first start only an alias may be known, such as "q35" for the newest pc-q35-10.0.
    names = {machine, {"pc": "pc-i440fx-0", "q35": "pc-q35-0", "virt": "virt-0"}.get(machine, machine)}
    return any(
        target.architecture == architecture
        and any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in target.machines)
        for target in descriptor.targets
    )


def _build(descriptor: _Descriptor, *, secure: bool) -> Build | None:
    """None for one that isn't installed, or has no variable store of its own."""
    mapping = descriptor.mapping
    program, template = mapping.executable, mapping.template
    if mapping.device != "flash" or mapping.mode != "split" or program is None or template is None:
        return None
    if not {program.format, template.format} <= set(FORMATS):
        return None
    if not all(os.path.isabs(one.filename) and os.path.isfile(one.filename) for one in (program, template)):
        return None
    return Build(
        program.filename, program.format, template.filename, template.format, secure, SMM in descriptor.features
    )


def prepare(flash: Flash) -> None:
    """Make a guest's variable store of the template unless it is there. Raises HostError; nothing is half made."""
    store, build = flash.store, flash.build
    if os.path.lexists(store):
        _require_fit(store, build)
        return
    try:
        content = untrusted.read(build.template, STORE_LIMIT, follow=True)
        files.make_directory(os.path.dirname(store), 0o700)
    except OSError as exc:
        raise errors.HostError(f"Cannot make {store} of {build.template}: {exc.strerror}") from exc
    files.write(store, content)


def _require_fit(store: str, build: Build) -> None:
    """Raise HostError for a store made for another build, which QEMU would refuse for its size or format alone."""
    if why := _misfit(store, build):
        raise errors.HostError(
            f"{store} {why}: it belongs to another build",
            hint=f"Install that build again, or begin with new variables: mv {store} {store}.old",
        )


def _misfit(store: str, build: Build) -> str:
    """Why the build can't use an existing store, as the rest of a sentence; "" if it can, or if that isn't known."""
    try:
        if build.template_format == "qcow2":
            with open(store, "rb") as file:
                header = qcow2.read(file.fileno(), store)
            # QEMU alone writes a store in this format; a raw one has what the guest wrote, perhaps such a header.
            wrong = qcow2.unusable(header) or bool(header.backing)
            return f"can't be used by {build.program}, which needs one that QEMU has made" if wrong else ""
        has, needs = os.lstat(store).st_size, os.stat(build.template).st_size
    except errors.InvalidState:
        return f"is no qcow2 image, and {build.program} needs one"
    except OSError:
        return ""  # the template is no longer there, and no longer needed
    return f"has {has} bytes, and {build.program} needs {needs}" if has != needs else ""
