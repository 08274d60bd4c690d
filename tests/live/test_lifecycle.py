# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command on a domain in every state: done, done already, or refused with words that help."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab, definition

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.live

DONE, ALREADY, REFUSED = "done", "done already", "refused"

# What each command is in each state. `stop` last in a row of tests: it ends the guest.
EXPECTED = {
    "stopped": {
        "start": DONE, "shutdown": REFUSED, "stop": ALREADY, "kill": REFUSED, "reboot": REFUSED, "suspend": REFUSED,
        "resume": REFUSED, "console": REFUSED, "undefine": DONE,
    },
    "running": {
        "start": ALREADY, "shutdown": DONE, "stop": DONE, "kill": DONE, "reboot": DONE, "suspend": DONE,
        "resume": ALREADY, "undefine": REFUSED,
    },
    "paused": {
        "start": ALREADY, "shutdown": REFUSED, "stop": DONE, "kill": DONE, "reboot": REFUSED, "suspend": ALREADY,
        "resume": DONE, "undefine": REFUSED,
    },
    "crashed": {
        "start": DONE, "shutdown": REFUSED, "stop": ALREADY, "kill": REFUSED, "reboot": REFUSED, "suspend": REFUSED,
        "resume": REFUSED, "console": REFUSED, "undefine": DONE,
    },
}  # fmt: skip


def bring(lab: Lab, state: str) -> None:
    """Have the domain `web1` in that state."""
    lab.virtdctl("define", "-", stdin=definition("web1"))
    now = lab.info("web1")["state"]
    if state in ("running", "paused"):
        if now not in ("running", "paused"):
            lab.forget_log("web1")
            lab.virtdctl("start", "web1")
            lab.wait_ready("web1")
        if now == "paused" and state == "running":
            lab.virtdctl("resume", "web1")
        if state == "paused":
            lab.virtdctl("suspend", "web1")
    elif now != state:
        lab.virtdctl("start", "web1")
        lab.virtdctl(*(("kill", "web1") if state == "crashed" else ("stop", "web1")))
        lab.wait("the end", lambda: lab.info("web1")["state"] in ("stopped", "crashed"))
    assert lab.info("web1")["state"] == state


@pytest.mark.parametrize("state", EXPECTED)
def test_every_command(lab: Lab, state: str) -> None:
    for command, outcome in EXPECTED[state].items():
        bring(lab, state)
        done = lab.virtdctl(command, "web1", check=False)
        said = f"{command} of a {state} one: exit status {done.returncode}, {done.stdout}{done.stderr}"
        if outcome == REFUSED:
            assert done.returncode == 1, said
            assert "web1" in done.stderr, said
            assert state in done.stderr, said
            assert "Hint:" in done.stderr, said
            assert lab.info("web1")["state"] == state, said
        else:
            assert done.returncode == 0, said
        if outcome == ALREADY:
            assert lab.info("web1")["state"] == state, said


def test_names_that_are_not_there(lab: Lab) -> None:
    for command in ("start", "stop", "shutdown", "info", "suspend", "console", "log", "undefine"):
        done = lab.virtdctl(command, "nobody", check=False)
        assert done.returncode == 4, (command, done.stderr)
        assert "no domain nobody" in done.stderr


def test_how_it_ended_and_by_whom(lab: Lab) -> None:
    lab.define("web1")
    cases: list[tuple[str, Callable[[], object], str, str, str | None]] = [
        ("shutdown", lambda: lab.virtdctl("shutdown", "web1"), "shutdown", "stopped", "root"),
        ("stop", lambda: lab.virtdctl("stop", "web1"), "stop", "stopped", "root"),
        ("kill", lambda: lab.virtdctl("kill", "web1"), "killed", "crashed", "root"),
        ("kill -9", lambda: lab.sh(f"kill -9 {lab.info('web1')['pid']}"), "killed", "crashed", None),
        ("kill -TERM", lambda: lab.sh(f"kill {lab.info('web1')['pid']}"), "killed", "crashed", None),
        ("its unit", lambda: lab.sh("systemctl stop virtd-qemu-web1.service"), "host-shutdown", "stopped", None),
    ]
    for what, act, cause, state, by in cases:
        lab.virtdctl("stop", "web1")
        lab.forget_log("web1")
        lab.virtdctl("start", "web1")
        lab.wait_ready("web1")
        act()
        info = lab.wait(f"the end by {what}", lambda: (i := lab.info("web1"))["exit"] and i, 30)
        assert (info["exit"]["cause"], info["state"], info["exit"]["by"]) == (cause, state, by), what
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", info["exit"]["at"])
        assert info["pid"] is None
    assert info["slots"] == []


def test_shutdown_that_the_guest_ignores(lab: Lab) -> None:
    lab.define("deaf", cmdline="virtd.button=ignore", start=True)
    lab.wait_ready("deaf")
    done = lab.virtdctl("shutdown", "--timeout", "3", "deaf", check=False)
    assert done.returncode == 1
    assert "did not shut down within 3 s" in done.stderr
    assert "virtdctl stop deaf" in done.stderr
    info = lab.info("deaf")
    assert info["state"] == "running"
    assert "did not shut down" in info["reason"]
    # What ends it later is told as what it was.
    lab.virtdctl("console", "--timeout", "0", "deaf", stdin="poweroff\n")
    info = lab.wait("the end", lambda: (i := lab.info("deaf"))["exit"] and i)
    assert info["reason"] == "powered off after the shutdown that root asked for had timed out"
    assert (info["exit"]["cause"], info["exit"]["by"]) == ("guest-shutdown", None)


def test_shutdown_goes_on_over_a_restart_of_the_daemon(lab: Lab) -> None:
    lab.define("deaf", cmdline="acpi=off", start=True)
    lab.wait_ready("deaf")
    done = lab.sh(
        "virtdctl shutdown --timeout 6 deaf & client=$!; sleep 1; systemctl restart virtd.service; sleep 1; "
        "virtdctl stop deaf; wait $client; echo exit status $?"
    )
    assert "exit status 0" in done, "it has ended, which is what was asked for"


def test_reboot_keeps_the_process(lab: Lab) -> None:
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    lab.virtdctl("reboot", "web1")
    lab.wait_ready("web1", 2)
    info = lab.info("web1")
    assert (info["pid"], info["state"]) == (pid, "running")
    lab.virtdctl("reboot", "--force", "web1")
    lab.wait_ready("web1", 3)
    assert lab.info("web1")["pid"] == pid
    lab.virtdctl("shutdown", "web1")
    assert lab.info("web1")["exit"]["cause"] == "shutdown"


def test_autostart_once_per_boot(lab: Lab) -> None:
    lab.define("web1")
    lab.virtdctl("autostart", "web1")
    assert lab.info("web1")["autostart"] is True
    assert "autostart = true" in lab.sh("cat /etc/virtd/qemu/web1.toml")
    lab.sh("systemctl restart virtd.service; sleep 1")
    assert lab.info("web1")["state"] == "stopped", "a start of the daemon is no boot"
    # What a boot is like for the daemon: /run is empty.
    lab.sh(
        "systemctl stop virtd.service 2>/dev/null; rm -f /run/virtd/autostarted /var/lib/virtd/autostarted; "
        "systemctl start virtd.service"
    )
    lab.wait("the autostart", lambda: lab.info("web1")["state"] == "running", 20)
    lab.virtdctl("autostart", "--disable", "web1")
    assert lab.info("web1")["autostart"] is False


def test_many_at_once(lab: Lab) -> None:
    """Ten guests started by ten clients at the same time, each with its own PID, unit, id and slots."""
    names = [f"many{number}" for number in range(10)]
    for name in names:
        lab.define(name)
    lab.sh("for n in 0 1 2 3 4 5 6 7 8 9; do virtdctl start many$n & done; wait", timeout=180)
    items = lab.json("list")
    assert [item["state"] for item in items] == ["running"] * 10
    assert len({item["pid"] for item in items}) == 10
    assert len({item["id"] for item in items}) == 10
    assert lab.slots() == 50
    # Two clients start and stop the same one: one at a time is let through, and nobody sees an error.
    lab.sh(
        "set -e; (virtdctl stop many0 & virtdctl stop many0 & wait);"
        " (virtdctl start many0 & virtdctl start many0 & wait)"
    )
    assert lab.info("many0")["state"] == "running"


def test_what_virtdctl_prints(lab: Lab) -> None:
    lab.define("web1", start=True)
    item = json.loads(lab.virtdctl("list", "--json").stdout)[0]
    assert set(item) >= {"name", "driver", "uuid", "state", "reason", "pid", "since", "autostart"}
    info = lab.info("web1")
    assert set(info) >= set(item) | {"unit", "slots", "exit"}
    status = lab.json("status")
    assert set(status) >= {"version", "recovered", "budget", "problems"}
    assert set(status["recovered"]) >= {"objects", "ms"}
    assert status["budget"]["used"] == 5
    assert lab.sh("systemctl is-active virtd-qemu-web1.service") == "active\n"
    assert "1 domain running" in lab.sh("systemctl status virtd.service --no-pager")
    user = lab.sh(f"stat -c %U /proc/{info['pid']}").strip()
    assert user == "vm-web1"
