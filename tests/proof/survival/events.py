# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events of the table. Each is done for real; where that can't be, it says what stands in and why."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.harness import LAB
from tests.proof.survival.scene import DAEMON, DROP_INS, KILL, Scene
from tests.proof.survival.untidy import meddled_with, stands_still

CLOCK = Path(__file__).with_name("clock.c")
CRASHES = 50


@dataclass(frozen=True)
class Event:
    """One row.

    `title` is Markdown. `asks`: a client asks all through it and has to be answered. `attached`: what runs in the lab
    outlives it. `since`: the first systemd that knows it. `quick`: part of the short run. `small_log`: /var/log/virtd
    is a file system of its own, of a size that can be filled.
    """

    title: str
    run: Callable[[Scene], None]
    asks: bool = True
    attached: bool = True
    since: int = 0
    quick: bool = False
    small_log: bool = False


def restart(scene: Scene) -> None:
    # Just before, so that no daemon sees it end: the old one is told to leave at the same moment.
    scene.sh(f"kill -STOP {DAEMON}")
    scene.strike()
    scene.sh(f"systemctl restart --no-block virtd.service; kill -CONT {DAEMON}; systemctl restart virtd.service")


def killed(signal: str) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        old = scene.daemon()
        scene.sh(f"kill -STOP {old}")
        scene.strike()
        scene.sh(f"kill -{signal} {old}; kill -CONT {old}", check=False)
        scene.await_new_daemon(old)

    return run


def watchdog(scene: Scene) -> None:
    """The daemon stands still; systemd waits WatchdogSec= (2 s here instead of 30), and ends it with SIGABRT."""
    scene.drop_in("[Service]\nWatchdogSec=2\n")
    scene.sh("systemctl restart virtd.service")
    old = scene.daemon()
    scene.sh(f"kill -STOP {old}; sleep 1")
    scene.strike(gap=True)
    scene.await_new_daemon(old)
    result = scene.sh("journalctl -q -o cat -b -u virtd.service -g 'Watchdog timeout' | tail -n 1")
    if not result:
        scene.failed("systemd's watchdog didn't see it")
    scene.no_drop_in()


def stop_and_start(seconds: float) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        scene.sh("systemctl stop virtd.service 2>/dev/null")
        time.sleep(max(1.0, seconds / 2))
        scene.strike(gap=True)
        time.sleep(seconds / 2)
        if scene.sh("systemctl is-active virtd.service", check=False).strip() != "inactive":
            scene.failed("something woke the daemon")
        # A client that can't wait for the start brings it about, through the socket; both have to be answered.
        client = subprocess.Popen(
            [LAB, "exec", scene.lab.name, "--", "virtdctl", "list"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        scene.sh("systemctl start virtd.service")
        if client.wait(60):
            scene.failed("the client that waited got no answer")

    return run


def systemd(command: str) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        scene.strike()
        scene.sh(command)

    return run


def reexec_and_more(scene: Scene) -> None:
    """In one early trial this sequence emptied the store; see test_fdstore_facts for why."""
    scene.sh("systemctl daemon-reexec")
    old = scene.daemon()
    scene.sh(f"kill -9 {old}")
    scene.await_new_daemon(old)
    scene.sh("systemctl stop virtd.service 2>/dev/null; sleep 1")
    # A console that was still knocking when it stopped has woken it, as is its right; then there is no gap.
    away = scene.sh("systemctl is-active virtd.service", check=False).strip() == "inactive"
    scene.strike(gap=away)
    scene.sh("sleep 1; systemctl start virtd.service")


def soft_reboot(scene: Scene) -> None:
    # The victim dies while user space is on its way down, which may be before or after the daemon.
    scene.strike()
    scene.lab.soft_reboot()


def upgrade(scene: Scene) -> None:
    scene.strike()
    scene.sh(f"rpm -U {scene.new}")
    if scene.lab.json("status")["version"] != "0.1.1":
        scene.failed("the old daemon still runs")


def rollback(scene: Scene) -> None:
    scene.sh(f"rpm -q virtd | grep -q 0.1.1 || rpm -U {scene.new}")
    scene.strike()
    scene.sh(f"rpm -U --oldpackage {scene.old}")
    if scene.lab.json("status")["version"] != "0.1.0":
        scene.failed("the new daemon still runs")


def erase(scene: Scene) -> None:
    scene.sh("rpm -e virtd; sleep 2")
    scene.strike(gap=True)
    scene.sh(f"sleep 1; rpm -i {scene.old} && systemctl start virtd.socket virtd.service")


def out_of_memory(scene: Scene) -> None:
    """The daemon has no memory left, is of no use to anybody for a while, and is killed as the kernel would do it.

    The kernel's own killer can't be called here without a memory controller in the lab: it sends SIGKILL too.
    """
    old = scene.daemon()
    size = int(scene.sh(f"sed -n 's/^VmSize:[[:space:]]*\\([0-9]*\\) kB/\\1/p' /proc/{old}/status"))
    scene.sh(f"prlimit --pid {old} --as={size * 1024}:")
    for _ in range(20):
        scene.sh(
            "timeout 5 virtdctl info steady >/dev/null 2>&1 & timeout 5 virtdctl log steady >/dev/null 2>&1; wait"
        )
    scene.strike()
    scene.sh(f"kill -9 {old}", check=False)
    scene.await_new_daemon(old)


def crash_loop(scene: Scene) -> None:
    """A definition and a record that can't be read, there at each of 50 starts, and each daemon is killed early.

    Each tenth one has answered somebody before: a client waits for 30 s, which 50 starts may take on a slow machine.
    """
    scene.sh("printf 'name = ' >/etc/virtd/qemu/broken.toml")
    scene.strike()
    scene.sh(
        "python3 - <<'END'\n"
        "import os, signal, subprocess, time\n"
        "def main_pid():\n"
        "    return int(subprocess.run(['systemctl', 'show', '-P', 'MainPID', 'virtd.service'],\n"
        "                              capture_output=True, text=True).stdout)\n"
        f"for n in range({CRASHES}):\n"
        "    while not (pid := main_pid()):\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.004 * n)\n"  # from the first instruction to after the adoption
        "    if n % 10 == 9:\n"
        "        subprocess.run(['virtdctl', 'list'], capture_output=True)\n"
        "        pid = main_pid()\n"
        "    with open('/run/virtd/qemu/ghost.json', 'w') as file:\n"
        "        file.write('{')\n"
        "    os.kill(pid, signal.SIGKILL)\n"
        "    while main_pid() == pid:\n"
        "        time.sleep(0.005)\n"
        "END",
        timeout=300,
    )
    problems = scene.expect("the daemon", lambda: scene.status()["problems"], 60)
    told = " ".join(problem["text"] for problem in problems)
    if "broken.toml" not in told or "ghost" not in told:
        scene.failed("virtdctl status doesn't tell of the broken definition and the broken record")
    scene.sh("rm -rf /etc/virtd/qemu/broken.toml /run/virtd/quarantine; systemctl restart virtd.service")


def full(*, run: bool, log: bool) -> Callable[[Scene], None]:
    """Not a byte is left: the daemon is killed, and starts in that; then there is room, and it is killed again."""

    def event(scene: Scene) -> None:
        size = scene.sh("findmnt -n -b -o SIZE /run").strip()
        if run:
            used = int(scene.sh("df --output=used -k /run | tail -n 1"))
            # Small first: memory that is taken only to be full is taken from everybody on this machine.
            scene.sh(f"mount -o remount,size={used + 64}k /run; cat /dev/zero >/run/filler 2>/dev/null", check=False)
        if log:
            scene.sh("cat /dev/zero >/var/log/virtd/filler 2>/dev/null", check=False)
        old = scene.daemon()
        scene.sh(f"kill -STOP {old}")
        scene.strike()
        scene.sh(f"kill -9 {old}; kill -CONT {old}", check=False)
        scene.await_new_daemon(old)
        scene.expect("an answer", lambda: scene.lab.virtdctl("list", check=False).returncode == 0, 30)
        scene.sh("sleep 3")
        if run:
            scene.sh(f"rm -f /run/filler; mount -o remount,size={size} /run")
        if log:
            scene.sh("rm -f /var/log/virtd/filler")
        # What couldn't be written has to be by now, or this one takes it along.
        scene.expect("the end of the problems", lambda: scene.status()["problems"] == [], 30)
        old = scene.daemon()
        scene.sh(f"kill -9 {old}")
        scene.await_new_daemon(old)

    return event


def lowered(scene: Scene) -> None:
    """systemd drops what is over the limit when it reads the unit again."""
    scene.drop_in("[Service]\nFileDescriptorStoreMax=2\n")
    scene.sh("systemctl restart virtd.service")
    scene.strike()


def lowered_and_raised(scene: Scene) -> None:
    """As long as the daemon runs it has them all, and puts them back when it is allowed to."""
    scene.drop_in("[Service]\nFileDescriptorStoreMax=2\n")
    told = scene.expect("the problem", lambda: scene.status()["problems"], 20)
    if not any("FileDescriptorStoreMax" in problem["text"] + problem["hint"] for problem in told):
        scene.failed("virtdctl status doesn't tell what systemd has dropped")
    scene.strike()
    scene.no_drop_in()
    scene.expect("the end of the problem", lambda: scene.status()["problems"] == [], 20)
    old = scene.daemon()
    scene.sh(KILL)
    scene.await_new_daemon(old)


def clock(scene: Scene) -> None:
    """An hour back, under a running daemon, and then for the next one.

    The clock itself is the host's, and everybody's on it; so the daemon is told another time by a library that it is
    started with. Time namespaces don't have the real-time clock, and libfaketime breaks clock_nanosleep().
    """
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/clock.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, os.fspath(CLOCK)], check=True)
        scene.lab.copy(library, "/usr/local/lib/virtd-clock.so")
    scene.lab.write("/etc/virtd-clock", "0")
    scene.drop_in("[Service]\nEnvironment=LD_PRELOAD=/usr/local/lib/virtd-clock.so\n")
    scene.sh("systemctl restart virtd.service")
    scene.lab.write("/etc/virtd-clock", "-3600")
    scene.strike()
    scene.sh("sleep 1")
    for _ in range(2):
        old = scene.daemon()
        scene.sh(f"kill -9 {old}")
        scene.await_new_daemon(old)
    since = scene.lab.info("brief")["since"]
    scene.lab.virtdctl("stop", "brief")
    scene.lab.virtdctl("start", "brief")
    if scene.lab.info("brief")["since"] >= since:
        scene.failed("the daemon's clock wasn't set back: this shows nothing")
    scene.sh(f"rm -rf {DROP_INS} /etc/virtd-clock; systemctl daemon-reload; systemctl restart virtd.service")


EVENTS = (
    Event("`systemctl restart virtd`", restart, quick=True),
    Event("SIGKILL", killed("KILL"), quick=True),
    Event("SIGSEGV", killed("SEGV")),
    Event("watchdog timeout (the daemon hangs)", watchdog, quick=True),
    Event("`daemon-reload`", systemd("systemctl daemon-reload"), quick=True),
    Event("`daemon-reexec`", systemd("systemctl daemon-reexec")),
    Event("restart of systemd-journald", systemd("systemctl restart systemd-journald.service")),
    Event("restart of the D-Bus daemon", systemd("systemctl restart dbus.service"), quick=True),
    Event("upgrade of the RPM", upgrade, quick=True),
    Event("rollback of the RPM", rollback, quick=True),
    Event("RPM erased, installed again", erase, asks=False),
    Event("no memory for the daemon, SIGKILL", out_of_memory, asks=False),
    Event("50 crashes in a row, a definition and a record broken", crash_loop, quick=True),
    Event("the clock set back an hour", clock),
    Event("`/run` full, SIGKILL", full(run=True, log=False), quick=True),
    Event("`/var/log` full, SIGKILL", full(run=False, log=True), small_log=True),
    Event("`/run` and `/var/log` full, SIGKILL", full(run=True, log=True), small_log=True),
    Event("FileDescriptorStoreMax= lowered below what is stored, and raised again", lowered_and_raised),
    Event("`systemctl stop virtd`, 60 s, `start`", stop_and_start(60), asks=False),
    Event("`daemon-reexec`, SIGKILL, `stop`, `start`", reexec_and_more, asks=False),
    Event(
        "a bridge deleted and a guest's port taken out of another, while virtd is stopped", meddled_with, asks=False
    ),
    Event("a guest that stands still for a full disk: `restart`, SIGKILL, room, `resume`", stands_still),
    Event("`systemctl soft-reboot`", soft_reboot, asks=False, attached=False, since=254, quick=True),
    Event("FileDescriptorStoreMax= lowered, `restart`", lowered),
)
