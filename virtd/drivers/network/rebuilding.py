# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restores or clears away networks of which only a unit, slots or a bridge is left, and no record."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ... import journal
from ...messages import Message
from ...model.state import Activity
from ...records import Record, now
from .netrecord import DRIVER

if TYPE_CHECKING:
    from .net import Net

log = logging.getLogger(__name__)


async def rebuild(net: Net, slots: dict[str, str], *, unit: bool) -> bool:
    """Restore the network by its definition if its bridge exists, otherwise clear it away; returns whether it was
    restored.
    """
    network = net.definition
    whole = network is not None and net.has_bridge
    data: dict[str, Any] = {}
    if network is not None and whole:
        data = {"definition": net.definition_text, "mac": net.mac, "bridge": network.bridge_name}
    state = Activity.ACTIVE if whole else Activity.STOPPING
    reason = "rebuilt without its record"
    net.record = record = Record(
        driver=DRIVER,
        name=net.name,
        uuid=net.uuid,
        state=state.value,
        reason=reason,
        since=now(),
        unit=net.unit if unit else "",
        boot_id=net.shared.boot_id,
        slots=slots,
        data=data,
    )
    net.note(state, reason)
    if slots or unit:
        net.server.adopt(record)
    await net.reconcile(unit_exists=unit)
    if whole:
        await net.start("virtd")  # makes what is missing
        log.warning("Network %s was rebuilt from its bridge", net.name)
    else:
        journal.send(
            f"Rolled back network {net.name}: there was no record of it",
            message_id=Message.ROLLED_BACK, level="notice", **net.fields(),
        )  # fmt: skip
    return whole
