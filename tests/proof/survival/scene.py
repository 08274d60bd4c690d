# SPDX-License-Identifier: LGPL-2.1-or-later
"""One lab in which the events happen: what they may use, and the subjects that live through them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tests.harness import LAB, Lab
from tests.proof.survival.table import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

DROP_INS = "/run/systemd/system/virtd.service.d"
DAEMON = "$(systemctl show -P MainPID virtd.service)"
KILL = f"kill -9 {DAEMON}"

# A client that asks all the while, as a person or a script would: each question has to be answered.
ASKER = """
: >/root/asked; : >/root/failed
while test -e /root/asking; do
    virtdctl list >/dev/null 2>/root/asking.err || { echo "status $?:"; cat /root/asking.err; } >>/root/failed
    echo >>/root/asked
    sleep 0.1
done
"""


class Subject(Protocol):
    """What is to survive: guests, networks, pools with their jobs, containers."""

    name: str
    plural: str  # what they are called in the table
    driver: str  # whose problems and remains are this subject's

    def prepare(self) -> None:
        """Make and start whatever it takes, in a lab that has a fresh daemon; also after `clear`."""

    def before(self) -> None:
        """Note how things are; the event comes now."""

    def strike(self, *, gap: bool) -> None:
        """Something of it ends, now, in the midst of the event. `gap`: no daemon has been there for a second."""

    def after(self, *, attached: bool) -> list[Finding]:
        """Look at every promise. `attached`: clients that run in the lab have lived through the event."""

    def detach(self) -> None:
        """End the clients that it has outside the lab."""

    def clear(self) -> list[Finding]:
        """Stop and remove all of it; what can't be removed is a finding."""


@dataclass
class Scene:
    """The lab, and who is in it. An event calls `strike` when the daemon is away, or when it pleases."""

    lab: Lab
    old: str  # RPMs, by their path in the lab
    new: str
    suite: str
    subjects: list[Subject] = field(default_factory=list)
    struck: bool = False
    extra: list[Finding] = field(default_factory=list)
    _asker: subprocess.Popen[bytes] | None = None

    @property
    def systemd(self) -> int:
        return int(self.lab.sh("systemctl --version").split()[1])

    # For events

    def sh(self, script: str, *, check: bool = True, timeout: float = 180) -> str:
        return self.lab.sh(script, check=check, timeout=timeout)

    def strike(self, *, gap: bool = False) -> None:
        for subject in self.subjects:
            subject.strike(gap=gap)
        self.struck = True

    def failed(self, what: str) -> None:
        """The event itself saw something that it shouldn't."""
        self.extra.append(Finding(Verdict.LOST, what))

    def expect(self, what: str, condition: Callable[[], Any], timeout: float = 30) -> Any:
        return self.lab.wait(what, condition, timeout)

    def daemon(self) -> int:
        return self.lab.main_pid()

    def await_new_daemon(self, old: int, timeout: float = 60) -> int:
        pid: int = self.expect("a new daemon", lambda: (p := self.daemon()) and p != old and p, timeout)
        return pid

    def status(self) -> dict[str, Any]:
        """What `virtdctl status` says; its exit status is 1 when it has problems to tell."""
        found: dict[str, Any] = json.loads(self.lab.virtdctl("status", "--json", check=False).stdout)
        return found

    def drop_in(self, text: str) -> None:
        self.lab.run("sh", "-c", f"mkdir -p {DROP_INS}; cat >{DROP_INS}/event.conf", stdin=text)
        self.sh("systemctl daemon-reload")

    def no_drop_in(self) -> None:
        self.sh(f"rm -rf {DROP_INS}; systemctl daemon-reload")

    # For the runner

    def small_log(self) -> None:
        """Give /var/log/virtd little room; nobody uses it at this moment."""
        self.sh("mount -t tmpfs -o size=32M,mode=711 tmpfs /var/log/virtd; systemctl restart virtd.service")

    def large_log(self) -> None:
        self.sh("umount -l /var/log/virtd; systemctl restart virtd.service")

    def ask(self) -> None:
        """Have a client ask until `answers`."""
        self.sh("touch /root/asking")
        self._asker = subprocess.Popen(
            [LAB, "exec", self.lab.name, "--", "sh", "-c", ASKER], stdin=subprocess.DEVNULL
        )

    def answers(self) -> list[Finding]:
        """What the client says: nothing, if all of its questions were answered."""
        if self._asker is None:
            return []
        self.sh("rm -f /root/asking")
        self._asker.wait(120)
        self._asker = None
        asked, failed = int(self.sh("wc -l </root/asked")), self.sh("cat /root/failed").strip()
        if failed:
            return [Finding(Verdict.LOST, f"a client got no answer: {' '.join(failed.split())[:120]}")]
        return [] if asked else [Finding(Verdict.LOST, "no client was answered")]

    def leftovers(self) -> list[tuple[str, Finding]]:
        """Whatever there is that belongs to nothing: units, slots, records, directories, files; first whose it is."""
        found = json.loads(self.lab.run("python3", "-c", LEFTOVERS).stdout)
        return [(driver, Finding(Verdict.LOST, text)) for driver, text in found]

    def problems(self) -> list[tuple[str, Finding]]:
        """What `virtdctl status` has to say, as it shouldn't after an event that did no harm; first whose it is."""
        return [
            (
                problem["object"].partition("/")[0],
                Finding(Verdict.LOST, f"virtdctl status has a problem: {problem['text'][:100]}"),
            )
            for problem in self.status()["problems"]
        ]

    def differences(self) -> list[tuple[str, Finding]]:
        """What `virtdctl fsck` finds; first whose it is."""
        found = json.loads(self.lab.virtdctl("fsck", "--json", check=False).stdout)["differences"]
        return [
            (row["object"].partition("/")[0], Finding(Verdict.LOST, f"virtdctl fsck finds: {row['text'][:100]}"))
            for row in found
        ]


# Runs in the lab: units = slots = records = directories, for what runs, and nothing for what doesn't. A network that
# is active without a unit says so in its record: its dnsmasq couldn't be started again.
LEFTOVERS = r"""
import glob, json, os, subprocess
# A driver's states in which an object has a unit and a directory in /run; how virtdctl calls what has slots.
LIVE = {"qemu": ("running", "paused"), "network": ("active",), "lxc": ("running", "paused")}
NOUNS = ((), ("network",), ("container",))
def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True).stdout
wrong = []
for driver, live in LIVE.items():
    alive, supervised = set(), set()
    for path in glob.glob(f"/run/virtd/{driver}/*.json"):
        with open(path) as file:
            record = json.load(file)
        if record["state"] in live:
            alive.add(record["name"])
            if record["unit"] or driver != "network":
                supervised.add(record["name"])
        elif record.get("unit") or record.get("slots"):
            wrong.append((driver, f"the record of {driver}/{record['name']} is {record['state']} and not put away"))
    pattern = f"virtd-{driver}-*.service"
    listed = run("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern)
    units = {line.split()[0][len(pattern) - 9:-len(".service")] for line in listed.splitlines()}
    directories = {path.split("/")[-2] for path in glob.glob(f"/run/virtd/{driver}/*/")}
    pipes = {path.split("/")[-2].partition(".")[2] for path in glob.glob(f"/run/virtd/fifos/{driver}.*/")}
    compared = (("units", units, supervised), ("directories", directories, alive), ("pipes", pipes, supervised))
    for what, there, due in compared:
        if there != due:
            wrong.append((driver, f"{what} of {driver}/{sorted(there)}, records of {sorted(due)}"))
known = 0
for noun in NOUNS:
    for item in json.loads(run("virtdctl", *noun, "list", "--json")):
        known += len(json.loads(run("virtdctl", *noun, "info", item["name"], "--json"))["slots"])
status = json.loads(run("virtdctl", "status", "--json"))
if known != status["budget"]["used"]:
    wrong.append(("", f"{status['budget']['used']} slots, {known} of them of an object"))
for top in ("/run/virtd", "/etc/virtd", "/var/log/virtd"):
    for directory, _, files in os.walk(top):
        driver = (directory[len(top) + 1:]).partition("/")[0]
        left = [name for name in files if name.startswith(".") or name.endswith(".new")]
        wrong += [(driver, f"{directory}/{name} is left") for name in left]
print(json.dumps(wrong))
"""
