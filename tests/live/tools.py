# SPDX-License-Identifier: LGPL-2.1-or-later
"""What several live tests need besides the harness: the journal, settings for a while, a neighbour that watches."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.harness import Attached, Lab, check
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

DROP_INS = "/run/systemd/system/virtd.service.d"
# What PID 1 says of itself, of its own races, and (before 254) of keys of virtd.service that it doesn't know.
PID1S_OWN = re.compile(
    "Failed to read pids.max|Supervising process [0-9]+ which is not our child|Unknown key '(RestartSteps|"
    "RestartMaxDelaySec|FileDescriptorStorePreserve)'"
)
KILL = "kill -9 $(systemctl show -P MainPID virtd.service)"


@dataclass(frozen=True)
class Journal:
    """The journal from the moment on at which this was made."""

    lab: Lab
    cursor: str

    @classmethod
    def now(cls, lab: Lab) -> Journal:
        return cls(lab, lab.sh("journalctl --show-cursor -n 0 -q").partition("cursor: ")[2].strip())

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """Those that match all of "MESSAGE_ID=...", "_PID=1" and such, oldest first."""
        # Matched here: journalctl 252 finds nothing at all with a match after a cursor.
        lines = self.lab.run("journalctl", "-q", "-o", "json", "--after-cursor", self.cursor).stdout
        wanted = dict(match.split("=", 1) for match in matches)
        entries = [json.loads(line) for line in lines.splitlines()]
        return [entry for entry in entries if all(entry.get(field) == value for field, value in wanted.items())]

    def await_entries(self, *matches: str) -> list[dict[str, Any]]:
        """At least one: what was just logged may take a moment to be there."""
        found: list[dict[str, Any]] = self.lab.wait(f"an entry with {matches}", lambda: self.entries(*matches), 20)
        return found


def write(lab: Lab, path: str, text: str) -> None:
    """As Lab.write, also for file systems that only the lab itself sees, such as its /run."""
    lab.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && cat >"$0"', path, stdin=text)


@contextlib.contextmanager
def settings(lab: Lab, text: str) -> Iterator[None]:
    """virtd.toml says `text` for a while, and the daemon has read it."""
    lab.write("/etc/virtd/virtd.toml", text)
    lab.sh("systemctl restart virtd.service")
    try:
        yield
    finally:
        lab.sh("rm -f /etc/virtd/virtd.toml; systemctl restart virtd.service")


@contextlib.contextmanager
def drop_in(lab: Lab, text: str) -> Iterator[None]:
    """virtd.service has `text` added for a while."""
    write(lab, f"{DROP_INS}/test.conf", text)
    lab.sh("systemctl daemon-reload && systemctl restart virtd.service")
    try:
        yield
    finally:
        lab.sh(f"rm -rf {DROP_INS}; systemctl daemon-reload && systemctl restart virtd.service")


@contextlib.contextmanager
def away(lab: Lab) -> Iterator[None]:
    """The daemon stands still for a while, and is killed and back in the end.

    One that is stopped would lose its store under systemd 252.
    """
    lab.sh("kill -STOP $(systemctl show -P MainPID virtd.service)")
    journal = Journal.now(lab)
    try:
        yield
    finally:
        lab.sh(KILL)
    journal.await_entries(f"MESSAGE_ID={Message.RECOVERED}")


@dataclass(frozen=True)
class Bystander:
    """A guest that streams all the while and has nothing to do with what is tried on others."""

    lab: Lab
    pid: int
    name: str = "bystander"

    @classmethod
    def started(cls, lab: Lab) -> Bystander:
        lab.define(cls.name, cmdline="virtd.rate=200", start=True)
        lab.wait_lines(cls.name, 20)
        return cls(lab, lab.info(cls.name)["pid"])

    def check(self) -> None:
        """It hasn't noticed a thing: same PID, running, under control, not a byte lost or repeated."""
        info = self.lab.wait(
            "the bystander's monitor", lambda: (i := self.lab.info(self.name))["monitor"] == "connected" and i, 20
        )
        assert (info["pid"], info["state"], info["problems"]) == (self.pid, "running", [])
        assert len(info["slots"]) == 5
        before = check(self.lab.console(self.name))
        assert before.whole, (before.lost, before.repeated, before.broken[:3])
        assert before.first == 1
        self.lab.wait("more of its lines", lambda: check(self.lab.console(self.name)).lines > before.lines, 20)


def undefine_others(lab: Lab, *keep: str) -> None:
    """Stop and forget all domains but these."""
    for item in lab.json("list"):
        if item["name"] not in keep:
            lab.virtdctl("stop", item["name"], check=False)
            lab.virtdctl("undefine", item["name"], check=False)


def spawn(lab: Lab, *command: str, **options: Any) -> subprocess.Popen[str]:
    """A command in the lab that runs beside the test."""
    from tests.harness import LAB

    return subprocess.Popen(
        [LAB, "exec", lab.name, "--", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@contextlib.contextmanager
def attached(lab: Lab, *arguments: str) -> Iterator[Attached]:
    console = Attached(lab, *arguments)
    try:
        yield console
    finally:
        with contextlib.suppress(ValueError):  # closed already
            console.close()


def acl(lab: Lab, path: str) -> list[str]:
    """The users that a file's access control list names, besides its owner."""
    script = """
import os, pwd, struct, sys
try:
    raw = os.getxattr(sys.argv[1], "system.posix_acl_access")
except OSError:
    raw = b"\\2\\0\\0\\0"
for tag, perm, uid in struct.iter_unpack("<HHI", raw[4:]):
    if tag == 2:
        bits = "".join(letter if perm & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        print(f"user:{pwd.getpwuid(uid).pw_name}:{bits}")
"""
    return lab.run("python3", "-c", script, path).stdout.split()
