# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests as a subject: one that streams all the while, one that dies in the gap, one that is stopped afterwards."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

from tests.harness import Attached, Failed, Lab, check
from tests.survival.table import Finding, Verdict

STEADY, VICTIM, BRIEF = "steady", "victim", "brief"
SLOTS = ["console.log", "log", "stderr", "stdin", "stdout"]
RATE = 300  # lines a second of the steady one: 24 kB/s
LOG = f"/var/log/virtd/qemu/{VICTIM}.console.log"
# So long may the clocks of who strikes and who notes the end be apart.
SLACK = 3.0


class Guests:
    """The promises: PID, console out and in, control, an end in the gap on record, nothing left behind."""

    name = "guest"
    heading = "Event"

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pid = 0
        self.console: Attached | None = None
        self.words = 0
        self.victim_pid = 0
        self.lines_then = 0
        self.gap = False
        self.struck_at = 0.0

    def prepare(self) -> None:
        lab = self.lab
        lab.sh("mkdir -p /var/lib/virtd/images; truncate -s 1M /var/lib/virtd/images/brief.raw")
        lab.define(STEADY, cmdline=f"virtd.rate={RATE}")
        lab.define(VICTIM, cmdline="virtd.rate=50")
        # No system in it: QEMU and its BIOS are there in a moment, and it's only there to be stopped.
        disk = '[[disk]]\npath = "/var/lib/virtd/images/brief.raw"\n'
        lab.virtctl("define", "-", stdin=f'name = "{BRIEF}"\nmemory = "32M"\n{disk}')
        lab.virtctl("start", STEADY)
        lab.virtctl("start", VICTIM)
        lab.wait("the steady guest's lines", lambda: check(lab.console(STEADY)).lines > 50, 120)
        self.pid = lab.info(STEADY)["pid"]

    def before(self) -> None:
        lab = self.lab
        if lab.info(VICTIM)["state"] != "running":
            lab.virtctl("start", VICTIM)
        lab.wait("the victim's lines", lambda: check(lab.console(VICTIM)).lines > 20, 120)
        if lab.info(BRIEF)["state"] != "running":
            lab.virtctl("start", BRIEF)
        if self.console is None:
            self.console = Attached(lab, STEADY)
        # What is typed at a guest that has only just booted may not reach it whole.
        if not any(self._ask() for _ in range(4)):
            raise Failed("the steady guest doesn't answer before anything has happened")
        self.victim_pid = lab.info(VICTIM)["pid"]
        self.gap = False
        self.struck_at = 0.0

    def strike(self, *, gap: bool) -> None:
        self.gap = gap
        done = self.lab.run("sh", "-c", f"cat {LOG}; kill -9 {self.victim_pid}", timeout=60)
        self.lines_then = check(done.stdout.encode()).last
        self.struck_at = time.time()

    def after(self, *, attached: bool) -> list[Finding]:
        lab, found = self.lab, list[Finding]()

        def lost(what: str) -> None:
            found.append(Finding(Verdict.LOST, what))

        if not attached:
            self.detach()
        info = self._settled()
        if (info["pid"], info["state"]) != (self.pid, "running"):
            lost(f"the guest is {info['state']}, PID {info['pid']} instead of {self.pid}")
            return found
        console_lost = [
            slot for slot in ("stdin", "stdout", "stderr") if f"qemu/{STEADY}/{slot}" not in info["slots"]
        ]
        if console_lost:
            found += self._without_console(console_lost)
        else:
            found += self._console_promises()
        for verb, state in (("suspend", "paused"), ("resume", "running")):
            done = lab.virtctl(verb, STEADY, check=False)
            if done.returncode or lab.info(STEADY)["state"] != state:
                lost(f"{verb} doesn't work: {done.stderr.strip()[:80]}")
        done = lab.virtctl("stop", BRIEF, check=False)
        end = lab.info(BRIEF)
        if done.returncode or end["state"] != "stopped" or (end["exit"] or {}).get("cause") != "stop":
            lost(f"stop doesn't work: {done.stderr.strip()[:80]} {end['state']}")
        if self.struck_at:
            found += self._end_of_victim()
        return found

    def detach(self) -> None:
        if self.console is not None:
            self.console.close()
            self.console = None

    def clear(self) -> list[Finding]:
        self.detach()
        self.lab.undefine_all()
        self.lab.sh("rm -f /var/log/virtd/qemu/*")
        left = self.lab.wait("an empty store", lambda: self.lab.slots() == 0, 10)
        return [] if left else [Finding(Verdict.LOST, "slots are left in the store")]

    # Promises

    def _settled(self) -> dict[str, Any]:
        """The steady guest, when the daemon is there and has its monitor, or has given up."""

        def look() -> dict[str, Any] | None:
            try:
                info = self.lab.info(STEADY)
            except Failed:
                return None
            return info if info["monitor"] == "connected" or info["state"] != "running" else None

        found: dict[str, Any] = self.lab.wait("the steady guest's monitor", look, 60)
        return found

    def _ask(self) -> bool:
        assert self.console is not None
        self.words += 1
        return self.console.ask(f"word-{self.words}", 20)

    def _console_promises(self) -> list[Finding]:
        lab, found = self.lab, list[Finding]()
        if self.console is None:
            self.console = Attached(lab, STEADY)
        if not self._ask():
            said, self.console = self.console.close(), None
            found.append(Finding(Verdict.LOST, f"the console takes no input {' '.join(said.split())[:100]}".strip()))
            return found
        before = check(lab.console(STEADY)).last
        try:
            lab.wait("new lines", lambda: check(lab.console(STEADY)).last > before, 20)
        except Failed:
            found.append(Finding(Verdict.LOST, "the console shows nothing more"))
        for where, tally in (("the log", check(lab.console(STEADY))), ("the attached console", self.console.tally)):
            if not tally.whole:
                found.append(
                    Finding(
                        Verdict.LOST,
                        f"{where}: {tally.lost} lines lost, {tally.repeated} repeated, {len(tally.broken)} broken",
                    )
                )
        slots = [slot.rpartition("/")[2] for slot in lab.info(STEADY)["slots"]]
        if slots != SLOTS:
            found.append(Finding(Verdict.LOST, f"the store has only {', '.join(slots)} of the guest's slots"))
        return found

    def _without_console(self, slots: list[str]) -> list[Finding]:
        """It's enough for "degraded" if `virtctl status` says which descriptors are gone."""
        self.detach()
        shown = self.lab.virtctl("status", check=False)
        silent = [slot for slot in slots if f"qemu/{STEADY}/{slot}" not in shown.stdout]
        if silent or shown.returncode != 1:
            return [Finding(Verdict.LOST, f"{', '.join(silent)} gone, and virtctl status doesn't say so")]
        return [Finding(Verdict.DEGRADED, "no console until the guest is started afresh")]

    def _end_of_victim(self) -> list[Finding]:
        lab, found = self.lab, list[Finding]()
        info = lab.wait("the victim's end on record", lambda: (i := lab.info(VICTIM))["exit"] and i, 30)
        end = info["exit"]
        if (info["state"], end["signal"], end["cause"]) != ("crashed", "SIGKILL", "killed"):
            found.append(
                Finding(Verdict.LOST, f"its end is told as {info['state']}, {end['signal']}, {end['cause']}")
            )
        at = dt.datetime.fromisoformat(end["at"]).timestamp()
        if abs(at - self.struck_at) > SLACK:
            found.append(Finding(Verdict.LOST, f"its end is told {at - self.struck_at:+.0f} s off"))
        tally = check(lab.console(VICTIM))
        if not tally.whole or tally.first != 1 or tally.last < self.lines_then:
            found.append(
                Finding(Verdict.LOST, f"the log of what ended: {tally.lost} lines lost, {tally.repeated} repeated")
            )
        if self.gap and tally.last <= self.lines_then:
            said = lab.run(
                "journalctl",
                "-q",
                "-o",
                "cat",
                "-u",
                "virtd.service",
                "-g",
                f"qemu/{VICTIM}/stdout .*lost",
                check=False,
            )
            verdict = Verdict.DEGRADED if said.stdout else Verdict.LOST
            found.append(Finding(verdict, "the last bytes of what ended meanwhile are gone"))
        if info["slots"] or info["pid"]:
            found.append(Finding(Verdict.LOST, f"what ended keeps {info['slots']}"))
        lab.forget_log(VICTIM)
        return found
