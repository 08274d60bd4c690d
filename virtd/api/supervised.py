# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink methods of every kind of object that runs as a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interfaces import Method, change, given, look, overhear, under

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..host import Host
    from ..host.objects import Objects


def methods(of: Callable[[Host], Objects[Any]]) -> dict[str, Method]:
    """`of` gets the object whose operations are called."""
    return {
        "List": look(lambda host, by, p: under("objects", of(host).listing())),
        "Info": look(lambda host, by, p: under("object", of(host).info(p["name"]))),
        "Dump": look(lambda host, by, p: under("text", of(host).dump(p["name"]))),
        "Define": change(
            lambda host, by, p: of(host).define(p["text"], p["source"], check=bool(p.get("check")), by=by)
        ),
        "Undefine": change(lambda host, by, p: of(host).undefine(p["name"], by=by)),
        "Start": change(lambda host, by, p: of(host).start(p["name"], by=by)),
        "Stop": change(lambda host, by, p: of(host).stop(p["name"], by=by)),
        "Autostart": change(lambda host, by, p: of(host).set_autostart(p["name"], p["enable"], by=by)),
        "Wait": look(
            lambda host, by, p: under("object", of(host).wait(p["name"], p["states"], p.get("timeout"))),
            waiting=True,
        ),
        "Follow": overhear(
            lambda host, by, p: of(host).follow(
                p["name"], p["log"], p.get("file"), p.get("offset"), p.get("lines"), wait=bool(p.get("wait"))
            ),
            waiting=True,
        ),
        "OpenConsole": overhear(stream=lambda host, by, p: of(host).open_console(**given(p), by=by)),
    }
