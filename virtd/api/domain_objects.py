# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Domain on D-Bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .introspection import GUEST, SUPERVISED, Args, Interface, Property, methods
from .kinds import Kind
from .variants import supervised

if TYPE_CHECKING:
    from .variants import Object

DOMAIN = "org.virtd1.Domain"
LATE: dict[str, Var] = {"Exit": Var("a{sv}", {})}


def properties(item: Object) -> dict[str, Var]:
    """From Host.info; all but Exit from the short form."""
    number = item.get("id")
    # A domain without a number isn't running: -1, as with libvirt.
    return supervised(item) | {"Id": Var("i", -1 if number is None else number)}


MEMBERS = Interface(
    methods=methods(
        "org.virtd1",
        **GUEST,
        Reboot=("Reboot", "force:b", "changed:b"),
        Suspend=("Suspend", "", "changed:b"),
        Resume=("Resume", "", "changed:b"),
        RemoveState=("RemoveState", "", "changed:b"),
        UpgradeMachine=("UpgradeMachine", "", "changed:b"),
    ),
    properties=SUPERVISED
    | {
        "Id": Property("i"),
    },
    signals={"Ended": Args("exit:a{sv}")},
)
KIND = Kind(
    segment="domain",
    interface=DOMAIN,
    members=MEMBERS,
    driver="qemu",
    listing=lambda host: host.domains.listing(),
    info=lambda host, name: host.domains.info(name),
    properties=properties,
    late=LATE,
    ended=True,
)
