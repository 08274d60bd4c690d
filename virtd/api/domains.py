# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1 on Varlink: the daemon and its domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interfaces import Method, under

if TYPE_CHECKING:
    from .interfaces import Answer


def _changing(answer: Answer) -> Method:
    return Method(answer)


def _reading(answer: Answer) -> Method:
    return Method(answer, reading=True)


def _shared(answer: Answer) -> Method:
    return Method(answer, reading=True, shared=True)


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None}


METHODS: dict[str, Method] = {
    "Status": _shared(lambda host, by, p: under("status", host.status())),
    "List": _reading(lambda host, by, p: under("objects", host.listing())),
    "Info": _reading(lambda host, by, p: under("object", host.info(p["name"]))),
    "Dump": _reading(lambda host, by, p: under("text", host.dump(p["name"]))),
    "Define": _changing(lambda host, by, p: host.define(p["text"], p["source"], check=bool(p.get("check")), by=by)),
    "Undefine": _changing(lambda host, by, p: host.undefine(p["name"], by=by)),
    "Start": _changing(lambda host, by, p: host.start(p["name"], by=by)),
    "Shutdown": _changing(lambda host, by, p: host.shutdown(p["name"], p.get("timeout"), by=by)),
    "Stop": _changing(lambda host, by, p: host.stop(p["name"], by=by)),
    "Kill": _changing(lambda host, by, p: host.kill(p["name"], p["signal"], by=by)),
    "Reboot": _changing(
        lambda host, by, p: host.reboot(p["name"], force=bool(p.get("force")), timeout=p.get("timeout"), by=by)
    ),
    "Suspend": _changing(lambda host, by, p: host.suspend(p["name"], by=by)),
    "Resume": _changing(lambda host, by, p: host.resume(p["name"], by=by)),
    "Autostart": _changing(lambda host, by, p: host.set_autostart(p["name"], p["enable"], by=by)),
    "Check": _shared(lambda host, by, p: host.check_all(repair=False, by=by)),
    "Repair": _changing(lambda host, by, p: host.check_all(repair=True, by=by)),
    "Slots": _shared(lambda host, by, p: under("slots", host.slots())),
    "Reload": _changing(lambda host, by, p: host.reload(by=by)),
    "Wait": Method(
        lambda host, by, p: under("object", host.wait(p["name"], p["states"], p.get("timeout"))),
        reading=True,
        waiting=True,
    ),
    # Not `reading`: a console holds what its guest's users would rather keep to themselves.
    "Follow": Method(
        lambda host, by, p: host.follow(
            p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
        ),
        waiting=True,
    ),
    "OpenConsole": Method(stream=lambda host, by, p: host.open_console(**_given(p), by=by)),
}
