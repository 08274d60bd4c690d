# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names in systemd and on the bus: units, their D-Bus paths, mount units, targets."""

from __future__ import annotations

import os
import re
from typing import Final

SYSTEMD: Final = "org.freedesktop.systemd1"
MANAGER_PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
UNIT: Final = "org.freedesktop.systemd1.Unit"
SERVICE: Final = "org.freedesktop.systemd1.Service"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

MAX_UNIT_NAME: Final = 255

# The targets that end children when the host goes down. Not shutdown.target, which stops other services: a soft
# reboot reaches it too, and children survive that.
FINAL_TARGETS: Final = ("poweroff.target", "reboot.target", "halt.target", "kexec.target")
# When the host goes down, everything that is Before= this target stays until the children have ended: virtd itself,
# networks, mounts. See units/virtd-guests-pre.target.
GROUND: Final = "virtd-guests-pre.target"


def unit_name(driver: str, name: str) -> str:
    """The unit of an object. Names of objects (letters, digits, `.`, `_`, `-`) need no escaping in a unit's name."""
    unit = f"virtd-{driver}-{name}.service"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or len(unit) > MAX_UNIT_NAME:
        raise ValueError(f"{name!r} can't be part of a unit's name")
    return unit


def object_name(driver: str, unit: str) -> str | None:
    """The inverse of `unit_name`; None for a unit that isn't of this driver."""
    match = re.fullmatch(rf"virtd-{re.escape(driver)}-([A-Za-z0-9._-]+)\.service", unit)
    return match[1] if match else None


def helper_unit(driver: str, name: str, role: str) -> str:
    """The unit of another process that an object needs. No object's own unit has an "@" in its name."""
    return f"{unit_name(driver, name).removesuffix('.service')}@{role}.service"


def helped(driver: str, role: str, unit: str) -> str | None:
    """The inverse of `helper_unit`; None for a unit that isn't of this driver and role."""
    main, _, rest = unit.partition("@")
    return object_name(driver, f"{main}.service") if rest == f"{role}.service" else None


def object_path(unit: str) -> str:
    """The unit's D-Bus path, escaped as sd_bus_path_encode(3) does it."""
    return f"{MANAGER_PATH}/unit/{escape_label(unit)}"


def escape_label(text: str) -> str:
    """One element of a D-Bus path: all bytes but letters, and digits except the first, become `_` and two hex
    digits."""
    return "_" if not text else re.sub(rb"[^A-Za-z0-9]|^[0-9]", lambda m: b"_%02x" % m[0][0], text.encode()).decode()


def unescape_label(label: str) -> str:
    """The inverse of `escape_label`; ValueError for anything that it can't have made."""
    text = (
        ""
        if label == "_"
        else re.sub(rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), label.encode()).decode(errors="replace")
    )
    if escape_label(text) != label:
        raise ValueError(f"{label!r} is not an escaped name")
    return text


def mount_units(path: str) -> list[str]:
    """The mount units that may contain `path`, if they exist: one for each directory above it, systemd.mount(5)."""
    parts = path.strip("/").split("/")[:-1]
    return [mount_unit("/".join(parts[:count])) for count in range(1, len(parts) + 1)]


def mount_unit(path: str) -> str:
    """The unit of a mount point, systemd.unit(5): "/" becomes "-", and ambiguous characters \\xNN."""
    escaped = re.sub(rb"[^A-Za-z0-9:_./]|^\.", lambda match: b"\\x%02x" % match[0][0], os.fsencode(path.strip("/")))
    return f"{escaped.replace(b'/', b'-').decode() or '-'}.mount"
