# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Pool on Varlink."""

from __future__ import annotations

from .interfaces import Method, change, look, under

OBJECTS = "virtd.api.pool_objects"
METHODS: dict[str, Method] = {
    "List": look(lambda host, by, p: under("objects", host.pools.listing())),
    "Info": look(lambda host, by, p: under("object", host.pools.info(p["name"]))),
    "Dump": look(lambda host, by, p: under("text", host.pools.dump(p["name"]))),
    "Define": change(
        lambda host, by, p: host.pools.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "Undefine": change(lambda host, by, p: host.pools.undefine(p["name"], by=by)),
    "Build": change(lambda host, by, p: host.pools.build(p["name"], by=by)),
    "Start": change(lambda host, by, p: host.pools.start(p["name"], by=by)),
    "Stop": change(lambda host, by, p: host.pools.stop(p["name"], by=by)),
    "Refresh": change(lambda host, by, p: host.pools.refresh(p["name"], by=by)),
    "Autostart": change(lambda host, by, p: host.pools.set_autostart(p["name"], p["enable"], by=by)),
}
