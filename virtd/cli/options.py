# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parser of one command: argparse, without the parts of it that are slow to import."""

from __future__ import annotations

import argparse
import os
import sys

from virtd.cli.client import ADDRESS, PATIENCE
from virtd.cli.exits import USAGE_ERROR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# Options whose value may be the next word: main has to skip it to find the command in `virtdctl --address X list`.
WITH_VALUE = frozenset(
    {
        "--address",
        "--env",
        "-e",
        "--image",
        "--daemon-timeout",
        "--escape",
        "--lines",
        "-n",
        "--signal",
        "--since",
        "-s",
        "--state",
        "--timeout",
    }
)
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0, "h": 3600.0}


class _Formatter(argparse.HelpFormatter):
    """Has a fixed width: argparse would import shutil to find it out, at every start, with or without --help."""

    def __init__(self, prog: str, **more: Any) -> None:
        columns = os.environ.get("COLUMNS", "")
        more.setdefault("width", min(int(columns), 118) if columns.isdigit() and int(columns) > 40 else 98)
        super().__init__(prog, **more)


class Parser(argparse.ArgumentParser):
    """A command's parser: exact options only, and errors in one line, like systemctl's."""

    def __init__(self, command: str, summary: str) -> None:
        super().__init__(
            prog=f"virtdctl {command}",
            description=summary,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\nTry '{self.prog} --help' for more information.", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)

    def name(self, noun: str = "domain") -> None:
        self.add_argument("name", metavar="NAME", help=f"a {noun}'s name or UUID")

    def names(self) -> None:
        self.add_argument("names", metavar="NAME", nargs="+", help="names or UUIDs; the command acts on each of them")

    def json(self) -> None:
        self.add_argument(
            "--json",
            metavar="short|pretty",
            choices=("short", "pretty"),
            help="print JSON, in one line (--json alone is the same) or indented",
        )

    def legend(self) -> None:
        self.add_argument("--no-legend", action="store_true", help="print neither the header nor the footer")

    def common(self) -> None:
        """Options of every command."""
        self.add_argument(
            "--daemon-timeout",
            metavar="SECONDS",
            type=duration,
            default=...,
            help=f"how long to wait for a daemon that went away: {PATIENCE:g} unless given, "
            "and without a limit for console and log -f",
        )
        self.add_argument(
            "--address",
            metavar="PATH",
            default=os.environ.get("VIRTDCTL_ADDRESS") or ADDRESS,
            help="the daemon's socket, instead of $VIRTDCTL_ADDRESS or " + ADDRESS,
        )
        self.add_argument("-h", "--help", action="help", help="show this")


def duration(text: str) -> float | None:
    """Seconds from `90`, `1.5`, `90s`, `2min`, `1h`; None for `infinity`."""
    if text in ("infinity", "inf"):
        return None
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        value = float(number) * _UNITS[text[len(number) :]]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a duration: seconds, 90s, 2min, 1h or infinity")
    return value


def line_count(text: str) -> int:
    """A number of lines; -1 for `all`."""
    if text == "all":
        return -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of lines nor 'all'")
    return int(text)


def signal_number(text: str) -> int:
    """A signal's number from `15`, `TERM` or `SIGTERM`."""
    import signal

    try:
        if text.isdecimal():
            return int(signal.Signals(int(text)))
        return int(signal.Signals["SIG" + text.upper().removeprefix("SIG")])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"there is no signal '{text}'") from None
