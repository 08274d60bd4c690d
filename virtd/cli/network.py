# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl network: the networks that guests are connected to."""

from __future__ import annotations

import os

from virtd.cli import domains
from virtd.cli.client import Call, constant
from virtd.cli.exits import OK
from virtd.cli.output import (
    ago,
    autostarts,
    clean,
    heading,
    labelled,
    listing,
    write_json,
)
from virtd.cli.show import dumping, show_problems

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

COMMANDS: dict[str, tuple[str, str, str, str, str]] = {
    "list": ("network", "Networks", "", "List networks with their state", "list networks"),
    "info": ("network", "Networks", "NAME", "Show everything about one network", "show network {name}"),
    "leases": ("network", "Networks", "NAME", "Show the addresses that guests have been given", "show the leases"),
    "start": ("network", "Networks", "NAME...", "Start networks, or repair them", ""),
    "stop": ("network", "Networks", "NAME...", "Stop networks that nobody uses", ""),
    "define": ("network", "Definitions", "FILE|-|default...", "Define networks, or change their definitions", ""),
    "undefine": ("network", "Definitions", "NAME...", "Remove the definitions of networks", ""),
    "dump": ("network", "Definitions", "NAME", "Print a network's definition", "print the definition of {name}"),
    "autostart": ("network", "Definitions", "NAME...", "Start networks when the host boots, or no longer", ""),
}
DEFAULT = "default"


def list_(args: argparse.Namespace, session: Session) -> int:
    networks = session.call("Network.List")["objects"]
    if args.active:
        networks = [item for item in networks if item.get("state") != "inactive"]
    header = ("NAME", "STATE", "MODE", "BRIDGE", "ADDRESS", "SINCE", "AUTOSTART")
    return listing(args, networks, "network", header, _row, colour=1)


def _row(item: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(item.get("name")),
        str(item.get("state")),
        str(item.get("mode") or "-"),
        str(item.get("bridge") or "-"),
        " ".join(str(item[key]) for key in ("ipv4", "ipv6") if item.get(key)) or "-",
        ago(item.get("since") or "") or "-",
        autostarts(item),
    )


def info(args: argparse.Namespace, session: Session) -> int:
    item = session.call("Network.Info", {"name": args.name})["object"]
    if args.json:
        write_json(item, args.json)
        return OK
    heading(item, f"{item.get('mode')} network {item.get('uuid') or ''}")
    labelled(_details(item))
    show_problems(item.get("problems") or [])
    return OK


def _details(item: dict[str, Any]) -> list[tuple[str, str]]:
    pending = "\nchanged; it takes effect with the next start" if item.get("pending") else ""
    return [
        ("Bridge", _text(item.get("bridge"))),
        ("Address", "\n".join(str(item[key]) for key in ("ipv4", "ipv6") if item.get(key))),
        ("DHCP", "\n".join(map(str, item.get("ranges") or []))),
        ("Domain", _text(item.get("domain"))),
        ("MTU", _text(item.get("mtu"))),
        ("Forwards", "\n".join(map(str, item.get("forwards") or []))),
        ("Used by", "\n".join(map(str, item.get("users") or []))),
        ("Refused", "\n".join(map(_refused, (row for row in item.get("ports") or [] if row.get("refused"))))),
        ("Leases", _text(item.get("leases") or None)),
        ("dnsmasq", f"PID {item['pid']} in {item.get('unit')}" if item.get("pid") else ""),
        ("Autostart", autostarts(item)),
        ("Definition", _text(item.get("definition_path")) + pending),
        ("Log", _text(item.get("log"))),
    ]


def _refused(port: dict[str, Any]) -> str:
    return (
        f"{port['refused']} frames of {port['user']} ({port['interface']}): not its own MAC or address, or no guest's"
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def leases(args: argparse.Namespace, session: Session) -> int:
    found = session.call("Network.Leases", {"name": args.name})["leases"]
    return listing(args, found, "lease", ("ADDRESS", "MAC", "NAME", "EXPIRES"), _lease)


def _lease(lease: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(lease.get("address")),
        str(lease.get("mac") or "-"),
        str(lease.get("name") or "-"),
        ago(lease["expires"]) if lease.get("expires") else "never",
    )


def stop(args: argparse.Namespace, session: Session) -> int:
    def begin(name: str) -> Call:
        parameters = constant({"name": name, "force": args.force})
        return Call(session, "Network.Stop", parameters, limit=domains.WORK)

    return domains.act(args.names, "stop", begin, lambda _name, call: call.result())


def define(args: argparse.Namespace, session: Session) -> int:
    if args.files != [DEFAULT] or os.path.exists(DEFAULT):
        return domains.defining("Network.Define")(args, session)
    with Call(session, "Network.DefineDefault", constant({}), limit=domains.WORK) as call:
        reply = call.result().parameters
    name, path = clean(str(reply.get("name"))), clean(str(reply.get("path")))
    print(f"Defined {name} ({path})." if reply.get("created") else f"{name} is defined already ({path}).")
    return OK


def _list_options(parser: Parser) -> None:
    parser.add_argument("--active", action="store_true", help="list only those that are active")
    parser.legend()
    parser.json()


def _name_and_json(parser: Parser) -> None:
    parser.name()
    parser.json()


def _leases_options(parser: Parser) -> None:
    parser.name()
    parser.legend()
    parser.json()


def _stop_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument("--force", action="store_true", help="also those that guests are connected to")


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "list": _list_options,
    "info": _name_and_json,
    "leases": _leases_options,
    "start": domains.names,
    "stop": _stop_options,
    "define": domains.define_options,
    "undefine": domains.names,
    "dump": _name_and_json,
    "autostart": domains.autostart_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "list": list_,
    "info": info,
    "leases": leases,
    "start": domains.plain("start", "Network.Start"),
    "stop": stop,
    "define": define,
    "undefine": domains.undefining("Network.Undefine"),
    "dump": dumping("Network.Dump"),
    "autostart": domains.autostarting("Network.Autostart"),
}
