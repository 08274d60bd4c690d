# SPDX-License-Identifier: LGPL-2.1-or-later
"""/run and /var/log full: guests run on, what can't be done is said in words that help, the daemon starts."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab, check
from tests.live.tools import KILL, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live


def problems(lab: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return found


@contextlib.contextmanager
def full_run(lab: Lab) -> Iterator[None]:
    """Not a byte is left on the lab's /run."""
    size = lab.sh("findmnt -n -b -o SIZE /run").strip()
    used = int(lab.sh("df --output=used -k /run | tail -n 1"))
    # Made small first: memory that is taken only to be full is taken from everybody on this machine.
    lab.sh(f"mount -o remount,size={used + 64}k /run; cat /dev/zero >/run/filler 2>/dev/null", check=False)
    try:
        yield
    finally:
        lab.sh(f"rm -f /run/filler; mount -o remount,size={size} /run")


def test_run_is_full(lab: Lab) -> None:
    lab.define("web1", cmdline="virtd.rate=200", start=True)
    lab.define("web2")
    lab.wait_lines("web1", 20)
    pid = lab.info("web1")["pid"]
    with full_run(lab):
        refused = lab.virtdctl("start", "web2", check=False)
        assert refused.returncode == 1
        assert "No space left on device" in refused.stderr, refused.stderr
        assert "free some space" in refused.stderr.lower()
        assert (lab.info("web2")["state"], lab.info("web2")["slots"]) == ("stopped", [])
        # What happens by itself happens all the same; that it isn't on record is a problem to be shown.
        lab.virtdctl("suspend", "web1")
        assert lab.info("web1")["state"] == "paused"
        lab.virtdctl("resume", "web1")
        assert any("/run/virtd/qemu/web1.json" in problem["text"] for problem in problems(lab)), problems(lab)
        lab.sh(KILL)
        info = lab.wait("the monitor", lambda: (i := lab.info("web1"))["monitor"] == "connected" and i, 20)
        assert (info["pid"], info["state"]) == (pid, "running")
    lab.virtdctl("start", "web2")
    lab.virtdctl("suspend", "web1")
    lab.virtdctl("resume", "web1")
    assert problems(lab) == []
    tally = check(lab.console("web1"))
    assert tally.whole, (tally.lost, tally.repeated)
    assert lab.sh("ls -a /run/virtd/qemu | grep new", check=False) == "", "no half-written file stays"


@pytest.fixture
def small_log(lab: Lab) -> Iterator[None]:
    """/var/log/virtd has room for sixteen megabytes, in few files."""
    lab.sh("mount -t tmpfs -o size=16M,nr_inodes=40,mode=711 tmpfs /var/log/virtd; systemctl restart virtd.service")
    try:
        yield
    finally:
        lab.undefine_all()
        lab.sh("umount -l /var/log/virtd; systemctl restart virtd.service")


@pytest.mark.usefixtures("small_log")
def test_var_log_is_full(lab: Lab) -> None:
    # Fast enough to fill its pipe's half in less than two seconds.
    lab.define("web1", cmdline="virtd.rate=4000", start=True)
    lab.wait_lines("web1", 100)
    pid = lab.info("web1")["pid"]
    lab.sh("cat /dev/zero >/var/log/virtd/filler 2>/dev/null", check=False)
    shown = lab.wait("the problem", lambda: [p for p in problems(lab) if "can't be written" in p["text"]], 30)
    assert "/var/log/virtd/qemu/web1.console.log" in shown[0]["text"]
    assert "No space left on device" in shown[0]["text"]
    assert "Free some space" in shown[0]["hint"]
    assert lab.info("web1")["problems"] == [{"text": shown[0]["text"], "hint": shown[0]["hint"]}]
    # Whoever looks at its output isn't left to guess why there is none.
    for command, status in (("console", 1), ("log", 0)):
        options = ["--read-only", "--timeout", "1"] if command == "console" else []
        looked = lab.virtdctl(command, *options, "web1", check=False)
        assert looked.returncode == status
        assert "can't be written at present (No space left on device)" in looked.stderr
    # The guest isn't held up, and neither is the daemon or its next start.
    lab.sh(KILL)
    info = lab.wait("the monitor", lambda: (i := lab.info("web1"))["monitor"] == "connected" and i, 20)
    assert (info["pid"], info["state"]) == (pid, "running")
    lab.wait("the problem again", lambda: problems(lab), 30)
    number = check(lab.console("web1")).last
    lab.sh("sleep 3")
    lab.sh("rm /var/log/virtd/filler")
    lab.wait("new lines", lambda: check(lab.console("web1")).last > number, 30)
    lab.wait("the end of the problem", lambda: problems(lab) == [], 30)
    lab.virtdctl("stop", "web1")
    tally = check(lab.console("web1"))
    assert tally.last > number + 1000, "the guest wrote on at its own pace"
    assert tally.lost > 0
    assert tally.repeated == 0
    assert "bytes were dropped" in lab.sh("journalctl -u virtd.service -n 50")


@pytest.mark.usefixtures("small_log")
def test_nothing_starts_without_its_log(lab: Lab) -> None:
    """No room for a new file at all: the start is refused, or goes on without a log, but says so."""
    lab.define("web1")
    with settings(lab, '[log]\nmax_size = "64K"\nbackups = 1\n'):
        lab.sh("cat /dev/zero >/var/log/virtd/filler 2>/dev/null", check=False)
        lab.sh("i=0; while : >/var/log/virtd/file.$i; do i=$((i + 1)); done 2>/dev/null", check=False)
        done = lab.virtdctl("start", "web1", check=False)
        assert done.returncode == 1
        assert "/var/log/virtd/qemu" in done.stderr
        assert "No space left on device" in done.stderr
        assert (lab.info("web1")["state"], lab.info("web1")["slots"]) == ("stopped", [])
        lab.sh("rm /var/log/virtd/file.* /var/log/virtd/filler")
        lab.virtdctl("start", "web1")
