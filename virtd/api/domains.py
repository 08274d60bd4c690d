# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1 on Varlink: the daemon and its domains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .interfaces import Method, given, under

if TYPE_CHECKING:
    from .interfaces import Answer


def _shared(answer: Answer) -> Method:
    """It may mean to look at much."""
    return Method(answer, shared=True)


METHODS: dict[str, Method] = {
    "Status": _shared(lambda host, by, p: under("status", host.status())),
    "List": Method(lambda host, by, p: under("objects", host.listing())),
    "Info": Method(lambda host, by, p: under("object", host.info(p["name"]))),
    "Dump": Method(lambda host, by, p: under("text", host.dump(p["name"]))),
    "Define": Method(lambda host, by, p: host.define(p["text"], p["source"], check=bool(p.get("check")), by=by)),
    "Undefine": Method(lambda host, by, p: host.undefine(p["name"], by=by)),
    "Start": Method(lambda host, by, p: host.start(p["name"], by=by)),
    "Shutdown": Method(lambda host, by, p: host.shutdown(p["name"], p.get("timeout"), by=by)),
    "Stop": Method(lambda host, by, p: host.stop(p["name"], by=by)),
    "Kill": Method(lambda host, by, p: host.kill(p["name"], p["signal"], by=by)),
    "Reboot": Method(
        lambda host, by, p: host.reboot(p["name"], force=bool(p.get("force")), timeout=p.get("timeout"), by=by)
    ),
    "Suspend": Method(lambda host, by, p: host.suspend(p["name"], by=by)),
    "Resume": Method(lambda host, by, p: host.resume(p["name"], by=by)),
    "Autostart": Method(lambda host, by, p: host.set_autostart(p["name"], p["enable"], by=by)),
    "Check": _shared(lambda host, by, p: host.check_all(repair=False, by=by)),
    "Repair": Method(lambda host, by, p: host.check_all(repair=True, by=by)),
    "Slots": _shared(lambda host, by, p: under("slots", host.slots())),
    "Reload": Method(lambda host, by, p: host.reload(by=by)),
    "Wait": Method(
        lambda host, by, p: under("object", host.wait(p["name"], p["states"], p.get("timeout"))),
        waiting=True,
    ),
    "Follow": Method(
        lambda host, by, p: host.follow(
            p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
        ),
        waiting=True,
    ),
    "OpenConsole": Method(stream=lambda host, by, p: host.open_console(**given(p), by=by)),
}
