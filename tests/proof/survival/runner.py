# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the events in one lab of one suite, one after the other."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.harness import Failed, Lab
from tests.proof.survival.containers import Containers
from tests.proof.survival.events import EVENTS, Event
from tests.proof.survival.guests import Guests
from tests.proof.survival.networks import Networks
from tests.proof.survival.scene import Scene, Subject
from tests.proof.survival.storage import Storage
from tests.proof.survival.table import Cell, Finding, Verdict

SUITES = ("bookworm", "trixie", "forky")
# Each makes a subject for a lab. A driver adds its own: what it has, what an event must not change, what ends.
SUBJECTS: tuple[Callable[[Lab], Subject], ...] = (Guests, Networks, Storage, Containers)

Told = Callable[[str, Event, Cell], None]


def say(text: str) -> None:
    print(f"survival: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def booted(suite: str, packages: dict[str, Path]) -> Iterator[Lab]:
    """A lab of that suite with version 0.1.0 installed, both packages in /root, and 0.1.1 not yet there."""
    lab = Lab(f"survival-{suite[0]}-{os.getpid()}")
    try:
        Lab.up(lab.name, "--suite", suite, "--rpm", str(packages["0.1.0"]), quiet=True)
        for package in packages.values():
            lab.copy(package, f"/root/{package.name}")
        # Before it had that name the command was called virtctl.
        lab.sh("command -v virtdctl || ln -s /usr/bin/virtctl /usr/local/bin/virtdctl")
        yield lab
    finally:
        if os.environ.get("VIRTD_KEEP_LAB") != "1":
            lab.down()


def run(suite: str, packages: dict[str, Path], told: Told, events: Sequence[Event] = EVENTS) -> str:
    """Each event, `told(subject, event, cell)` as soon as it is over. The version of systemd that it was."""
    left = list(events)
    while True:
        with booted(suite, packages) as lab:
            version = _run(lab, suite, packages, told, left)
        if not left:
            return version
        say(f"{suite}: going on in a new lab")


def _run(lab: Lab, suite: str, packages: dict[str, Path], told: Told, left: list[Event]) -> str:
    """As many of the events as this lab bears; those that were done are taken out of `left`."""
    old, new = (f"/root/{packages[version].name}" for version in ("0.1.0", "0.1.1"))
    scene = Scene(lab, old, new, suite, [subject(lab) for subject in SUBJECTS])
    try:
        return _events(scene, told, left)
    finally:
        for subject in scene.subjects:
            subject.detach()


def _events(scene: Scene, told: Told, left: list[Event]) -> str:
    suite, version = scene.suite, scene.systemd
    prepared = small = False
    while left:
        event = left[0]
        began = time.monotonic()
        if version < event.since:
            cells = {subject.name: Cell(Verdict.ABSENT, "no such command") for subject in scene.subjects}
        else:
            try:
                if prepared and event.small_log != small:
                    _clear(scene)
                    prepared = False
                if event.small_log != small:
                    scene.small_log() if event.small_log else scene.large_log()
                    small = event.small_log
                if not prepared:
                    for subject in scene.subjects:
                        subject.prepare()
                    prepared = True
            except Failed as exc:
                say(f"{suite}: {exc}")
                return str(version)
            cells = _one(scene, event)
        del left[0]
        for name, cell in cells.items():
            told(name, event, cell)
        say(f"{suite} (systemd {version}): {event.title}: {_words(cells)} [{time.monotonic() - began:.0f} s]")
        if any(cell.verdict in (Verdict.DEGRADED, Verdict.LOST) for cell in cells.values()):
            # What follows shall begin with everything whole.
            if any(cell.verdict is Verdict.LOST for cell in cells.values()):
                return str(version)
            scene.no_drop_in()
            _clear(scene)
            prepared = False
    return str(version)


def _words(cells: dict[str, Cell]) -> str:
    return ", ".join(cell.text if len(cells) == 1 else f"{name} {cell.text}" for name, cell in cells.items())


def _one(scene: Scene, event: Event) -> dict[str, Cell]:
    """The cell of each subject. What goes wrong with the event itself, or is nobody's, is a loss for all of them."""
    scene.struck, scene.extra = False, []
    found: dict[str, list[Finding]] = {subject.name: [] for subject in scene.subjects}
    common: list[Finding] = []
    try:
        for subject in scene.subjects:
            subject.before()
        if event.asks:
            scene.ask()
        try:
            event.run(scene)
        finally:
            common += scene.answers()
        if not scene.struck:
            common.append(Finding(Verdict.LOST, "nothing ended in the gap: the event tells too little"))
        for subject in scene.subjects:
            found[subject.name] += subject.after(attached=event.attached)
        common += scene.extra
        theirs = {subject.driver: found[subject.name] for subject in scene.subjects}
        degraded = {driver for driver, mine in theirs.items() if Cell.of(mine).verdict is Verdict.DEGRADED}
        told = scene.problems() + scene.differences()
        for driver, finding in scene.leftovers() + [one for one in told if one[0] not in degraded]:
            theirs.get(driver, common).append(finding)
    except Exception as exc:  # one event that can't be judged must not cost the others their row
        common.append(Finding(Verdict.LOST, " ".join(str(exc).split())[:200]))
        say(str(exc))
        say(scene.sh("journalctl -q -n 30 --no-pager -u virtd.service", check=False))
    return {name: Cell.of(findings + common) for name, findings in found.items()}


def _clear(scene: Scene) -> None:
    for subject in scene.subjects:
        subject.clear()


def plurals() -> dict[str, str]:
    """What each subject is called in the table."""
    return {subject.name: subject.plural for subject in SUBJECTS}  # type: ignore[attr-defined]
