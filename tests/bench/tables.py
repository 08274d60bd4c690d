# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures as a person reads them: milliseconds and MiB, virtd's first, and what libvirt's is to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]


def restart(figures: Figures) -> list[str]:
    lines = [f"from the command to a fresh connection's complete listing; ms, median of {figures['runs']} (fastest)"]
    for way in ("restart", "kill"):
        lines += ["", f"{way:<16}{_heads(figures[way])}"]
        lines += _by_guests(figures[way])
    if tail := figures.get("tail"):
        lines += [
            "",
            f"virtd, {tail['runs']} in a row: median {_ms(tail['median'])} ms, slowest {_ms(tail['max'])} ms",
        ]
    return lines


def listing(figures: Figures) -> list[str]:
    return [
        f"the whole process; ms, median of {figures['runs']} (fastest)", "",
        f"{'':<16}{_heads(figures['list'])}", *_by_guests(figures["list"]),
    ]  # fmt: skip


def start(figures: Figures) -> list[str]:
    lines = ["s, median (fastest)", "", f"{'':<16}{'one by one':>18}{str(figures['at_once']) + ' at once':>18}"]
    for name, one in figures["one"].items():
        together = figures["together"].get(name)
        cells = [f"{one['median']:.3f} ({one['min']:.3f})"]
        cells += [f"{together['median']:.2f} ({together['min']:.2f})"] if together else []
        lines.append(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells))
    if "libvirt" in figures["one"]:
        ratios = [figures[key]["virtd"]["median"] / figures[key]["libvirt"]["median"] for key in ("one", "together")]
        lines.append(f"{'ratio':<16}{ratios[0]:>18.2f}{ratios[1]:>18.2f}")
    return lines


def memory(figures: Figures) -> list[str]:
    lines = ["PSS in MiB (libvirt: libvirtd and virtlogd)"]
    for how in ("started", "adopted"):
        counts = list(next(iter(figures[how].values())))
        lines += ["", f"{how:<16}" + "".join(f"{count + ' guests':>18}" for count in counts)]
        lines += [
            f"{name:<16}" + "".join(f"{values[count]:>18.1f}" for count in counts)
            for name, values in figures[how].items()
        ]
    return lines


def network(figures: Figures) -> list[str]:
    lines = [f"ms, median (slowest) of {figures['many']}", "", f"{'':<16}{'start':>18}{'stop':>18}"]
    for name in figures["start"]:
        cells = [
            f"{_ms(figures[verb][name]['median'])} ({_ms(figures[verb][name]['max'])})" for verb in ("start", "stop")
        ]
        lines.append(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells))
    again = figures["again"]
    back, reloaded = _ms(again["flushed"]), _ms(again["reload"])
    lines += ["", f"virtd, {figures['many']} networks active: rules back {back} ms after nft flush ruleset"]
    return [*lines, f"virtdctl reload with rules that are as they should be: {reloaded} ms"]


def flood(figures: Figures) -> list[str]:
    head = f"{'':<10}{'info ms, median':>18}{'p99':>8}{'max':>8}{'echo ms, median':>18}{'p99':>8}"
    head += f"{'CPU':>8}{'PSS MiB':>10}{'kB/s said':>12}{'log MiB':>10}"
    what = "beside a guest that does nothing, one that computes, one that floods its console"
    lines = [f"{what}; {figures['seconds']} s each", "", head]
    for turn, it in figures["turns"].items():
        info, echo = it["info"], it["echo"]
        lines.append(
            f"{turn:<10}{info['median'] * 1000:>18.2f}{info['p99'] * 1000:>8.1f}{_ms(info['max']):>8}"
            f"{_ms(echo['median']):>18}{_ms(echo['p99']):>8}{it['cpu']:>8.1%}{it['pss']:>10.1f}"
            f"{it['rate'] / 1000:>12.0f}{it['log'] / (1 << 20):>10.1f}"
        )
    return lines


def children(figures: Figures) -> list[str]:
    rows = [
        ("a start, by itself (ms)", "start", 1000), ("a start, eight at once (ms)", "start_many", 1000),
        ("listing (ms)", "list", 1000), ("restart to listing (ms)", "restart", 1000),
        ("SIGKILL to listing (ms)", "kill", 1000), ("daemon-reload (ms)", "wall", 1000),
        ("  PID 1's CPU time (ms)", "cpu", 1000), ("  PID 1 answers nobody (ms)", "silent", 1000),
        ("daemon-reload, as many `sleep`s", "plain wall", 1000), ("  PID 1's CPU time (ms)", "plain cpu", 1000),
        ("slots", "slots", 1), ("entries in PID 1", "entries", 1), ("the daemon's PSS (MiB)", "pss", 1),
    ]  # fmt: skip
    lines = [f"median of {figures['runs']}", ""]
    lines.append(f"{'children':<32}" + "".join(f"{count:>9}" for count in figures["children"]))
    columns = [
        {**one, **one["reload"], **{f"plain {key}": value for key, value in one.get("plain", {}).items()}}
        for one in figures["children"].values()
    ]
    for title, key, factor in rows:
        values = [column.get(key) for column in columns]
        lines.append(f"{title:<32}" + "".join(f"{'' if v is None else f'{v * factor:.0f}':>9}" for v in values))
    return lines


def container(figures: Figures) -> list[str]:
    lines = [f"ms, median (fastest) of {figures['rounds']}", "", f"{'':<16}{'first output':>18}{'stop':>18}"]
    for name in figures["start"]:
        cells = [
            f"{_ms(figures[verb][name]['median'])} ({_ms(figures[verb][name]['min'])})" for verb in ("start", "stop")
        ]
        lines.append(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells))
    lines += [f"{name:<16}doesn't run here: {why}" for name, why in figures["missing"].items()]
    client = f"{_ms(figures['client']['median'])} ({_ms(figures['client']['min'])})"
    (one, first), (many, last) = figures["memory"].items()
    each = (last - first) * 1024 / (int(many) - int(one))
    return [
        *lines,
        "",
        f"virtdctl container info, for what of these is virtdctl itself: {client} ms",
        f"virtd with {one} container {first:.1f} MiB, with {many} {last:.1f}: {each:.0f} KiB for each",
    ]


def storage(figures: Figures) -> list[str]:
    lines = [f"ms, median of {figures['runs']} (fastest), and MiB/s", ""]
    for title, operation in figures["operations"].items():
        seconds, size = operation["seconds"], operation["mib"]
        for name, value in seconds.items():
            speed = f"{size / value['median']:>10.0f}" if size else ""
            lines.append(f"{title:<18}{name:<16}{_ms(value['median']) + ' (' + _ms(value['min']) + ')':>18}{speed}")
        others = {name: value for name, value in seconds.items() if name != "virtd"}
        ratios = (f"{seconds['virtd']['median'] / value['median']:.2f} of {name}" for name, value in others.items())
        lines.append(f"{'':<18}virtd: {', '.join(ratios)}" if others else "")
    return lines


def _heads(by_peer: dict[str, Figures]) -> str:
    return "".join(f"{count + ' guests':>18}" for count in next(iter(by_peer.values())))


def _by_guests(by_peer: dict[str, Figures]) -> list[str]:
    """A line for each peer, a column for each number of guests, and the ratio of the medians."""
    lines = []
    for name, values in by_peer.items():
        cells = (f"{_ms(value['median'])} ({_ms(value['min'])})" for value in values.values())
        lines.append(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells))
    if "libvirt" in by_peer:
        ratios = (value["median"] / by_peer["libvirt"][count]["median"] for count, value in by_peer["virtd"].items())
        lines.append(f"{'ratio':<16}" + "".join(f"{ratio:>18.2f}" for ratio in ratios))
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


TABLES: dict[str, Callable[[Figures], list[str]]] = {
    "restart": restart,
    "list": listing,
    "start": start,
    "memory": memory,
    "network": network,
    "storage": storage,
    "flood": flood,
    "children": children,
    "container": container,
}
