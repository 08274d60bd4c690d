# SPDX-License-Identifier: LGPL-2.1-or-later
"""`virtdctl events` over kills of the daemon: none is missing and none comes twice."""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.live.tools import spawn

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

KILLS = int(os.environ.get("VIRTD_KILLS", "20"))
NAMES = ("web1", "web2", "web3")
# What may follow on a state, each of which is an event.
AFTER = {
    "stopped": {"starting", "stopped"},
    "starting": {"starting", "running", "stopping", "stopped"},
    "running": {"running", "stopping"},
    "stopping": {"stopping", "stopped", "crashed"},
    "crashed": {"starting", "crashed"},
}
# Kills the daemon at random instants, for as long as the work goes on.
KILLER = """
import os, random, signal, subprocess, sys, time
kills = 0
while kills < int(sys.argv[1]):
    time.sleep(random.uniform(0.05, 0.7))
    pid = int(subprocess.run(["systemctl", "show", "-P", "MainPID", "virtd"], capture_output=True).stdout or 0)
    if pid:
        os.kill(pid, signal.SIGKILL)
        kills += 1
"""
WORK = """
while [ -e /run/virtd-killing ]; do
  for name in web1 web2 web3; do virtdctl start $name >/dev/null 2>&1 & done; wait
  for name in web1 web2 web3; do virtdctl stop $name >/dev/null 2>&1 & done; wait
done
"""


def follow(lab: Lab, options: str = "") -> Any:
    """Ends when its standard input does."""
    command = f"virtdctl events --json --daemon-timeout=120 {options} & cat >/dev/null; kill $!"
    return spawn(lab, "timeout", "600", "sh", "-c", command)


def read(follower: Any, until: Any) -> list[dict[str, Any]]:
    """Events, up to and with the first for which `until` holds."""
    found: list[dict[str, Any]] = []
    for line in follower.stdout:
        found.append(json.loads(line))
        if until(found[-1]):
            return found
    raise AssertionError(follower.stderr.read())


def test_none_is_missing_and_none_comes_twice_over_kills(lab: Lab) -> None:
    with follow(lab) as follower:
        (begun,) = read(follower, lambda event: event["change"] == "begun")
        for name in NAMES:
            lab.define(name, memory="64M")
        lab.sh("touch /run/virtd-killing")
        with spawn(lab, "sh", "-c", WORK) as work:
            lab.run("python3", "-c", KILLER, str(KILLS), timeout=600)
            lab.sh("rm /run/virtd-killing")
            work.communicate(timeout=300)
        for name in NAMES:
            lab.virtdctl("stop", name)
        # While nobody is there one is removed; what that comes to is the last event.
        lab.virtdctl("start", "web1")
        unit = "virtd-qemu-web1.service"
        lab.sh(f"systemctl stop virtd.service virtd.socket virtd-root.socket && systemctl kill -s KILL {unit}")
        lab.wait("its end", lambda: lab.sh(f"systemctl show -P SubState {unit}") in ("exited\n", "failed\n"))
        lab.sh("rm /etc/virtd/qemu/web3.toml; systemctl start virtd.socket virtd-root.socket virtd.service")
        lab.virtdctl("wait", "--state", "crashed", "web1")
        lab.define("last")
        seen = read(follower, lambda event: event["name"] == "last")
    numbers = [event["sequence"] for event in seen]
    assert numbers == list(range(begun["sequence"] + 1, numbers[-1] + 1))
    assert not [event for event in seen if event["change"] == "lagged"]
    listed = {item["name"]: item["state"] for item in lab.json("list", "--all")}
    for name in NAMES:
        mine = [event for event in seen if event["name"] == name]
        assert mine[0]["change"] == "added"
        states = [event["state"] for event in mine if event["change"] != "removed"]
        assert all(after in AFTER[before] for before, after in itertools.pairwise(states)), states
        told = [(event["state"], event["reason"], (event["object"] or {}).get("since")) for event in mine]
        assert all(before != after for before, after in itertools.pairwise(told)), told
        assert told[-1][0] == listed.get(name)
    assert [event["change"] for event in seen if event["name"] == "web3"][-1] == "removed"
    assert [event["state"] for event in seen if event["name"] == "web1"][-1] == "crashed"
    # Whoever comes later gets the same.
    with follow(lab, f"--since={begun['sequence']}") as follower:
        assert read(follower, lambda event: event["name"] == "last")[1:] == seen


def test_a_number_of_another_boot_is_refused(lab: Lab) -> None:
    refused = lab.virtdctl("events", "--since", "7", check=False)
    assert refused.returncode != 0
    assert "The events after 7 are no longer on record" in refused.stderr
