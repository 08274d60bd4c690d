# SPDX-License-Identifier: LGPL-2.1-or-later
"""The promise: whatever happens to the daemon, the guest keeps its PID, its console loses nothing, and it stays
controllable. Real systemd, real QEMU, real Linux in it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness import Attached, Lab, check

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.live

KILL = "kill -9 $(systemctl show -P MainPID virtd.service)"
EVENTS = {
    "restart": "systemctl restart virtd.service",
    "kill -9": KILL,
    "SIGSEGV": "kill -SEGV $(systemctl show -P MainPID virtd.service)",
    "stop and start": "systemctl stop virtd.service 2>/dev/null; sleep 2; "
    # An attached console must not have woken it through its socket.
    "test $(systemctl is-active virtd.service) = inactive && systemctl start virtd.service",
    "daemon-reload": "systemctl daemon-reload",
    "daemon-reexec": "systemctl daemon-reexec",
    "restart of D-Bus": "systemctl restart dbus.service",
    "restart of journald": "systemctl restart systemd-journald.service",
}
KILLS = int(os.environ.get("VIRTD_KILLS", "200"))
SLOTS = ["console.log", "log", "stderr", "stdin", "stdout"]


@pytest.fixture
def guest(lab: Lab) -> str:
    """A guest that prints 500 numbered lines a second and has booted."""
    lab.define("web1", cmdline="virtd.rate=500", start=True)
    lab.wait_lines("web1", 50)
    return "web1"


def in_control(lab: Lab, guest: str) -> None:
    """The daemon of now can do to the guest what the daemon that started it could."""
    assert lab.virtdctl("suspend", guest).returncode == 0
    assert lab.info(guest)["state"] == "paused"
    assert lab.virtdctl("resume", guest).returncode == 0
    assert lab.info(guest)["state"] == "running"


def test_every_event_leaves_the_guest_as_it_was(lab: Lab, guest: str) -> None:
    pid = lab.info(guest)["pid"]
    console = Attached(lab, guest)
    try:
        assert console.ask("before")
        for number, (event, command) in enumerate(EVENTS.items()):
            lab.sh(command)
            assert console.ask(f"after-{number}"), f"no answer on the attached console after {event}"
            info = lab.wait("the monitor", lambda: (i := lab.info(guest))["monitor"] == "connected" and i, 20)
            assert (info["pid"], info["state"]) == (pid, "running"), event
            assert [slot.rpartition("/")[2] for slot in info["slots"]] == SLOTS, event
            in_control(lab, guest)
        shown = console.tally
        assert shown.whole, (shown.lost, shown.repeated, shown.broken[:3])
        assert shown.lines > 100
    finally:
        console.close()
    tally = check(lab.console(guest))
    assert tally.whole, (tally.lost, tally.repeated, tally.broken[:3])
    assert tally.first == 1
    assert lab.slots() == 5
    assert lab.json("status")["problems"] == []


def test_upgrade_rollback_and_reload(lab: Lab, guest: str, packages: dict[str, Path]) -> None:
    for path in packages.values():
        lab.copy(path, f"/root/{path.name}")
    pid, daemon = lab.info(guest)["pid"], lab.main_pid()
    old, new = (f"/root/{packages[version].name}" for version in ("0.1.0", "0.1.1"))

    lab.sh(f"rpm -U {new}")
    assert "0.1.1" in lab.virtdctl("--version").stdout
    assert lab.json("status")["version"] == "0.1.1"
    assert lab.main_pid() != daemon
    assert lab.info(guest)["pid"] == pid

    upgraded = lab.main_pid()
    lab.sh(f"rpm -U --oldpackage {old}")
    assert lab.json("status")["version"] == "0.1.0"
    assert lab.main_pid() != upgraded
    assert lab.info(guest)["pid"] == pid

    before = lab.main_pid()
    lab.sh(f"rpm -U --replacepkgs {old}")
    assert lab.main_pid() == before, "the same code needs no restart"
    lab.sh("systemctl reload virtd.service")
    assert lab.main_pid() == before
    in_control(lab, guest)
    tally = check(lab.console(guest))
    assert tally.whole
    assert lab.slots() == 5


def test_erased_and_installed_again(lab: Lab, guest: str, packages: dict[str, Path]) -> None:
    lab.copy(packages["0.1.0"], "/root/virtd.rpm")
    pid = lab.info(guest)["pid"]
    said = lab.sh("rpm -e virtd 2>&1")
    assert "keep" in said or "run" in said, said
    assert lab.sh("command -v virtdctl || echo gone") == "gone\n"
    assert lab.sh(f"cat /proc/{pid}/comm").startswith("qemu")
    lab.sh("rpm -i /root/virtd.rpm && systemctl start virtd.service")
    info = lab.wait("the guest's adoption", lambda: (i := lab.info(guest))["state"] == "running" and i, 20)
    assert info["pid"] == pid
    in_control(lab, guest)
    tally = check(lab.console(guest))
    assert tally.whole, (tally.lost, tally.repeated)


def test_two_hundred_kills_under_load(lab: Lab) -> None:
    """The guest streams as fast as a UART can, 0.7 to 0.9 MB/s; the daemon is killed 200 times. No byte is lost.

    `make kills` has it done more often.
    """
    lab.write("/etc/virtd/virtd.toml", '[log]\nmax_size = "64M"\nbackups = 100\n')
    lab.sh("systemctl restart virtd.service")
    try:
        lab.define("flood", cmdline="virtd.rate=max", start=True)
        pid = lab.info("flood")["pid"]
        lab.wait_lines("flood", 1000)
        # The kill comes at a random moment of the daemon's life: from the middle of its start-up to long after it.
        lab.sh(
            "python3 - <<'END'\n"
            "import contextlib, os, random, signal, subprocess, time\n"
            "def main_pid():\n"
            "    return int(subprocess.run(['systemctl', 'show', '-P', 'MainPID', 'virtd.service'],\n"
            "                              capture_output=True, text=True).stdout)\n"
            "kills = 0\n"
            f"while kills < {KILLS}:\n"
            "    time.sleep(random.uniform(0.0, 0.25))\n"
            "    pid = main_pid()\n"
            "    if pid:\n"
            "        with contextlib.suppress(ProcessLookupError):\n"
            "            os.kill(pid, signal.SIGKILL)\n"
            "        kills += 1\n"
            "        if kills % 10 == 0:\n"  # or systemd would take it for a crash loop, and wait
            "            subprocess.run(['systemctl', 'reset-failed', 'virtd.service'])\n"
            "        while main_pid() == pid:\n"
            "            time.sleep(0.005)\n"
            "END",
            timeout=max(300, KILLS * 2),
        )
        info = lab.wait("the last recovery", lambda: (i := lab.info("flood"))["monitor"] == "connected" and i, 20)
        assert (info["pid"], info["state"]) == (pid, "running")
        lab.virtdctl("stop", "flood")
        data = lab.console("flood")
        tally = check(data)
        size = f"{KILLS} kills, {len(data) / 1e6:.1f} MB, {tally.lines} lines"
        print(f"{size}: {tally.lost} lost, {tally.repeated} repeated")
        assert tally.whole, (tally.lost, tally.repeated, tally.broken[:3])
        assert tally.lines > 10_000
    finally:
        lab.sh("rm /etc/virtd/virtd.toml; systemctl restart virtd.service")


def test_what_dies_while_nobody_looks_is_on_record(lab: Lab, guest: str) -> None:
    pid = lab.info(guest)["pid"]
    lab.sh("systemctl stop virtd.service 2>/dev/null")
    lab.sh(f"sleep 0.5; kill -9 {pid}")
    died = time.time()
    lab.sh("sleep 1; systemctl start virtd.service")
    info = lab.wait("its end", lambda: (i := lab.info(guest))["exit"] and i, 20)
    assert (info["state"], info["exit"]["signal"], info["exit"]["cause"]) == ("crashed", "SIGKILL", "killed")
    at = time.mktime(time.strptime(info["exit"]["at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
    assert abs(at - died) < 5, info["exit"]["at"]
    tally = check(lab.console(guest))
    assert tally.whole
    assert tally.lines > 100
    assert lab.slots() == 0
    log = lab.sh("journalctl -u virtd.service -o json --no-pager -n 50")
    assert '"VIRTD_NAME":"web1"' in log
    assert '"VIRTD_CAUSE":"killed"' in log


@pytest.mark.parametrize(
    ("how", "cause", "state"), [("poweroff", "guest-shutdown", "stopped"), ("panic", "panic", "crashed")]
)
@pytest.mark.parametrize("daemon", ["up", "down"])
def test_the_guest_ends_itself(lab: Lab, how: str, cause: str, state: str, daemon: str) -> None:
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    console = Attached(lab, "web1")
    try:
        assert console.ask("hello")
        if daemon == "down":
            lab.sh("systemctl stop virtd.service virtd.socket 2>/dev/null")
        console.type(f"{how}\n")
        lab.wait(
            "the guest's end", lambda: lab.sh(f"test -e /proc/{pid} || echo ended", check=False) == "ended\n", 30
        )
    finally:
        console.close()
    lab.sh("systemctl start virtd.socket virtd.service")
    info = lab.wait("its end on record", lambda: (i := lab.info("web1"))["exit"] and i, 20)
    assert (info["state"], info["exit"]["cause"]) == (state, cause)
    assert info["pid"] is None
    assert lab.slots() == 0
    if how == "panic":
        assert b"Kernel panic" in lab.console("web1")
