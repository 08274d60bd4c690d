# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1 on Varlink: the daemon and its domains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import supervised
from .interfaces import Method, under

if TYPE_CHECKING:
    from .interfaces import Answer


def _shared(answer: Answer) -> Method:
    """It may mean to look at much."""
    return Method(answer, shared=True)


METHODS: dict[str, Method] = {
    **supervised.methods(lambda host: host),
    "Status": _shared(lambda host, by, p: under("status", host.status())),
    "Shutdown": Method(lambda host, by, p: host.shutdown(p["name"], p.get("timeout"), by=by)),
    "Kill": Method(lambda host, by, p: host.kill(p["name"], p["signal"], by=by)),
    "Reboot": Method(
        lambda host, by, p: host.reboot(p["name"], force=bool(p.get("force")), timeout=p.get("timeout"), by=by)
    ),
    "Suspend": Method(lambda host, by, p: host.suspend(p["name"], by=by)),
    "Resume": Method(lambda host, by, p: host.resume(p["name"], by=by)),
    "UpgradeMachine": Method(lambda host, by, p: host.upgrade_machine(p["name"], by=by)),
    "Check": _shared(lambda host, by, p: host.check_all(repair=False, by=by)),
    "Repair": Method(lambda host, by, p: host.check_all(repair=True, by=by)),
    "Slots": _shared(lambda host, by, p: under("slots", host.slots())),
    "Reload": Method(lambda host, by, p: host.reload(by=by)),
    "Subscribe": Method(stream=lambda host, by, p: host.events.subscribe(p.get("since")), waiting=True),
}
