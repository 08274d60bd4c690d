# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers as a subject: one that streams and answers, one that ends in the gap, one that is stopped afterwards."""

from __future__ import annotations

import datetime as dt
import subprocess
import time
from typing import Any

from tests.harness import LAB, Attached, Failed, Lab, Tally, check
from tests.survival.guests import SLACK, SLOTS
from tests.survival.table import Finding, Verdict

STEADY, VICTIM, BRIEF = "boxed", "doomed", "short"
NOUN = "container"
RATES = {STEADY: 300, VICTIM: 20}  # lines a second, of 80 bytes
LOG = f"/var/log/virtd/lxc/{VICTIM}.console.log"
ROOT = "/var/lib/virtd/containers/mini"
FIRST = 0x61000000
STATUS = 7  # the exit status of what ends
ADDRESS = "192.0.2.9"

# As tests/lab/guest/console.c has its lines and its `echo`. Its terminal may be hung up, and it goes on.
PROGRAM = f"""#!/usr/bin/python3
import os, select, signal, sys, termios, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: os._exit({STATUS}))
modes = termios.tcgetattr(0)
modes[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, modes)
alphabet = "abcdefghijklmnopqrstuvwxyz" * 4
rate, number, typed, due, reading = int(sys.argv[1]), 0, b"", time.monotonic(), True
def say(text):
    data = text.encode()
    while data:
        try:
            data = data[os.write(1, data):]
        except OSError:
            time.sleep(0.1)
            return
while True:
    if select.select([0] if reading else [], [], [], max(0, due - time.monotonic()))[0]:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        reading = bool(data)
        *lines, typed = (typed + data).split(b"\\n")
        for line in lines:
            if line.startswith(b"echo "):
                say(line[5:].decode() + "\\n")
    if time.monotonic() >= due:
        due = max(due + 0.05, time.monotonic() - 1)
        text = ""
        for _ in range(rate // 20):
            number += 1
            text += "line %010d %s .\\n" % (number, alphabet[number % 26:][:60])
        say(text)
"""
# Its programs are the lab's own. Without its console a container is hung up; an init doesn't end by that.
MAKE = f"""set -e
test -e {ROOT}/steady && exit 0
mkdir -p {ROOT} && cd {ROOT} && mkdir -p etc tmp usr proc sys dev run
for name in bin sbin lib lib64; do ln -sfn usr/$name $name; done
printf '#!/bin/sh\\ntrap "" HUP\\nexec sleep 1000000\\n' >brief
printf '#!/bin/sh\\nexec sh "$@"\\n' >shell
cat >steady
chmod 755 . brief shell steady
chown -hR {FIRST}:{FIRST} .
"""


class Containers:
    """The promises: PID, console out and in, address, control, an end in the gap on record, nothing left behind."""

    name = "container"
    heading = "The same, for containers"

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
        lab.run("sh", "-c", MAKE, stdin=PROGRAM)
        for name in (STEADY, VICTIM, BRIEF):
            command = f'"/steady", "{RATES[name]}"' if name in RATES else '"/brief"'
            mount = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'
            text = f'name = "{name}"\nrootfs = "{ROOT}"\ncommand = [{command}]\n{mount}'
            lab.virtctl(NOUN, "define", "-", stdin=text)
        lab.virtctl(NOUN, "start", STEADY)
        lab.wait("the steady container's lines", lambda: self._tally(STEADY).lines > 50, 60)
        self.pid = self._info(STEADY)["pid"]
        lab.sh(f"nsenter -t {self.pid} -n ip address add {ADDRESS}/24 dev lo")

    def before(self) -> None:
        lab = self.lab
        for name in (VICTIM, BRIEF):
            if self._info(name)["state"] != "running":
                lab.virtctl(NOUN, "start", name)
        lab.wait("the victim's lines", lambda: self._tally(VICTIM).lines > 20, 60)
        if self.console is None:
            self.console = Attached(lab, STEADY, noun=NOUN)
        if not self._ask():
            raise Failed("the steady container doesn't answer before anything has happened")
        # LXC's log says which process it is, and may be a moment behind the console.
        self.victim_pid = lab.wait("the victim's first process", lambda: self._info(VICTIM)["pid"], 60)
        self.gap = False
        self.struck_at = 0.0

    def strike(self, *, gap: bool) -> None:
        self.gap = gap
        done = self.lab.run("sh", "-c", f"cat {LOG}; kill -USR1 {self.victim_pid}", timeout=60)
        self.lines_then = check(done.stdout.encode()).last
        self.struck_at = time.time()

    def after(self, *, attached: bool) -> list[Finding]:
        lab, found = self.lab, list[Finding]()

        def lost(what: str) -> None:
            found.append(Finding(Verdict.LOST, what))

        if not attached:
            self.detach()
        info = self._settled(STEADY)
        if (info["pid"], info["state"]) != (self.pid, "running"):
            lost(f"the container is {info['state']}, PID {info['pid']} instead of {self.pid}")
            return found
        gone = [slot for slot in ("stdin", "stdout", "stderr") if f"lxc/{STEADY}/{slot}" not in info["slots"]]
        found += self._without_console(gone) if gone else self._console_promises()
        if ADDRESS not in lab.sh(f"nsenter -t {self.pid} -n ip -o address"):
            lost("its address is gone")
        for verb, state in (("freeze", "paused"), ("thaw", "running")):
            done = lab.virtctl(NOUN, verb, STEADY, check=False)
            if done.returncode or self._info(STEADY)["state"] != state:
                lost(f"{verb} doesn't work: {done.stderr.strip()[:80]}")
        done = lab.virtctl(NOUN, "stop", BRIEF, check=False)
        end = self._info(BRIEF)
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
        self.lab.sh("rm -f /var/log/virtd/lxc/*")
        left = self.lab.sh("systemctl list-units --all --plain --no-legend 'virtd-lxc-*'; ls /run/virtd/lxc")
        return [Finding(Verdict.LOST, f"left over: {' '.join(left.split())}")] if left else []

    # Promises

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.lab.json(NOUN, "info", name)
        return found

    def _settled(self, name: str) -> dict[str, Any]:
        """A container, as soon as the daemon tells of it."""

        def look() -> dict[str, Any] | None:
            try:
                return self._info(name)
            except Failed:
                return None

        found: dict[str, Any] = self.lab.wait(f"an answer about {name}", look, 60)
        return found

    def _tally(self, name: str) -> Tally:
        argv = [LAB, "exec", self.lab.name, "--", "virtctl", NOUN, "log", name]
        done = subprocess.run(argv, check=False, capture_output=True, timeout=120)
        if done.returncode:
            raise Failed(f"virtctl container log {name}: {done.stderr.decode()}")
        return check(done.stdout)

    def _ask(self) -> bool:
        assert self.console is not None
        self.words += 1
        return self.console.ask(f"word-{self.words}", 30)

    def _console_promises(self) -> list[Finding]:
        found = list[Finding]()
        if self.console is None:
            self.console = Attached(self.lab, STEADY, noun=NOUN)
        if not self._ask():
            said, self.console = self.console.close(), None
            return [Finding(Verdict.LOST, f"the console takes no input {' '.join(said.split())[:100]}".strip())]
        before = self._tally(STEADY).last
        try:
            self.lab.wait("new lines", lambda: self._tally(STEADY).last > before, 20)
        except Failed:
            found.append(Finding(Verdict.LOST, "the console shows nothing more"))
        for where, tally in (("the log", self._tally(STEADY)), ("the attached console", self.console.tally)):
            if not tally.whole:
                text = f"{where}: {tally.lost} lines lost, {tally.repeated} repeated, {len(tally.broken)} broken"
                found.append(Finding(Verdict.LOST, text))
        slots = [slot.rpartition("/")[2] for slot in self._info(STEADY)["slots"]]
        if slots != SLOTS:
            found.append(Finding(Verdict.LOST, f"the store has only {', '.join(slots)} of the container's slots"))
        return found

    def _without_console(self, slots: list[str]) -> list[Finding]:
        """It's enough for "degraded" if `virtctl status` says which descriptors are gone."""
        self.detach()
        shown = self.lab.virtctl("status", check=False)
        silent = [slot for slot in slots if f"lxc/{STEADY}/{slot}" not in shown.stdout]
        if silent or shown.returncode != 1:
            return [Finding(Verdict.LOST, f"{', '.join(silent)} gone, and virtctl status doesn't say so")]
        return [Finding(Verdict.DEGRADED, "no console until the container is started afresh")]

    def _end_of_victim(self) -> list[Finding]:
        lab, found = self.lab, list[Finding]()
        info = lab.wait("the victim's end on record", lambda: (i := self._info(VICTIM))["exit"] and i, 30)
        end = info["exit"]
        if (info["state"], end["code"], end["cause"]) != ("crashed", STATUS, "failed"):
            told = f"its end is told as {info['state']}, status {end['code']}, {end['cause']}"
            found.append(Finding(Verdict.LOST, told))
        at = dt.datetime.fromisoformat(end["at"]).timestamp()
        if abs(at - self.struck_at) > SLACK:
            found.append(Finding(Verdict.LOST, f"its end is told {at - self.struck_at:+.0f} s off"))
        tally = self._tally(VICTIM)
        if not tally.whole or tally.first != 1 or tally.last < self.lines_then:
            lines = f"{tally.lost} lines lost, {tally.repeated} repeated"
            found.append(Finding(Verdict.LOST, f"the log of what ended: {lines}"))
        if self.gap and tally.last <= self.lines_then:
            said = lab.sh(f"journalctl -q -o cat -u virtd.service -g 'lxc/{VICTIM}/stdout .*lost'; true", check=False)
            verdict = Verdict.DEGRADED if said else Verdict.LOST
            found.append(Finding(verdict, "the last bytes of what ended meanwhile are gone"))
        if info["slots"] or info["pid"]:
            found.append(Finding(Verdict.LOST, f"what ended keeps {info['slots']}"))
        lab.sh(f"rm -f {LOG}*")
        return found
