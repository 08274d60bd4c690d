# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Network on Varlink."""

from __future__ import annotations

from .interfaces import Method, under

METHODS: dict[str, Method] = {
    "List": Method(lambda host, by, p: under("objects", host.networks.listing())),
    "Info": Method(lambda host, by, p: under("object", host.networks.info(p["name"]))),
    "Dump": Method(lambda host, by, p: under("text", host.networks.dump(p["name"]))),
    "Leases": Method(lambda host, by, p: under("leases", host.networks.leases(p["name"]))),
    "Define": Method(
        lambda host, by, p: host.networks.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "DefineDefault": Method(lambda host, by, p: host.networks.define_default(by=by)),
    "Undefine": Method(lambda host, by, p: host.networks.undefine(p["name"], by=by)),
    "Autostart": Method(lambda host, by, p: host.networks.set_autostart(p["name"], p["enable"], by=by)),
    "Start": Method(lambda host, by, p: host.networks.start(p["name"], by=by)),
    "Stop": Method(lambda host, by, p: host.networks.stop(p["name"], force=bool(p.get("force")), by=by)),
}
