# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is promised of everything that runs under virtd with a console, whichever driver's it is.

One of them streams and answers all the while, one ends in the gap, one is stopped afterwards.
"""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

from tests.harness import Attached, Failed, Lab, Tally, check
from tests.proof.survival.table import Finding, Verdict

SLOTS = ["console.log", "log", "stderr", "stdin", "stdout"]
# So long may the clocks of who strikes and who notes the end be apart.
SLACK = 3.0


class Supervised:
    """The promises: PID, console out and in, control, an end in the gap on record, nothing left behind."""

    name = ""
    plural = ""
    driver = ""
    noun = ""  # of virtdctl's commands; domains have none
    steady = victim = brief = ""
    pausing: tuple[str, str]  # the verbs that pause it and have it go on
    signal = ""  # what ends the victim
    booting = 60.0  # seconds until there are lines
    patience = 30.0  # seconds for an answer on the console
    tries = 1  # questions until one is answered, before anything has happened

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pid = 0
        self.console: Attached | None = None
        self.words = 0
        self.victim_pid = 0
        self.lines_then = 0
        self.gap = False
        self.struck_at = 0.0

    # What each driver has in its own way

    def prepare(self) -> None:
        raise NotImplementedError

    def clear(self) -> list[Finding]:
        raise NotImplementedError

    def look(self) -> dict[str, Any] | None:
        """The steady one, when the daemon can tell of it; else None, or Failed."""
        return self.info(self.steady)

    def wrong_end(self, info: dict[str, Any]) -> str:
        """How the victim's end is told, if that isn't how it was."""
        raise NotImplementedError

    def more(self) -> list[Finding]:
        """Promises of this driver's own."""
        return []

    # The order of things

    def begin(self) -> None:
        """Start the steady one, in the midst of `prepare`."""
        self.virtdctl("start", self.steady)
        self.lab.wait(f"the steady {self.name}'s lines", lambda: self.tally(self.steady).lines > 50, self.booting)
        self.pid = self.info(self.steady)["pid"]

    def before(self) -> None:
        lab = self.lab
        for name in (self.victim, self.brief):
            if self.info(name)["state"] != "running":
                self.virtdctl("start", name)
        lab.wait("the victim's lines", lambda: self.tally(self.victim).lines > 20, self.booting)
        if self.console is None:
            self.attach()
        if not any(self._ask() for _ in range(self.tries)):
            raise Failed(f"the steady {self.name} doesn't answer before anything has happened")
        # Which process a container's is is in LXC's log, which may be a moment behind the console.
        self.victim_pid = lab.wait("the victim's process", lambda: self.info(self.victim)["pid"], 60)
        self.gap = False
        self.struck_at = 0.0

    def strike(self, *, gap: bool) -> None:
        self.gap = gap
        log = self._log(self.victim)
        # Without the CRs, which text that is read in Python would take for ends of lines.
        script = f"tr -d '\\r' <{log}; kill -{self.signal} {self.victim_pid}"
        done = self.lab.run("sh", "-c", script, timeout=60)
        self.lines_then = check(done.stdout.encode()).last
        self.struck_at = time.time()

    def after(self, *, attached: bool) -> list[Finding]:
        found = list[Finding]()

        def lost(what: str) -> None:
            found.append(Finding(Verdict.LOST, what))

        if not attached:
            self.detach()
        info = self._settled()
        if (info["pid"], info["state"]) != (self.pid, "running"):
            lost(f"the {self.name} is {info['state']}, PID {info['pid']} instead of {self.pid}")
            return found
        mine = f"{self.driver}/{self.steady}"
        gone = [slot for slot in ("stdin", "stdout", "stderr") if f"{mine}/{slot}" not in info["slots"]]
        found += self._without_console(gone) if gone else self._console_promises()
        found += self.more()
        for verb, state in zip(self.pausing, ("paused", "running"), strict=True):
            done = self.virtdctl(verb, self.steady, check=False)
            if done.returncode or self.info(self.steady)["state"] != state:
                lost(f"{verb} doesn't work: {done.stderr.strip()[:80]}")
        done = self.virtdctl("stop", self.brief, check=False)
        end = self.info(self.brief)
        if done.returncode or end["state"] != "stopped" or (end["exit"] or {}).get("cause") != "stop":
            lost(f"stop doesn't work: {done.stderr.strip()[:80]} {end['state']}")
        if self.struck_at:
            found += self._end_of_victim()
        return found

    def attach(self) -> None:
        self.console = Attached(self.lab, self.steady, noun=self.noun)

    def detach(self) -> None:
        if self.console is not None:
            self.console.close()
            self.console = None

    # What virtdctl says

    def virtdctl(self, *words: str, **options: Any) -> Any:
        return self.lab.virtdctl(*([self.noun] if self.noun else []), *words, **options)

    def info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.lab.json(*([self.noun] if self.noun else []), "info", name)
        return found

    def tally(self, name: str) -> Tally:
        return check(self.lab.console(name, noun=self.noun))

    def _log(self, name: str) -> str:
        return f"/var/log/virtd/{self.driver}/{name}.console.log"

    # Promises

    def _settled(self) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            try:
                return self.look()
            except Failed:
                return None

        found: dict[str, Any] = self.lab.wait(f"an answer about the steady {self.name}", look, 60)
        return found

    def _ask(self) -> bool:
        assert self.console is not None
        self.words += 1
        return self.console.ask(f"word-{self.words}", self.patience)

    def _console_promises(self) -> list[Finding]:
        found = list[Finding]()
        if self.console is None:
            self.attach()
        assert self.console is not None
        if not self._ask():
            said, self.console = self.console.close(), None
            return [Finding(Verdict.LOST, f"the console takes no input {' '.join(said.split())[:100]}".strip())]
        before = self.tally(self.steady).last
        try:
            self.lab.wait("new lines", lambda: self.tally(self.steady).last > before, 20)
        except Failed:
            found.append(Finding(Verdict.LOST, "the console shows nothing more"))
        for where, tally in (("the log", self.tally(self.steady)), ("the attached console", self.console.tally)):
            if not tally.whole:
                text = f"{where}: {tally.lost} lines lost, {tally.repeated} repeated, {len(tally.broken)} broken"
                found.append(Finding(Verdict.LOST, text))
        slots = [slot.rpartition("/")[2] for slot in self.info(self.steady)["slots"]]
        if slots != SLOTS:
            found.append(Finding(Verdict.LOST, f"the store has only {', '.join(slots)} of the {self.name}'s slots"))
        return found

    def _without_console(self, slots: list[str]) -> list[Finding]:
        """It's enough for "degraded" if `virtdctl status` says which descriptors are gone."""
        self.detach()
        shown = self.lab.virtdctl("status", check=False)
        silent = [slot for slot in slots if f"{self.driver}/{self.steady}/{slot}" not in shown.stdout]
        if silent or shown.returncode != 1:
            return [Finding(Verdict.LOST, f"{', '.join(silent)} gone, and virtdctl status doesn't say so")]
        return [Finding(Verdict.DEGRADED, "no console until restarted")]

    def _end_of_victim(self) -> list[Finding]:
        lab, found = self.lab, list[Finding]()
        info = lab.wait("the victim's end on record", lambda: (i := self.info(self.victim))["exit"] and i, 30)
        if told := self.wrong_end(info):
            found.append(Finding(Verdict.LOST, f"its end is told as {told}"))
        at = dt.datetime.fromisoformat(info["exit"]["at"]).timestamp()
        if abs(at - self.struck_at) > SLACK:
            found.append(Finding(Verdict.LOST, f"its end is told {at - self.struck_at:+.0f} s off"))
        tally = self.tally(self.victim)
        if not tally.whole or tally.first != 1 or tally.last < self.lines_then:
            lines = f"{tally.lost} lines lost, {tally.repeated} repeated, {len(tally.broken)} broken"
            lines += f", {tally.first} to {tally.last} instead of 1 to {self.lines_then} or more"
            found.append(Finding(Verdict.LOST, f"the log of what ended: {lines}"))
        if self.gap and tally.last <= self.lines_then:
            lost = f"{self.driver}/{self.victim}/stdout .*lost"
            said = lab.run("journalctl", "-q", "-o", "cat", "-u", "virtd.service", "-g", lost, check=False)
            verdict = Verdict.DEGRADED if said.stdout else Verdict.LOST
            found.append(Finding(verdict, "the last output of any that ended meanwhile is lost"))
        if info["slots"] or info["pid"]:
            found.append(Finding(Verdict.LOST, f"what ended keeps {info['slots']}"))
        lab.sh(f"rm -f {self._log(self.victim)}*")
        return found
