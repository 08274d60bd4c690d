# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Network on Varlink."""

from __future__ import annotations

from .interfaces import Method, change, look, under

OBJECTS = "virtd.api.network_objects"
METHODS: dict[str, Method] = {
    "List": look(lambda host, by, p: under("objects", host.networks.listing())),
    "Info": look(lambda host, by, p: under("object", host.networks.info(p["name"]))),
    "Dump": look(lambda host, by, p: under("text", host.networks.dump(p["name"]))),
    "Leases": look(lambda host, by, p: under("leases", host.networks.leases(p["name"]))),
    "Define": change(
        lambda host, by, p: host.networks.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "DefineDefault": change(lambda host, by, p: host.networks.define_default(by=by)),
    "Undefine": change(lambda host, by, p: host.networks.undefine(p["name"], by=by)),
    "Autostart": change(lambda host, by, p: host.networks.set_autostart(p["name"], p["enable"], by=by)),
    "Start": change(lambda host, by, p: host.networks.start(p["name"], by=by)),
    "Stop": change(lambda host, by, p: host.networks.stop(p["name"], force=bool(p.get("force")), by=by)),
}
