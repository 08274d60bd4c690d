# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtdctl prints: tables, labelled lines, times, JSON and errors, in the manner of systemctl and machinectl."""

from __future__ import annotations

import json
import os
import sys
import time

from virtd.cli.exits import OK
from virtd.errors import AccessDenied, InvalidDefinition

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, TextIO

    from virtd.errors import VirtdError

GREEN, YELLOW, RED, BOLD, UNDERLINE = "1;32", "1;33", "1;31", "1", "4"
STATE_COLOURS = {
    "running": GREEN,
    "active": GREEN,
    "starting": YELLOW,
    "stopping": YELLOW,
    "paused": YELLOW,
    "crashed": RED,
}

# Reasons, log lines and QEMU's errors can contain text from a guest, and a terminal obeys control characters: a table
# must not contain them. (The console is printed as it is; that is its purpose.)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}

_JSON_CONTROL = {code: f"\\u{code:04x}" for code in range(127, 160)}

# Unit, its length in seconds, and the smaller unit that is shown beside it.
UNITS = (
    ("year", 31_557_600, "month"),
    ("month", 2_629_800, "day"),
    ("week", 604_800, "day"),
    ("day", 86_400, "h"),
    ("h", 3600, "min"),
    ("min", 60, "s"),
    ("s", 1, ""),
)


def clean(text: str) -> str:
    """`text` without control characters that a terminal would obey; tabs and line ends stay."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode()


def autostarts(item: dict[str, Any]) -> str:
    """Whether an object starts at boot; "waits": it should have, but something that it needs doesn't exist yet."""
    return ("waits" if item.get("waits") else "yes") if item.get("autostart") else "no"


def colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that wants colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if text and colour and colours(stream or sys.stdout) else text


def dot(state: str) -> str:
    """The mark before a name, coloured by the object's state; hollow when nothing runs."""
    return paint("○" if state in ("stopped", "inactive") else "●", STATE_COLOURS.get(state, ""))


def heading(item: dict[str, Any], what: str) -> None:
    """Print the first two lines about an object: what it is, and its state."""
    state = str(item.get("state"))
    print(f"{dot(state)} {paint(clean(str(item.get('name'))), BOLD)} - {clean(what)}")
    reason = f" ({item['reason']})" if item.get("reason") else ""
    since = f" since {moment(item['since'])}" if item.get("since") else ""
    # Coloured after the text is cleaned, which would remove the escape sequences.
    print(f"{'State':>10}: {paint(clean(state), STATE_COLOURS.get(state, ''))}{clean(reason)}{since}")


def write_json(value: object, style: str) -> None:
    """`style` is "short" (one line) or "pretty"."""
    if style == "pretty":
        text = json.dumps(value, indent=2, ensure_ascii=False)
    else:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    # JSON needn't escape C1 controls and lone surrogates, so it is done here.
    print(text if text.isascii() else text.translate(_JSON_CONTROL).encode("utf-8", "backslashreplace").decode())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, legend: bool, colour: int | None = None) -> None:
    """Print left-aligned columns. `colour` is the column that holds a state and is painted by it."""
    body = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*([header] if legend else []), *body, strict=True)]
    if legend and body:
        line = " ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True))
        print(paint(line, UNDERLINE) if colours(sys.stdout) else line.rstrip())
    for row in body:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if colour is not None:
            cells[colour] = paint(cells[colour], STATE_COLOURS.get(row[colour], ""))
        print(" ".join(cells).rstrip())


def listing(
    args: argparse.Namespace,
    items: Sequence[Any],
    noun: str,
    header: Sequence[str],
    row: Callable[[Any], Sequence[str]],
    *,
    colour: int | None = None,
) -> int:
    """Print items according to --json and --no-legend in a listing's `args`; returns the exit status."""
    if args.json:
        write_json(items, args.json)
        return OK
    table(header, map(row, items), legend=not args.no_legend, colour=colour)
    if not args.no_legend:
        print(("\n" if items else "") + plural(len(items), noun) + " listed.")
    return OK


def labelled(lines: Iterable[tuple[str, str]], width: int = 10) -> None:
    """Print `label: value` with the colons below each other; empty values are left out."""
    for label, value in lines:
        if value:
            first, *rest = clean(value).split("\n")
            print(f"{label:>{width}}: {first}")
            for line in rest:
                print(" " * (width + 2) + line)


def rounded(number: int) -> str:
    """Bytes for people, to three digits: `512M`, `1.5G`, `9.31T`; units are powers of 1024."""
    value, units = float(number), "BKMGTP"
    while value >= 1000 and len(units) > 1 and not (value < 1024 and value == int(value)):
        value, units = value / 1024, units[1:]
    digits = 0 if units[0] == "B" or value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + units[0]


def size_of(number: object) -> str:
    """A size from a reply, which may be unknown."""
    return rounded(number) if isinstance(number, int) else "-"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds(iso: str) -> float | None:
    """Seconds since 1970 of virtd's times, `2026-11-23T02:47:54.000001Z`; None for anything else.

    By hand, because datetime and strptime cost more to import than all the rest of a listing.
    """
    try:
        year, month, day = int(iso[0:4]), int(iso[5:7]), int(iso[8:10])
        hour, minute, second = int(iso[11:13]), int(iso[14:16]), float(iso[17:].rstrip("Z"))
    except (TypeError, ValueError):
        return None
    # Days since 1970-01-01 in the Gregorian calendar, with the year taken to begin in March, so that a leap day is
    # the last.
    years = year - (month < 3)
    days = years * 365 + years // 4 - years // 100 + years // 400 + (153 * ((month + 9) % 12) + 2) // 5 + day - 719469
    return days * 86400.0 + hour * 3600 + minute * 60 + second


def span(length: float) -> str:
    """A duration in two units, like systemctl's: `2h 5min`, `1 week 3 days`."""
    rest = int(length)
    words: list[str] = []
    smaller: str | None = None
    for unit, size, beside in UNITS:
        count = rest // size
        if count and smaller in (None, unit):
            words.append(plural(count, unit) if size >= 86_400 else f"{count}{unit}")
            rest -= count * size
            if smaller is not None:
                break
            smaller = beside
    return " ".join(words) or "0s"


def ago(iso: str) -> str:
    """`3min 2s ago`, or nothing if the time isn't known."""
    then = seconds(iso)
    if then is None:
        return ""
    length = time.time() - then
    return f"{span(length)} ago" if length >= 0 else f"{span(-length)} left"


def moment(iso: str) -> str:
    """`Mon 2026-11-23 02:47:54 UTC; 3min ago`, in local time."""
    then = seconds(iso)
    if then is None:
        return iso
    return f"{time.strftime('%a %Y-%m-%d %H:%M:%S %Z', time.localtime(then))}; {ago(iso)}"


def signal_name(number: object) -> str:
    """`SIGKILL`, from the name itself or the number."""
    import signal

    if str(number).startswith("SIG"):
        return str(number)

    try:
        return signal.Signals(int(str(number))).name
    except ValueError:
        return f"signal {number}"


def how_it_ended(exit_: dict[str, Any], what: str = "QEMU") -> str:
    """One phrase for a guest's end, from `exit` as in `virtdctl info --json`."""
    by = f" by {exit_['by']}" if exit_.get("by") else ""
    cause = exit_.get("cause")
    signal = exit_.get("signal")
    phrases = {
        "guest-shutdown": "powered off by the guest",
        "exited": f"ended with exit status {exit_.get('code') or 0}",
        "shutdown": f"shut down{by}",
        "stop": f"stopped{by}",
        "killed": f"killed by {signal_name(signal)}" if signal else "killed",
        "oom": "killed, because the host ran out of memory",
        "panic": "the guest's kernel panicked",
        "failed": f"{what} failed with exit status {exit_.get('code')}",
        "host-shutdown": "ended by the shutdown of the host",
    }
    if cause in phrases:
        return phrases[cause]
    if signal:
        return f"ended by {signal_name(signal)}"
    return f"ended with exit status {exit_['code']}" if exit_.get("code") is not None else "ended, it isn't known how"


def complain(error: VirtdError, doing: str) -> None:
    """Print an error: what failed and why, and below that what can be done about it.

    An error in a definition stands alone, because `file: key: expected` is what editors jump to.
    """
    alone = not doing or isinstance(error, InvalidDefinition)
    # "Cannot start web1: QEMU is missing" becomes "Failed to start web1: QEMU is missing".
    why = error.message.removeprefix(f"Cannot {doing}: ")
    text = error.message if alone else f"Failed to {doing}: {why}"
    print(paint(clean(text), RED, sys.stderr), file=sys.stderr)
    hint = error.hint or ("changing anything needs root: try it with sudo" if isinstance(error, AccessDenied) else "")
    if hint:
        print(f"Hint: {clean(str(hint))}", file=sys.stderr)
    sys.stderr.flush()
