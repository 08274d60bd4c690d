# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of `lab`, all but `lab exec`, which goes its own short way."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import enter, machine, root, setup
from .paths import Lab, all_labs
from .say import say
from .state import LabError, leader_of, read_state
from .suites import DEFAULT, SUITES, suite_named


def main(arguments: Sequence[str]) -> int:
    """Does one command and returns the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.act(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab", description="Disposable systems with a real systemd for virtd's tests"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, act: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(act=act)
        return added

    made = command("up", "Make and boot a lab, with virtd installed in it.", _up)
    made.add_argument("name")
    made.add_argument("--suite", default=DEFAULT, choices=sorted(SUITES))
    made.add_argument("--rpm", action="append", default=[], type=Path, metavar="FILE", help="instead of build/rpm's")
    made.add_argument("--no-virtd", action="store_true", help="install no RPM")
    again = command("boot", "Boot a lab again that was shut down or rebooted from inside.", _boot)
    again.add_argument("name")
    run = command("exec", "Run a command in a lab: exec NAME -- COMMAND...", None)
    run.add_argument("name")
    ended = command("down", "End a lab and remove all of it.", _down)
    ended.add_argument("names", nargs="*", metavar="name")
    ended.add_argument("--all", action="store_true", help="every lab")
    listed = command("list", "The labs there are.", _list)
    listed.add_argument("--json", action="store_true")
    logs = command("logs", "The journal of a lab; further options go to journalctl.", _logs)
    logs.add_argument("name")
    logs.add_argument("options", nargs=argparse.REMAINDER)
    rooted = command("root", "Only make the root that labs stand on, and print its path.", _root)
    rooted.add_argument("--suite", default=DEFAULT, choices=sorted(SUITES))
    path = command("path", "Print where the host sees the lab's file system.", _path)
    path.add_argument("name")
    command("setup", "Install what the host needs for labs.", _setup)
    return parser


def _terminated(_number: int, _frame: object) -> None:
    raise LabError("terminated by a signal")


def _up(options: argparse.Namespace) -> int:
    # As for Ctrl-C, so that what is half made is cleared away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    machine.up(options.name, suite_named(options.suite), options.rpm, not options.no_virtd)
    return 0


def _boot(options: argparse.Namespace) -> int:
    machine.boot(options.name)
    return 0


def _down(options: argparse.Namespace) -> int:
    if not options.names and not options.all:
        raise LabError("lab down NAME..., or lab down --all")
    names = [lab.name for lab in all_labs()] if options.all else options.names
    for name in names:
        machine.down(name)
    return 0


def _list(options: argparse.Namespace) -> int:
    rows = []
    for lab in all_labs():
        state = read_state(str(lab.dir))
        up = machine.is_up(lab)
        condition = ("up" if state.get("ready") else "starting") if up else "dead"
        leader = leader_of(lab.name) if up else None
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(state.get("created", "0"))))
        suite = state.get("suite", "?")
        rows.append({"name": lab.name, "state": condition, "suite": suite, "leader": leader, "since": since})
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['name']:16} {row['state']:9} {row['suite']:9} {row['leader'] or '-':>8} {row['since']}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    lab = Lab(options.name)
    if lab.dir.exists() and not machine.is_up(lab):
        say(f"lab {lab.name} is not running; this is what its console said")
        print(lab.console.read_text(errors="replace") if lab.console.exists() else "", end="")
        return 0
    words = [word for word in options.options if word != "--"]
    enter.exec_in(options.name, ["journalctl", *words])


def _root(options: argparse.Namespace) -> int:
    print(root.cached_root(suite_named(options.suite)))
    return 0


def _path(options: argparse.Namespace) -> int:
    lab = Lab(options.name)
    if not lab.root.exists():
        raise LabError(f"there is no lab {options.name}")
    print(lab.root)
    return 0


def _setup(_options: argparse.Namespace) -> int:
    setup.install()
    return 0
