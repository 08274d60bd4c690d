# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl container: LXC containers."""

from __future__ import annotations

import os
from functools import partial

from virtd.cli import console as consoles
from virtd.cli import domains, show
from virtd.cli import execute as executing
from virtd.cli import log as logs
from virtd.cli.client import Call, constant
from virtd.cli.exits import OK
from virtd.cli.output import (
    clean,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

NOUN = "container"
PREFIX = "Container."
VIRTDCTL = "virtdctl container"

COMMANDS: dict[str, tuple[str, str, str, str, str]] = {
    "list": ("container", "Containers", "", "List containers with their state", "list containers"),
    "info": ("container", "Containers", "NAME", "Show everything about one container", "show {name}"),
    "start": ("container", "Containers", "NAME...", "Start containers", ""),
    "shutdown": ("container", "Containers", "NAME...", "Ask containers to shut down, and wait until they have", ""),
    "stop": ("container", "Containers", "NAME...", "End everything in containers at once", ""),
    "kill": ("container", "Containers", "NAME...", "Send a signal to the containers' first processes", ""),
    "reboot": ("container", "Containers", "NAME...", "Ask the containers' inits to reboot", ""),
    "freeze": ("container", "Containers", "NAME...", "Stop all processes of containers where they are", ""),
    "thaw": ("container", "Containers", "NAME...", "Let frozen containers continue", ""),
    "wait": ("container", "Containers", "NAME", "Wait until a container is in a state", "wait for {name}"),
    "console": ("container", "Console and log", "NAME", "Connect to a container's console",
                "open the console of {name}"),
    "log": (
        "container", "Console and log", "NAME", "Show what a container wrote to its console", "show the log of {name}"
    ),
    "exec": (
        "container",
        "Console and log",
        "NAME -- COMMAND...",
        "Run a command in a container",
        "run a command in {name}",
    ),
    "create": ("container", "Definitions", "NAME", "Make a container from an image", "create {name}"),
    "define": ("container", "Definitions", "FILE|-...", "Define containers, or change their definitions", ""),
    "undefine": ("container", "Definitions", "NAME...", "Remove the definitions of containers", ""),
    "dump": ("container", "Definitions", "NAME", "Print a container's definition", "print the definition of {name}"),
    "autostart": ("container", "Definitions", "NAME...", "Start containers when the host boots, or no longer", ""),
}  # fmt: skip


def _what(item: dict[str, Any]) -> str:
    return f"container {item.get('uuid') or ''}"


def _details(item: dict[str, Any]) -> list[tuple[str, str]]:
    ids = item.get("ids")
    limits, used = item.get("limits") or {}, item.get("used") or {}
    return [
        ("Root", show.text(item.get("rootfs"))),
        ("Program", " ".join(map(str, item.get("argv") or []))),
        ("Hostname", show.text(item.get("hostname"))),
        (
            "IDs",
            f"{ids[0]} to {ids[0] + ids[1] - 1}" if ids else "those of the host" if item.get("privileged") else "",
        ),
        ("Memory", _of(show.size(used.get("memory")), show.size(limits.get("memory")))),
        ("CPUs", show.text(limits.get("cpus"))),
        ("Processes", _of(show.text(used.get("pids")), show.text(limits.get("pids")))),
        ("Addresses", "\n".join(map(str, item.get("addresses") or []))),
    ]


def _of(used: str, limit: str) -> str:
    """ "5 of 100", as far as known."""
    return " of ".join(filter(None, [used, limit])) if used else (f"at most {limit}" if limit else "")


def reboot(args: argparse.Namespace, session: Session) -> int:
    def begin(name: str) -> Call:
        # Not repeated: a second reboot would interrupt the boot after the first.
        parameters: dict[str, Any] = {"name": name, "timeout": args.timeout}
        limit = None if args.timeout is None else args.timeout + domains.WORK
        return Call(session, "Container.Reboot", constant(parameters), limit=limit, repeat=False)

    return domains.act(args.names, "reboot", begin, lambda _name, call: call.result())


def _reboot_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=domains.time_limit,
        help="how long to wait until they have (default: shutdown_timeout of virtd.toml)",
    )


def create(args: argparse.Namespace, session: Session) -> int:
    # Not repeated: the result of the first attempt would be in the way.
    parameters: dict[str, Any] = {"name": args.name, "image": os.path.abspath(args.image)}
    if args.ids is not None:
        parameters["ids"] = args.ids
    with Call(session, "Container.Create", constant(parameters), limit=None, repeat=False) as call:
        reply = call.result().parameters
    print(f"Created {clean(str(reply.get('name')))} ({clean(str(reply.get('path')))}).")
    return OK


def _create_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the new container's name")
    parser.add_argument(
        "--image", metavar="ROOTFS.tar.xz|DIR", required=True, help="an archive of a root file system, or a directory"
    )
    parser.add_argument(
        "--ids", metavar="COUNT", type=int, help="how many user and group IDs it has (default: 65536)"
    )


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "list": show.list_options,
    "info": partial(show.named, noun=NOUN),
    "start": domains.names,
    "shutdown": domains.shutdown_options,
    "stop": domains.names,
    "kill": domains.kill_options,
    "reboot": _reboot_options,
    "freeze": domains.names,
    "thaw": domains.names,
    "wait": partial(show.wait_options, noun=NOUN),
    "console": partial(consoles.options, noun=NOUN),
    "log": partial(logs.options, noun=NOUN, what="LXC itself"),
    "exec": executing.options,
    "create": _create_options,
    "define": domains.define_options,
    "undefine": domains.names,
    "dump": partial(show.named, noun=NOUN),
    "autostart": domains.autostart_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "list": show.listing("Container.List", "lxc", NOUN),
    "info": show.informing("Container.Info", _what, _details, "it"),
    "start": domains.plain("start", "Container.Start"),
    "shutdown": domains.shutting_down(PREFIX, VIRTDCTL),
    "stop": domains.plain("stop", "Container.Stop"),
    "kill": domains.killing("Container.Kill"),
    "reboot": reboot,
    "freeze": domains.plain("freeze", "Container.Freeze"),
    "thaw": domains.plain("thaw", "Container.Thaw"),
    "wait": show.waiting("Container.Wait"),
    "console": consoles.attaching(NOUN, PREFIX),
    "log": logs.logging("Container.Follow"),
    "exec": executing.execute,
    "create": create,
    "define": domains.defining("Container.Define"),
    "undefine": domains.undefining("Container.Undefine"),
    "dump": show.dumping("Container.Dump"),
    "autostart": domains.autostarting("Container.Autostart"),
}
