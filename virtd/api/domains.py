# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1 on Varlink: the daemon and its domains."""

from __future__ import annotations

from . import supervised
from .interfaces import Method, change, look, under

OBJECTS = "virtd.api.domain_objects"
METHODS: dict[str, Method] = {
    **supervised.methods(lambda host: host.domains),
    "Status": look(lambda host, by, p: under("status", host.status()), shared=True),
    "Shutdown": change(lambda host, by, p: host.domains.shutdown(p["name"], p.get("timeout"), by=by)),
    "Kill": change(lambda host, by, p: host.domains.kill(p["name"], p["signal"], by=by)),
    "Reboot": change(
        lambda host, by, p: host.domains.reboot(
            p["name"], force=bool(p.get("force")), timeout=p.get("timeout"), by=by
        )
    ),
    "Suspend": change(lambda host, by, p: host.domains.suspend(p["name"], by=by)),
    "Resume": change(lambda host, by, p: host.domains.resume(p["name"], by=by)),
    "RemoveState": change(lambda host, by, p: host.domains.remove_state(p["name"], by=by)),
    "UpgradeMachine": change(lambda host, by, p: host.domains.upgrade_machine(p["name"], by=by)),
    "Check": look(lambda host, by, p: host.check_all(repair=False, by=by), shared=True),
    "Repair": change(lambda host, by, p: host.check_all(repair=True, by=by)),
    "Slots": look(lambda host, by, p: under("slots", host.slots()), shared=True),
    "Reload": change(lambda host, by, p: host.reload(by=by)),
    "Subscribe": look(stream=lambda host, by, p: host.events.subscribe(p.get("since")), waiting=True),
}
