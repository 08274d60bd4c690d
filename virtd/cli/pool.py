# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl pool: the storage pools."""

from __future__ import annotations

from virtd.cli.client import Call, constant
from virtd.cli.domains import (
    WORK,
    act,
    autostart_options,
    autostarting,
    define_options,
    defining,
    names,
    plain,
    undefining,
)
from virtd.cli.exits import OK
from virtd.cli.output import (
    YELLOW,
    autostarts,
    clean,
    heading,
    labelled,
    listing,
    paint,
    size_of,
    write_json,
)
from virtd.cli.show import dumping

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

COMMANDS: dict[str, tuple[str, str, str, str, str]] = {
    "list": ("pool", "Pools", "", "List storage pools with their state", "list pools"),
    "info": ("pool", "Pools", "NAME", "Show everything about one pool", "show {name}"),
    "start": ("pool", "Pools", "NAME...", "Make pools usable", ""),
    "stop": ("pool", "Pools", "NAME...", "Take pools out of use; their volumes stay", ""),
    "refresh": ("pool", "Pools", "NAME...", "Check pools again, and remove unfinished volumes", ""),
    "build": ("pool", "Pools", "NAME...", "Make the directories of directory pools", ""),
    "define": ("pool", "Definitions", "FILE|-...", "Define pools, or change their definitions", ""),
    "undefine": ("pool", "Definitions", "NAME...", "Remove the definitions of pools", ""),
    "dump": ("pool", "Definitions", "NAME", "Print a pool's definition", "print the definition of {name}"),
    "autostart": ("pool", "Definitions", "NAME...", "Start pools when the host boots, or no longer", ""),
}


def list_(args: argparse.Namespace, session: Session) -> int:
    pools = session.call("Pool.List")["objects"]
    header = ("NAME", "STATE", "TYPE", "SIZE", "AVAILABLE", "AUTOSTART", "PATH")
    return listing(args, pools, "pool", header, _row)


def _row(pool: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(pool.get("name")),
        str(pool.get("state")),
        str(pool.get("type") or "-"),
        size_of(pool.get("capacity")),
        size_of(pool.get("available")),
        autostarts(pool),
        str(pool.get("path") or "-"),
    )


def info(args: argparse.Namespace, session: Session) -> int:
    pool = session.call("Pool.Info", {"name": args.name})["object"]
    if args.json:
        write_json(pool, args.json)
        return OK
    heading(pool, f"{pool.get('type')} pool {pool.get('uuid')}")
    pending = "\nchanged since the start; it takes effect with the next one" if pool.get("pending") else ""
    source = str(pool.get("source") or "")
    labelled(
        [
            ("Path", str(pool.get("path") or "")),
            ("Source", source + (f" ({pool['fstype']})" if pool.get("fstype") else "")),
            ("Options", str(pool.get("options") or "")),
            ("Size", size_of(pool.get("capacity")).replace("-", "")),
            ("Used", size_of(pool.get("allocation")).replace("-", "")),
            ("Available", size_of(pool.get("available")).replace("-", "")),
            ("Autostart", autostarts(pool)),
            ("Definition", str(pool.get("definition_path") or "") + pending),
        ]
    )
    problems(pool.get("problems") or [])
    return OK


def problems(found: list[dict[str, Any]]) -> None:
    for problem in found:
        print(paint(clean(f"{'Problem':>10}: {problem.get('text')}"), YELLOW))
        if problem.get("hint"):
            print(f"{'':>12}{clean(str(problem['hint']))}")


def refresh(args: argparse.Namespace, session: Session) -> int:
    def begin(name: str) -> Call:
        return Call(session, "Pool.Refresh", constant({"name": name}), limit=WORK)

    def end(_name: str, call: Call) -> None:
        reply = call.result().parameters
        for item in reply.get("removed") or []:
            print(f"Removed {clean(str(item))}, which was unfinished.")

    return act(args.names, "refresh", begin, end)


def _list_options(parser: Parser) -> None:
    parser.legend()
    parser.json()


def _info_options(parser: Parser) -> None:
    parser.name()
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "list": _list_options,
    "info": _info_options,
    "start": names,
    "stop": names,
    "refresh": names,
    "build": names,
    "define": define_options,
    "undefine": names,
    "dump": _info_options,
    "autostart": autostart_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "list": list_,
    "info": info,
    "start": plain("start", "Pool.Start"),
    "stop": plain("stop", "Pool.Stop"),
    "refresh": refresh,
    "build": plain("build", "Pool.Build"),
    "define": defining("Pool.Define"),
    "undefine": undefining("Pool.Undefine"),
    "dump": dumping("Pool.Dump"),
    "autostart": autostarting("Pool.Autostart"),
}
