# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Pool on Varlink."""

from __future__ import annotations

from .interfaces import Method, under

METHODS: dict[str, Method] = {
    "List": Method(lambda host, by, p: under("objects", host.pools.listing())),
    "Info": Method(lambda host, by, p: under("object", host.pools.info(p["name"]))),
    "Dump": Method(lambda host, by, p: under("text", host.pools.dump(p["name"]))),
    "Define": Method(
        lambda host, by, p: host.pools.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "Undefine": Method(lambda host, by, p: host.pools.undefine(p["name"], by=by)),
    "Build": Method(lambda host, by, p: host.pools.build(p["name"], by=by)),
    "Start": Method(lambda host, by, p: host.pools.start(p["name"], by=by)),
    "Stop": Method(lambda host, by, p: host.pools.stop(p["name"], by=by)),
    "Refresh": Method(lambda host, by, p: host.pools.refresh(p["name"], by=by)),
    "Autostart": Method(lambda host, by, p: host.pools.set_autostart(p["name"], p["enable"], by=by)),
}
