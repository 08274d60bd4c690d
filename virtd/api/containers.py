# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container on Varlink."""

from __future__ import annotations

from .interfaces import Method, given, under

METHODS: dict[str, Method] = {
    "List": Method(lambda host, by, p: under("objects", host.containers.listing())),
    "Info": Method(lambda host, by, p: under("object", host.containers.info(p["name"]))),
    "Dump": Method(lambda host, by, p: under("text", host.containers.dump(p["name"]))),
    "Define": Method(
        lambda host, by, p: host.containers.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "Create": Method(lambda host, by, p: host.containers.create(p["name"], p["image"], p.get("ids"), by=by)),
    "Undefine": Method(lambda host, by, p: host.containers.undefine(p["name"], by=by)),
    "Start": Method(lambda host, by, p: host.containers.start(p["name"], by=by)),
    "Shutdown": Method(lambda host, by, p: host.containers.shutdown(p["name"], p.get("timeout"), by=by)),
    "Stop": Method(lambda host, by, p: host.containers.stop(p["name"], by=by)),
    "Kill": Method(lambda host, by, p: host.containers.kill(p["name"], p["signal"], by=by)),
    "Reboot": Method(lambda host, by, p: host.containers.reboot(p["name"], p.get("timeout"), by=by)),
    "Freeze": Method(lambda host, by, p: host.containers.freeze(p["name"], by=by)),
    "Thaw": Method(lambda host, by, p: host.containers.thaw(p["name"], by=by)),
    "Autostart": Method(lambda host, by, p: host.containers.set_autostart(p["name"], p["enable"], by=by)),
    "Wait": Method(
        lambda host, by, p: under("object", host.containers.wait(p["name"], p["states"], p.get("timeout"))),
        waiting=True,
    ),
    "Follow": Method(
        lambda host, by, p: host.containers.follow(
            p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
        ),
        waiting=True,
    ),
    "Execute": Method(stream=lambda host, by, p: host.containers.execute(**given(p), by=by)),
    "Signal": Method(lambda host, by, p: host.containers.signal(p["name"], p["token"], p["signal"], by=by)),
    "OpenConsole": Method(stream=lambda host, by, p: host.containers.open_console(**given(p), by=by)),
}
