# SPDX-License-Identifier: LGPL-2.1-or-later
"""The oldest and the newest systemd that virtd runs on: the main job there, and what the oldest can't do."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab, check
from tests.live.tools import KILL, PID1S_OWN, attached

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif("VIRTD_SUITE" in os.environ, reason="VIRTD_SUITE has everything run in one suite"),
]

SYSTEMD = {"bookworm": 252, "forky": 262}


@pytest.fixture(scope="module", params=SYSTEMD)
def suite(request: pytest.FixtureRequest, packages: dict[str, Path]) -> Iterator[Lab]:
    name = f"{request.param}-{os.getpid()}"
    lab = Lab(name)
    try:
        Lab.up(name, "--suite", request.param, "--rpm", str(packages["0.1.0"]))
        version = int(lab.sh("systemctl --version").split()[1])
        assert version >= SYSTEMD[request.param]
        lab.define("web1", cmdline="virtd.rate=500", start=True)
        lab.wait_lines("web1", 50)
        yield lab
    finally:
        lab.down()


def connected(lab: Lab) -> dict[str, object]:
    info: dict[str, object] = lab.wait(
        "the monitor", lambda: (i := lab.info("web1"))["monitor"] == "connected" and i, 30
    )
    return info


def test_the_guest_does_not_notice(suite: Lab) -> None:
    pid = suite.info("web1")["pid"]
    for event in (
        "systemctl restart virtd.service",
        KILL,
        "systemctl daemon-reload",
        "systemctl daemon-reexec",
        KILL,
    ):
        suite.sh(event)
        info = connected(suite)
        assert (info["pid"], info["state"], len(suite.info("web1")["slots"])) == (pid, "running", 5), event
    with attached(suite, "web1") as console:
        assert console.ask("still-here")
    tally = check(suite.console("web1"))
    assert tally.whole, (tally.lost, tally.repeated, tally.broken[:3])
    assert suite.json("status")["problems"] == []


def test_pid_1_reexecutes_itself_while_virtd_starts(suite: Lab) -> None:
    """What PID 1 leaves unanswered then is asked again."""
    pid, since = suite.info("web1")["pid"], suite.sh("date +%s.%N").strip()
    for step in range(20):
        suite.sh(f"systemctl restart virtd.service & sleep {0.1 + step / 50}; systemctl daemon-reexec; wait")
        assert connected(suite)["pid"] == pid
    told = suite.sh(f"journalctl -b -u virtd.service --since @{since} -p warning -o cat").splitlines()
    assert [line for line in told if not PID1S_OWN.search(line)] == []
    assert suite.json("fsck")["differences"] == []


def test_a_daemon_that_dies_at_once_is_no_burden(suite: Lab) -> None:
    """It is started again in the instant of its death, but not over and over again."""
    pid = suite.info("web1")["pid"]
    module = suite.sh("python3 -c 'import virtd.errors as found; print(found.__file__)'").strip()

    def restarts() -> int:
        return int(suite.sh("systemctl show -P NRestarts virtd.service"))

    suite.sh(f"mount --bind /dev/null {module}")
    try:
        before = restarts()
        suite.sh("systemctl kill -s KILL virtd.service")
        suite.wait("a crash loop", lambda: restarts() > before + 15, 60)
        now, at = restarts(), time.monotonic()
        time.sleep(3)
        assert restarts() - now <= (time.monotonic() - at) / 0.1 + 1
    finally:
        suite.sh(f"umount {module}")
    assert connected(suite)["pid"] == pid
    tally = check(suite.console("web1"))
    assert tally.whole, (tally.lost, tally.repeated, tally.broken[:3])


def test_stop_and_start(suite: Lab) -> None:
    """systemd before 254 drops the store when the service is stopped, and with it all but the guest itself."""
    pid = suite.info("web1")["pid"]
    suite.sh("systemctl stop virtd.service 2>/dev/null; sleep 1; systemctl start virtd.service")
    info = connected(suite)
    assert (info["pid"], info["state"]) == (pid, "running")
    old = int(suite.sh("systemctl --version").split()[1]) < 254
    shown = suite.virtdctl("status", check=False)
    if old:
        assert shown.returncode == 1
        for slot in ("stdin", "stdout", "stderr"):
            assert f"qemu/web1/{slot}" in shown.stdout
        assert "older than 254" in shown.stdout
        refused = suite.virtdctl("console", "web1", check=False)
        assert refused.returncode == 1
        assert "takes no input" in refused.stderr
    else:
        assert shown.returncode == 0, shown.stdout
        assert check(suite.console("web1")).whole
    suite.virtdctl("suspend", "web1")
    suite.virtdctl("resume", "web1")
    suite.virtdctl("stop", "web1")
    assert suite.info("web1")["exit"]["cause"] == "stop"
    suite.wait("an empty store", lambda: suite.slots() == 0, 10)
    suite.virtdctl("start", "web1")
    assert suite.json("status")["problems"] == []
    suite.virtdctl("stop", "web1")
