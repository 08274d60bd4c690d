# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo`: one guest that lives through everything that can happen to its daemon, told while it happens.

Each row of the table is one event: the guest's PID before and after, lines of its console lost and repeated (in the
log and on an attached `virtdctl console`), whether it answered what was typed, how long until the API answered, and
how many descriptors PID 1 holds. Exit status 1 if a row is bad.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tests.harness import LAB, Attached, Failed, Lab, Tally, build_rpm, check

GUEST = "demo"
RATE = 200  # console lines a second
SLOTS = 5
# An attached console must not have woken it through its socket meanwhile.
STOP = "systemctl stop virtd.service 2>/dev/null; sleep 10; ! systemctl is-active virtd.service"

# Runs in the lab: what goes before, the event, then the first complete listing on a fresh connection. Prints the
# milliseconds from the beginning of the event to that listing.
PROBE = r"""
import json, socket, subprocess, sys, time
def listing():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("/run/virtd/virtd.sock")
        s.sendall(b'{"method":"org.virtd1.List"}\0')
        data = b""
        while not data.endswith(b"\0"):
            piece = s.recv(65536)
            if not piece:
                raise ConnectionError
            data += piece
        return json.loads(data[:-1])["parameters"]["objects"]
def run(command):
    subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
run(sys.argv[1])
began = time.monotonic()
run(sys.argv[2])
while True:
    try:
        found = listing()
        break
    except (ConnectionError, OSError):
        time.sleep(0.001)
print(round((time.monotonic() - began) * 1000), len(found))
"""


@dataclass(frozen=True)
class Row:
    """What one event did."""

    event: str
    before: int
    after: int
    lost: int
    repeated: int
    answered: bool
    ms: int
    slots: int

    @property
    def good(self) -> bool:
        return (
            self.before == self.after
            and not self.lost
            and not self.repeated
            and self.answered
            and self.slots == SLOTS
        )


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.monotonic()
HEADER = ("event", "PID", "after", "lost", "repeated", "input", "API answered", "slots")
FORMAT = "  {:<34} {:>6} {:>6} {:>5} {:>8}  {:<8} {:>12} {:>5}   {}"


class Demo:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.rows: list[Row] = []
        self.console = Attached(lab, GUEST)
        self.words = 0

    def event(self, name: str, command: str, *, first: str = "true") -> None:
        """Do it, look, and print the row. `first`: what goes before and isn't timed."""
        say(f"{name}: {command if first == 'true' else f'{first}; {command}'}")
        before = self.lab.info(GUEST)["pid"]
        log, shown = check(self.lab.console(GUEST)), self.snapshot()
        done = self.lab.run("python3", "/root/probe.py", first, command, timeout=180)
        ms = int(done.stdout.split()[0])
        self.words += 1
        answered = self.console.ask(f"word-{self.words}", 60)
        info = self.lab.info(GUEST)
        log_now, shown_now = check(self.lab.console(GUEST)), self.snapshot()
        row = Row(
            name,
            before,
            info["pid"] or 0,
            log_now.lost - log.lost + shown_now[0] - shown[0],
            log_now.repeated - log.repeated + shown_now[1] - shown[1],
            answered,
            ms,
            self.lab.slots(),
        )
        self.rows.append(row)
        if len(self.rows) == 1:
            print(FORMAT.format(*HEADER, ""))
        print(
            FORMAT.format(
                row.event, row.before, row.after, row.lost, row.repeated,
                "answered" if row.answered else "SILENT", f"{row.ms} ms", row.slots, "" if row.good else "<-- BAD",
            ),
            flush=True,
        )  # fmt: skip

    def snapshot(self) -> tuple[int, int]:
        tally: Tally = self.console.tally
        return tally.lost + len(tally.broken), tally.repeated

    def last_words(self) -> bool:
        """The guest is killed while nobody is there to see it; the record and the log know all the same."""
        lab = self.lab
        say("the guest is killed with SIGKILL while virtd is stopped")
        pid = lab.info(GUEST)["pid"]
        lab.sh("systemctl stop virtd.service 2>/dev/null")
        lab.sh(f"sleep 1; kill -9 {pid}; sleep 0.5; systemctl start virtd.service")
        info = lab.wait("the end on record", lambda: (i := lab.info(GUEST))["exit"] and i, 20)
        tally = check(lab.console(GUEST))
        end = info["exit"]
        print(f"  virtdctl info {GUEST}: {info['state']}, {info['reason']}")
        print(f"  on record: signal {end['signal']}, cause {end['cause']}, at {end['at']}")
        print(f"  its log: lines {tally.first} to {tally.last}; {tally.lost} lost, {tally.repeated} repeated")
        good = end["signal"] == "SIGKILL" and end["cause"] == "killed" and tally.whole and lab.slots() == 0
        print(f"  slots left in the store: {lab.slots()}{'' if good else '   <-- BAD'}", flush=True)
        return good


def main() -> int:
    name = f"demo-{os.getpid()}"
    say("building two versions of the package: 0.1.0 and 0.1.1; making the lab's root, if it isn't cached")
    with ThreadPoolExecutor() as pool:
        packages = [pool.submit(build_rpm, version) for version in ("0.1.0", "0.1.1")]
        root = pool.submit(
            subprocess.run, [LAB, "root"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        old, new = (package.result() for package in packages)
        root.result()
    lab = Lab(name)
    try:
        say("booting a lab: Debian in systemd-nspawn, systemd as PID 1, virtd from its RPM")
        Lab.up(name, "--rpm", str(old))
        for package in (old, new):
            lab.copy(package, f"/root/{package.name}")
        return story(lab, old.name, new.name)
    except Failed as exc:
        say(f"FAILED: {exc}")
        print(lab.run("journalctl", "-n", "40", "--no-pager", check=False).stdout)
        return 1
    finally:
        say("taking the lab down")
        lab.down()


def story(lab: Lab, old: str, new: str) -> int:
    lab.write("/root/probe.py", PROBE)
    systemd = lab.sh("systemctl --version").split()[1]
    virtdctl, qemu = lab.sh("virtdctl --version").strip(), lab.sh("qemu-system-x86_64 --version").splitlines()[0]
    say(f"systemd {systemd}, {virtdctl}, {qemu}")
    lab.define(GUEST, cmdline=f"virtd.rate={RATE}")
    say(
        f"virtdctl start {GUEST}: a real Linux guest that prints {RATE} numbered lines a second on its serial console"
    )
    lab.virtdctl("start", GUEST)
    lab.wait("the guest's console", lambda: check(lab.console(GUEST)).lines > RATE, 120)
    demo = Demo(lab)
    try:
        if not demo.console.ask("word-0", 60):
            raise Failed("the guest doesn't answer on its console")
        demo.event("systemctl restart virtd", "systemctl restart virtd.service")
        demo.event("kill -9 of the daemon", "kill -9 $(systemctl show -P MainPID virtd.service)")
        demo.event(
            "stop for 10 s, then start",
            "systemctl start virtd.service",
            first=STOP,
        )
        demo.event("RPM upgrade to 0.1.1", f"rpm -U /root/{new}")
        demo.event("RPM rollback to 0.1.0", f"rpm -U --oldpackage /root/{old}")
        demo.event("systemctl reload virtd", "systemctl reload virtd.service")
    finally:
        demo.console.close()
    end = demo.last_words()
    print("\n" + FORMAT.format(*HEADER, ""))
    for row in demo.rows:
        print(
            FORMAT.format(
                row.event, row.before, row.after, row.lost, row.repeated,
                "answered" if row.answered else "SILENT", f"{row.ms} ms", row.slots, "" if row.good else "<-- BAD",
            )
        )  # fmt: skip
    good = all(row.good for row in demo.rows) and end
    print()
    say("VERDICT: the guest never noticed." if good else "VERDICT: something was lost; see the rows marked BAD.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
