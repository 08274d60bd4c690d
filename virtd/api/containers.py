# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container on Varlink."""

from __future__ import annotations

from . import supervised
from .interfaces import Method, change, given

OBJECTS = "virtd.api.container_objects"
METHODS: dict[str, Method] = {
    **supervised.methods(lambda host: host.containers),
    "Create": change(lambda host, by, p: host.containers.create(p["name"], p["image"], p.get("ids"), by=by)),
    "Shutdown": change(lambda host, by, p: host.containers.shutdown(p["name"], p.get("timeout"), by=by)),
    "Kill": change(lambda host, by, p: host.containers.kill(p["name"], p["signal"], by=by)),
    "Reboot": change(lambda host, by, p: host.containers.reboot(p["name"], p.get("timeout"), by=by)),
    "Freeze": change(lambda host, by, p: host.containers.freeze(p["name"], by=by)),
    "Thaw": change(lambda host, by, p: host.containers.thaw(p["name"], by=by)),
    "Execute": change(stream=lambda host, by, p: host.containers.execute(**given(p), by=by)),
    "Signal": change(lambda host, by, p: host.containers.signal(p["name"], p["token"], p["signal"], by=by)),
}
