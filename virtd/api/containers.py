# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Container on Varlink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interfaces import Method, under

if TYPE_CHECKING:
    from .interfaces import Answer


def _changing(answer: Answer) -> Method:
    return Method(answer)


def _reading(answer: Answer) -> Method:
    return Method(answer, reading=True)


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None}


METHODS: dict[str, Method] = {
    "List": _reading(lambda host, by, p: under("objects", host.containers.listing())),
    "Info": _reading(lambda host, by, p: under("object", host.containers.info(p["name"]))),
    "Dump": _reading(lambda host, by, p: under("text", host.containers.dump(p["name"]))),
    "Define": _changing(
        lambda host, by, p: host.containers.define(p["text"], p["source"], check=bool(p.get("check")), by=by)
    ),
    "Create": _changing(lambda host, by, p: host.containers.create(p["name"], p["image"], p.get("ids"), by=by)),
    "Undefine": _changing(lambda host, by, p: host.containers.undefine(p["name"], by=by)),
    "Start": _changing(lambda host, by, p: host.containers.start(p["name"], by=by)),
    "Shutdown": _changing(lambda host, by, p: host.containers.shutdown(p["name"], p.get("timeout"), by=by)),
    "Stop": _changing(lambda host, by, p: host.containers.stop(p["name"], by=by)),
    "Kill": _changing(lambda host, by, p: host.containers.kill(p["name"], p["signal"], by=by)),
    "Reboot": _changing(lambda host, by, p: host.containers.reboot(p["name"], p.get("timeout"), by=by)),
    "Freeze": _changing(lambda host, by, p: host.containers.freeze(p["name"], by=by)),
    "Thaw": _changing(lambda host, by, p: host.containers.thaw(p["name"], by=by)),
    "Autostart": _changing(lambda host, by, p: host.containers.set_autostart(p["name"], p["enable"], by=by)),
    "Wait": Method(
        lambda host, by, p: under("object", host.containers.wait(p["name"], p["states"], p.get("timeout"))),
        reading=True,
        waiting=True,
    ),
    # Not `reading`, for the same reason as a domain's.
    "Follow": Method(
        lambda host, by, p: host.containers.follow(
            p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
        ),
        waiting=True,
    ),
    "Execute": Method(stream=lambda host, by, p: host.containers.execute(**_given(p), by=by)),
    "Signal": _changing(lambda host, by, p: host.containers.signal(p["name"], p["token"], p["signal"], by=by)),
    "OpenConsole": Method(stream=lambda host, by, p: host.containers.open_console(**_given(p), by=by)),
}
