# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a transient service unit is made of: the arguments of StartTransientUnit, org.freedesktop.systemd1(5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from .names import FINAL_TARGETS, GROUND

if TYPE_CHECKING:
    from .aliases import Property

SURVIVAL_SINCE: Final = 255  # SurviveFinalKillSignal=; soft reboots exist since 254

# A child's standard input, output or error: a descriptor, a path that systemd opens, or "null" or "journal". PID 1
# keeps a descriptor until the unit ends (see children/fifos.py), so a path is better for a long-lived child.
Stdio: TypeAlias = int | str


class UnitSpec(msgspec.Struct, frozen=True):
    """The specification of a child's unit. `environment` is the child's whole environment, except what systemd itself
    sets.

    `properties` are additional ones for the sandbox and limits: (D-Bus name, signature, value). `after`: units, for
    example mounts, that stay until the child has ended when the host goes down; they need not exist. `ground`: other
    children depend on this one, and it stays until the last of them has ended. They don't name it: systemd keeps a
    unit loaded as long as a loaded unit names it, so it could be neither collected nor started again while one of
    them runs. `once`: nobody else can start or restart it. `aliases`: the directory for aliases of odd paths in
    `properties`, used by this unit alone; it must exist until the unit has ended.
    """

    name: str
    description: str
    slice: str
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    user: str = ""
    group: str = ""
    supplementary_groups: tuple[str, ...] = ()
    properties: tuple[tuple[str, str, Any], ...] = ()
    after: tuple[str, ...] = ()
    ground: bool = False
    once: bool = False
    aliases: str = ""


def transient_properties(spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], version: int) -> list[Property]:
    """The properties for StartTransientUnit of that systemd; its message has the descriptors of `stdio`, in order."""
    found: list[Property] = [
        ("Description", "s", spec.description),
        ("Slice", "s", spec.slice),
        # "exec": the job is done when the program has been executed, and fails if it can't be.
        ("Type", "s", "exec"),
        # systemd.service(5), "Command lines": a "$" must be doubled, otherwise it begins a variable's name.
        ("ExecStart", "a(sasb)", [(spec.argv[0], [word.replace("$", "$$") for word in spec.argv], False)]),
        # An exit status stays readable until collected: after a success because of this, after a failure because of
        # CollectMode=inactive.
        ("RemainAfterExit", "b", True),
        ("KillMode", "s", "mixed"),
        ("Environment", "as", [f"{key}={value}" for key, value in spec.environment]),
        # A soft reboot ends every unit without this; a real shutdown of the host ends the child first of all.
        ("DefaultDependencies", "b", False),
        ("IgnoreOnIsolate", "b", True),
        ("Conflicts", "as", list(FINAL_TARGETS)),
        ("Before", "as", [*FINAL_TARGETS, GROUND] if spec.ground else list(FINAL_TARGETS)),
        ("After", "as", list(spec.after) if spec.ground else [GROUND, *spec.after]),
    ]
    if version >= SURVIVAL_SINCE:
        found.append(("SurviveFinalKillSignal", "b", True))
    if spec.user:
        found.append(("User", "s", spec.user))
    if spec.group:
        found.append(("Group", "s", spec.group))
    if spec.supplementary_groups:
        found.append(("SupplementaryGroups", "as", list(spec.supplementary_groups)))
    found += spec.properties
    number = 0
    for which, one in zip(("Input", "Output", "Error"), stdio, strict=True):
        if isinstance(one, str):
            found.append((f"Standard{which}{'File' if one.startswith('/') else ''}", "s", one))
        else:
            found.append((f"Standard{which}FileDescriptor", "h", number))
            number += 1
    return found
