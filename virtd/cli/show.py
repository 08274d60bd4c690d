# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that only read: list, info, status, dump, wait."""

from __future__ import annotations

import argparse
import sys
import time

from virtd.cli.client import PATIENCE, Call
from virtd.cli.exits import FAILURE, OK
from virtd.cli.options import duration
from virtd.cli.output import (
    BOLD,
    GREEN,
    RED,
    YELLOW,
    ago,
    autostarts,
    clean,
    heading,
    how_it_ended,
    labelled,
    moment,
    paint,
    plural,
    table,
    write_json,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from virtd.cli.client import Parameters, Session
    from virtd.cli.options import Parser

STATES = ("stopped", "starting", "running", "paused", "stopping", "crashed")
DRIVER = "qemu"  # its objects are virtdctl's domains; those of other drivers have nouns of their own


def named(parser: Parser, noun: str) -> None:
    """The options of commands that show one object, or its definition."""
    parser.name(noun)
    parser.json()


def listing(
    method: str = "List", driver: str = DRIVER, noun: str = "domain"
) -> Callable[[argparse.Namespace, Session], int]:
    """The command that lists what `method` returns."""

    def run(args: argparse.Namespace, session: Session) -> int:
        found = [item for item in session.call(method)["objects"] if item.get("driver", driver) == driver]
        if args.running:
            found = [item for item in found if item.get("state") not in ("stopped", "crashed")]
        if args.state:
            found = [item for item in found if item.get("state") in args.state]
        found.sort(key=lambda item: str(item.get("name")))
        if args.json:
            write_json(found, args.json)
            return OK
        rows = [
            (
                str(item.get("name")),
                str(item.get("state")),
                str(item.get("pid") or "-"),
                ago(item.get("since") or "") or "-",
                autostarts(item),
                str(item.get("reason") or "-"),
            )
            for item in found
        ]
        table(("NAME", "STATE", "PID", "SINCE", "AUTOSTART", "REASON"), rows, legend=not args.no_legend, colour=1)
        if not args.no_legend:
            print(("\n" if rows else "") + plural(len(rows), noun) + " listed.")
        return OK

    return run


def informing(
    method: str,
    what: Callable[[dict[str, Any]], str],
    details: Callable[[dict[str, Any]], list[tuple[str, str]]],
    who: str = "QEMU",
) -> Callable[[argparse.Namespace, Session], int]:
    """The command that shows one object in full, from `method`; `who` names what ended if it ended by itself."""

    def run(args: argparse.Namespace, session: Session) -> int:
        item = session.call(method, {"name": args.name})["object"]
        if args.json:
            write_json(item, args.json)
            return OK
        heading(item, what(item))
        pending = "\nchanged since the start; it takes effect with the next one" if item.get("pending") else ""
        exit_ = item.get("exit")
        ended = how_it_ended(exit_, who) + (f"\n{moment(exit_['at'])}" if exit_.get("at") else "") if exit_ else ""
        labelled(
            [
                ("Last exit", ended),
                ("PID", text(item.get("pid"))),
                ("Unit", text(item.get("unit"))),
                *details(item),
                ("Autostart", autostarts(item)),
                ("Definition", text(item.get("definition_path")) + pending),
                ("Console", text(item.get("console_log"))),
                ("Log", text(item.get("log"))),
                ("Slots", ", ".join(map(_slot, item.get("slots") or []))),
            ]
        )
        show_problems(item.get("problems") or [])
        return OK

    return run


def _domain(item: dict[str, Any]) -> str:
    return f"{item.get('driver', DRIVER)} domain {item.get('uuid', '')}"


def _details(item: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Memory", size(item.get("memory"))),
        ("vCPUs", text(item.get("vcpus"))),
        ("Machine", _hardware(item.get("hardware"))),
        ("Disks", "\n".join([*map(_part, item.get("disks") or []), *_empty(item.get("cdroms") or [])])),
        ("NICs", "\n".join(map(_nic, item.get("nics") or []))),
        ("VNC", text(item.get("vnc"))),
        ("Guest", _provided(item.get("guest"))),
        ("TPM", _tpm(item.get("tpm"))),
        ("Monitor", text(item.get("monitor"))),
        ("Events", _events(item.get("events"))),
    ]


def _hardware(hardware: dict[str, Any] | None) -> str:
    """The recorded machine type."""
    if not hardware or not hardware.get("machine"):
        return ""
    firmware = f", UEFI {hardware['firmware']}" if hardware.get("firmware") else ""
    renew = ", upgraded at the next start" if hardware.get("renew") else ""
    return f"{hardware['machine']}{firmware}{renew}"


def _provided(guest: dict[str, Any] | None) -> str:
    """What its system is set up with."""
    guest = guest or {}
    parts = [("cloud-init", guest.get("cloud_init")), ("credentials", guest.get("credentials"))]
    found = [f"{what} ({', '.join(names)})" for what, names in parts if names]
    return ", ".join([*found, *(["Ignition"] if guest.get("ignition") else [])])


def _tpm(tpm: dict[str, Any] | None) -> str:
    """Its model and version, and what emulates it."""
    if not tpm:
        return ""
    by = f", {tpm['unit']}" if tpm.get("unit") else ""
    return f"{tpm.get('model')}, version {tpm.get('version')}{by}\n{text(tpm.get('state'))}"


def _empty(cdroms: list[str | None]) -> list[str]:
    return [f"cdrom[{index}], without a medium" for index, path in enumerate(cdroms) if path is None]


def _events(events: dict[str, Any] | None) -> str:
    """Empty if no events were held back."""
    if not events or not events.get("hung_up"):
        return ""
    return f"{events['taken']} processed; disconnected {events['hung_up']} times because there were too many"


def text(value: object) -> str:
    return "" if value is None else str(value)


def size(value: object) -> str:
    """Bytes in the largest unit that divides them; text as it is."""
    if not isinstance(value, int) or isinstance(value, bool):
        return text(value)
    for unit in ("B", "K", "M", "G"):
        if value % 1024 or not value:
            return f"{value}{unit}"
        value //= 1024
    return f"{value}T"


def _part(value: object) -> str:
    """A disk or a NIC: first its path or the like, then the rest."""
    if not isinstance(value, dict):
        return text(value)
    rest = [f"{key} {part}" for key, part in value.items() if key != "path" and part not in (None, "", False)]
    return " ".join(filter(None, [text(value.get("path")), f"({', '.join(rest)})" if rest else ""]))


def _nic(value: object) -> str:
    """Where it is connected, its MAC, and the addresses that it was given."""
    if not isinstance(value, dict):
        return text(value)
    place = f"network {value['network']}" if value.get("network") else text(value.get("mode"))
    addresses = ", ".join(map(str, value.get("addresses") or []))
    return ", ".join(filter(None, [place, text(value.get("mac")), text(value.get("interface")), addresses]))


def _slot(value: object) -> str:
    name = text(value.get("name")) if isinstance(value, dict) else text(value)
    return name.rsplit("/", 1)[-1]


def status(args: argparse.Namespace, session: Session) -> int:
    """Exit status 0 without problems, 1 with problems, and (in main) 3 if the daemon can't be reached."""
    it = session.call("Status")["status"]
    problems = it.get("problems") or []
    degraded = it.get("degraded") or []
    if args.json:
        write_json(it, args.json)
        return FAILURE if problems else OK
    mark = RED if problems else YELLOW if degraded else GREEN
    version = clean(text(it.get("version")))
    print(f"{paint('●', mark)} {paint('virtd', BOLD)} {version} - host daemon for virtual machines")
    recovered = it.get("recovered") or {}
    budget = it.get("budget") or {}
    running = paint("running", GREEN)
    since = f" since {moment(it['since'])}" if it.get("since") else ""
    print(f"{'State':>10}: {running}{since}")
    labelled(
        [
            ("PID", text(it.get("pid"))),
            ("Started", text(it.get("started_reason"))),
            ("Domains", ", ".join(f"{count} {state}" for state, count in (it.get("domains") or {}).items() if count)),
            ("Recovered", _recovered(recovered)),
            ("Jobs", "\n".join(filter(None, map(_job, it.get("jobs") or [])))),
            ("Slots", f"{budget.get('used')} of {budget.get('max')} in use" if budget else ""),
            ("Degraded", "\n".join(map(str, degraded))),
            ("Problems", str(len(problems)) if problems else ""),
        ]
    )
    show_problems(problems)
    return FAILURE if problems else OK


def show_problems(problems: list[dict[str, Any]]) -> None:
    for problem in problems:
        about = ": ".join(filter(None, [problem.get("object"), text(problem.get("text"))]))
        print(f"\n{paint('●', RED)} {clean(about)}")
        if problem.get("hint"):
            print(f"  Hint: {clean(text(problem.get('hint')))}")


def _job(job: dict[str, Any]) -> str:
    """A job that is under way; nothing for a finished one."""
    if job.get("state") not in ("running", "waiting"):
        return ""
    progress = job.get("progress")
    done = f", {progress:.0f} %" if isinstance(progress, (int, float)) else ""
    waits = ", waits for its client" if job["state"] == "waiting" else ""
    return f"{job.get('job')}: {job.get('verb')} {job.get('pool')}/{job.get('volume')}{done}{waits}"


def _recovered(recovered: dict[str, Any]) -> str:
    if not recovered.get("objects"):
        return "nothing; there was nothing to recover" if recovered else ""
    lines = [f"{plural(int(recovered['objects']), 'object')} in {text(recovered.get('ms'))} ms"]
    labels = {"adopted": "running on", "ended": "ended meanwhile", "rolled_back": "rolled back", "rebuilt": "rebuilt"}
    for key, label in labels.items():
        if recovered.get(key):
            lines.append(f"{label}: {', '.join(map(str, recovered[key]))}")
    return "\n".join(lines)


def dumping(method: str = "Dump") -> Callable[[argparse.Namespace, Session], int]:
    """The command that prints a definition."""

    def run(args: argparse.Namespace, session: Session) -> int:
        text = str(session.call(method, {"name": args.name})["text"])
        if args.json:
            write_json({"name": args.name, "text": text}, args.json)
        else:
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return OK

    return run


def waiting(method: str = "Wait") -> Callable[[argparse.Namespace, Session], int]:
    """The command that waits, by `method`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        limit: float | None = args.timeout
        until = None if limit is None else time.monotonic() + limit

        def parameters(_attempt: int) -> Parameters:
            left = None if until is None else max(0.0, until - time.monotonic())
            return {"name": args.name, "states": args.state, "timeout": left}

        with Call(session, method, parameters, limit=None if limit is None else limit + PATIENCE) as call:
            item = call.result().parameters.get("object")
        if args.json:
            write_json(item, args.json)
        return OK

    return run


def _states(text: str) -> list[str]:
    states = text.split(",")
    for state in states:
        if state not in STATES:
            raise argparse.ArgumentTypeError(f"'{state}' is not a state; there are {', '.join(STATES)}")
    return states


def list_options(parser: Parser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="list all (the default)")
    parser.add_argument("--running", action="store_true", help="list only those that have a process")
    parser.add_argument("--state", metavar="STATE,...", type=_states, help="list only those in one of these states")
    parser.legend()
    parser.json()


def _name_and_json(parser: Parser) -> None:
    parser.name()
    parser.json()


def wait_options(parser: Parser, noun: str = "domain") -> None:
    parser.name(noun)
    parser.add_argument(
        "--state",
        metavar="STATE,...",
        type=_states,
        default=["stopped", "crashed"],
        help="stopped,crashed unless given",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=duration,
        help="fail if it isn't in such a state by then (default: no limit)",
    )
    parser.json()


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "list": list_options,
    "info": _name_and_json,
    "status": lambda parser: parser.json(),
    "dump": _name_and_json,
    "wait": wait_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "list": listing(),
    "info": informing("Info", _domain, _details),
    "status": status,
    "dump": dumping(),
    "wait": waiting(),
}
