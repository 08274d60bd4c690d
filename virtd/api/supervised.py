# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every kind of object that runs as a process answers on Varlink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interfaces import Method, given, under

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..host import Host
    from ..host.objects import Objects


def methods(of: Callable[[Host], Objects[Any]]) -> dict[str, Method]:
    """`of` gives what the operations are called on."""
    return {
        "List": Method(lambda host, by, p: under("objects", of(host).listing())),
        "Info": Method(lambda host, by, p: under("object", of(host).info(p["name"]))),
        "Dump": Method(lambda host, by, p: under("text", of(host).dump(p["name"]))),
        "Define": Method(
            lambda host, by, p: of(host).define(p["text"], p["source"], check=bool(p.get("check")), by=by)
        ),
        "Undefine": Method(lambda host, by, p: of(host).undefine(p["name"], by=by)),
        "Start": Method(lambda host, by, p: of(host).start(p["name"], by=by)),
        "Stop": Method(lambda host, by, p: of(host).stop(p["name"], by=by)),
        "Autostart": Method(lambda host, by, p: of(host).set_autostart(p["name"], p["enable"], by=by)),
        "Wait": Method(
            lambda host, by, p: under("object", of(host).wait(p["name"], p["states"], p.get("timeout"))),
            waiting=True,
        ),
        "Follow": Method(
            lambda host, by, p: of(host).follow(
                p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
            ),
            waiting=True,
        ),
        "OpenConsole": Method(stream=lambda host, by, p: of(host).open_console(**given(p), by=by)),
    }
