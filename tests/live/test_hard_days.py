# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people's hosts do to a daemon: odd files, cleaned directories, units that others touch. `make hard-days`.

Those marked `hard` take a while and are left out of `make test`.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab, check, definition
from tests.live.tools import KILL, Journal, drop_in
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

UNITS = "virtd.socket virtd-root.socket virtd.service"
STOP, START = f"systemctl stop {UNITS}", f"systemctl start {UNITS}"
UNIT = "virtd-qemu-web1.service"
DIRECTORIES = "qemu network lxc storage"


@pytest.fixture
def web1(lab: Lab) -> Iterator[Lab]:
    """A guest that runs, and afterwards a host on which nothing is wrong."""
    lab.define("web1", cmdline="virtd.rate=100", start=True)
    lab.wait_lines("web1", 10)
    yield lab
    lab.virtdctl("stop", "web1", check=False)
    lab.sh("rm -rf /var/log/virtd/qemu/web1.* /run/virtd/quarantine/*")


def status(lab: Lab) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)
    return value


def nothing_wrong(lab: Lab) -> None:
    lab.wait("a tidy status", lambda: lab.virtdctl("status", check=False).returncode == 0, 20)
    assert lab.json("fsck")["differences"] == []


def version(lab: Lab) -> int:
    """systemd's."""
    return int(lab.sh("systemctl --version").split()[1])


def kept(lab: Lab) -> None:
    """Nothing is wrong after a stop of virtd: before 254 consoles are lost by one, which is said."""
    if version(lab) >= 254:
        nothing_wrong(lab)


def state_of(lab: Lab, name: str = "web1") -> tuple[str, int | None]:
    info = lab.info(name)
    return info["state"], info["pid"]


# Files

NOT_UTF8 = r"$'\xff\xfe'"
FILES = f"""
for d in {DIRECTORIES}; do for base in /etc/virtd:toml /run/virtd:json; do
    dir=${{base%:*}}/$d ext=${{base#*:}}; mkdir -p $dir
    : >$dir/{NOT_UTF8}.$ext
    mkfifo $dir/fifo.$ext; ln -s /dev/zero $dir/zero.$ext; ln -s /dev/ptmx $dir/ptmx.$ext; mkdir $dir/dir.$ext
    truncate -s 10G $dir/holes.$ext 2>/dev/null
    python3 -c 'print(".".join("a" * 50000) + " = 1")' >$dir/dotted.$ext
    python3 -c 'print("a = " + "[" * 100000)' >$dir/deep.$ext
    python3 -c 'print("a = " + "1" * 500000)' >$dir/digits.$ext
    head -c 2M /dev/zero >$dir/large.$ext
done; done
for f in autostarted launched; do rm -f /run/virtd/$f; mkfifo /run/virtd/$f; done
"""
NO_FILES = f"""
for d in {DIRECTORIES}; do for n in fifo zero ptmx dir holes dotted deep digits large {NOT_UTF8}; do
    rm -rf /etc/virtd/$d/$n.toml /run/virtd/$d/$n.json
done; done
rm -rf /run/virtd/quarantine/* /run/virtd/autostarted /run/virtd/launched /etc/virtd/virtd.toml
"""


def test_odd_files_everywhere(web1: Lab) -> None:
    pid = state_of(web1)[1]
    try:
        web1.run("bash", "-c", FILES)
        for again in ("systemctl restart virtd.service", f"{KILL}; sleep 1"):
            web1.sh(again)
            web1.wait("its answer", lambda: web1.virtdctl("list", check=False).returncode == 0, 30)
            assert state_of(web1) == ("running", pid)
            problems = status(web1)["problems"]
            assert len([one for one in problems if "/etc/virtd/" in one["text"]]) >= 4 * 10
            assert all(one["hint"] for one in problems)
        assert web1.run("systemctl", "reload", "virtd.service", check=False).returncode == 1
        web1.sh("rm -f /etc/virtd/virtd.toml; mkfifo /etc/virtd/virtd.toml; systemctl restart virtd.service")
        assert any("virtd.toml" in one["text"] for one in status(web1)["problems"])
        assert web1.sh("systemctl show -P NRestarts virtd.service").strip() in "01", "killed once, by us"
    finally:
        web1.run("bash", "-c", NO_FILES)
        web1.sh("systemctl restart virtd.service")
    nothing_wrong(web1)
    assert state_of(web1) == ("running", pid)


@pytest.mark.hard
def test_two_thousand_definitions_at_once(web1: Lab) -> None:
    text = definition("NAME")
    web1.write("/root/template.toml", text)
    journal = Journal.now(web1)
    try:
        web1.sh(
            "for i in $(seq 2000); do sed s/NAME/new$i/ /root/template.toml >/etc/virtd/qemu/new$i.toml; done; "
            "systemctl reload virtd.service; systemctl is-active virtd.service",
            timeout=300,
        )
        assert len(web1.json("list")) == 2001
        assert not journal.entries("UNIT_RESULT=watchdog")
    finally:
        web1.sh("rm -f /etc/virtd/qemu/new*.toml; systemctl reload virtd.service", timeout=300)
    nothing_wrong(web1)


def test_definitions_that_are_not_roots_alone(web1: Lab) -> None:
    try:
        web1.sh(
            "cd /etc/virtd/qemu; for n in a b; do sed s/web1/$n/ web1.toml | grep -v uuid >$n.toml; done; "
            "chown nobody a.toml; chmod 666 b.toml; systemctl reload virtd.service",
            check=False,
        )
        texts = {one["object"]: one["text"] for one in status(web1)["problems"]}
        assert "belongs to the user" in texts["qemu/a"]
        assert "everybody may write it" in texts["qemu/b"]
        assert {one["name"] for one in web1.json("list")} == {"web1"}
    finally:
        web1.sh("rm -f /etc/virtd/qemu/[ab].toml; systemctl reload virtd.service")
    nothing_wrong(web1)


def test_a_linked_definition_stays_one(lab: Lab) -> None:
    lab.sh("mkdir -p /srv/git")
    lab.write("/srv/git/g.toml", definition("g"))
    try:
        lab.sh(
            "chmod 600 /srv/git/g.toml; ln -s /srv/git/g.toml /etc/virtd/qemu/g.toml; systemctl reload virtd.service"
        )
        assert lab.sh("readlink /etc/virtd/qemu/g.toml; stat -c %a /srv/git/g.toml").split() == [
            "/srv/git/g.toml",
            "600",
        ]
        lab.sh("sed -i s/96M/80M/ /srv/git/g.toml; systemctl reload virtd.service")
        assert lab.info("g")["memory"] == 80 << 20
    finally:
        lab.virtdctl("undefine", "g", check=False)
        lab.sh("rm -rf /srv/git")


# Cleaning


def test_systemctl_clean_takes_nothing(web1: Lab) -> None:
    pid = state_of(web1)[1]
    web1.define("off")
    web1.virtdctl("autostart", "off")
    what = "find /etc/virtd /var/lib/virtd /var/log/virtd /run/virtd ! -name '*.sock' -printf '%p %m %u\\n' | sort"
    web1.sh(STOP)
    before = web1.sh(what)
    for kind in ("state", "runtime", "logs", "cache", "configuration"):
        web1.sh(f"systemctl clean --what={kind} virtd.service", check=False)
    assert web1.sh(what) == before
    web1.sh(START)
    assert state_of(web1) == ("running", pid)
    kept(web1)


def test_a_runtime_directory_that_is_gone(web1: Lab) -> None:
    """All comes back with its modes, and nothing is started that was stopped on purpose."""
    pid = state_of(web1)[1]
    web1.define("off")
    web1.virtdctl("autostart", "off")
    modes = "stat -c '%n %a' /run/virtd /run/virtd/{qemu,network,lxc,storage,fifos,quarantine}"
    before = web1.run("bash", "-c", modes).stdout
    web1.sh(f"{STOP}; rm -rf /run/virtd; {START}")
    web1.wait("the guest", lambda: state_of(web1) == ("running", pid), 20)
    assert web1.run("bash", "-c", modes).stdout == before
    web1.sh("sleep 1")
    assert state_of(web1, "off") == ("stopped", None)


def test_a_runtime_directory_that_goes_while_virtd_runs(web1: Lab) -> None:
    """It is said, with what helps, and the guest runs on; what its QEMU can't be asked any more is said, too."""
    pid = state_of(web1)[1]
    web1.sh("rm -rf /run/virtd")
    refused = web1.virtdctl("status", check=False)
    assert refused.returncode != 0
    assert "somebody has removed /run/virtd" in refused.stderr
    web1.sh(refused.stderr.rpartition(": ")[2])
    web1.wait("the guest", lambda: state_of(web1) == ("running", pid), 20)
    (problem,) = web1.wait("the problem", lambda: status(web1)["problems"], 20)
    assert "its directory /run/virtd/qemu/web1 was removed" in problem["text"]
    assert "virtdctl stop web1" in problem["hint"]
    refused = web1.virtdctl("suspend", "web1", check=False)
    assert "/run/virtd/qemu/web1 was removed" in refused.stderr
    assert check(web1.console("web1")).whole
    web1.virtdctl("stop", "web1")
    web1.virtdctl("start", "web1")
    nothing_wrong(web1)


def test_a_qemu_that_answers_late(web1: Lab) -> None:
    """Whatever becomes of what it was asked for, the state is the real one."""
    pid = state_of(web1)[1]
    for restart in ("", "systemctl restart virtd.service; sleep 6;"):
        asked = web1.sh(f"kill -STOP {pid}; virtdctl suspend web1 2>&1; {restart} kill -CONT {pid}", check=False)
        assert "didn't answer" in asked
        web1.wait("its monitor", lambda: web1.info("web1")["monitor"] == "connected", 60)
        nothing_wrong(web1)
        if state_of(web1)[0] != "running":
            web1.virtdctl("resume", "web1")
        before = check(web1.console("web1")).lines
        web1.wait("more lines", lambda before=before: check(web1.console("web1")).lines > before, 20)


# Units that others touch


def test_nobody_restarts_a_guests_unit(web1: Lab) -> None:
    pid = state_of(web1)[1]
    for verb in ("restart", "try-restart", "reload-or-restart", "start"):
        done = web1.run("systemctl", verb, UNIT, check=False)
        assert done.returncode != 0 or verb == "start"
    for unit in ("virtd.slice", "virtd-qemu.slice"):
        assert web1.run("systemctl", "restart", unit, check=False).returncode != 0
    assert state_of(web1) == ("running", pid)
    assert web1.sh("systemctl list-units --all --plain --no-legend 'virtd_start*'") == ""
    nothing_wrong(web1)


def test_a_stop_while_virtd_is_away_has_its_time(web1: Lab) -> None:
    web1.sh(f"{STOP}; systemctl stop {UNIT}")
    stopped = float(web1.sh("date +%s.%N"))
    web1.sh(f"sleep 5; {START}")
    info = web1.wait("its end", lambda: (i := web1.info("web1"))["exit"] and i, 20)
    assert info["state"] == "stopped"
    # What QEMU said of it is in a pipe that systemd before 254 doesn't keep.
    assert info["exit"]["cause"] == ("host-shutdown" if version(web1) >= 254 else "unknown")
    assert float(web1.sh(f"date -d {info['exit']['at']} +%s.%N")) < stopped + 1


@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
def test_an_exit_status_that_systemd_has_forgotten(web1: Lab, *, away: bool) -> None:
    """Where PID 1 has lost it, see witness._known, the unit is active, and only who saw the end may know."""
    pid = state_of(web1)[1]
    over = f"while test $(systemctl show -P MainPID {UNIT}) = {pid}; do sleep 0.05; done"
    kill = f"kill -9 {pid}; {over}; systemctl is-active {UNIT}; systemctl reset-failed {UNIT} || :"
    became = web1.sh(f"{STOP}; {kill}; {START}" if away else kill).strip()
    info = web1.wait("its end", lambda: (i := web1.info("web1"))["exit"] and i, 20)
    known = ("crashed", "SIGKILL"), ("crashed", None)
    assert (info["state"], info["exit"]["signal"]) in (known if became == "active" else known[:1])
    nothing_wrong(web1)


def test_nothing_is_told_too_early(web1: Lab) -> None:
    pid = state_of(web1)[1]
    for _ in range(3):
        done = web1.sh(
            f"{STOP}; rm /run/virtd/qemu/web1.json; {START}; virtdctl list --json; "
            "virtdctl wait --timeout 1 web1 >/dev/null 2>&1; waited=$?; echo; echo $waited"
        )
        listing, waited = done.rstrip().rpartition("\n")[::2]
        (item,) = json.loads(listing)
        assert (item["state"], item["pid"], waited) == ("running", pid, "1")
    kept(web1)


# virtd's own unit


def test_masked(web1: Lab) -> None:
    pid = state_of(web1)[1]
    journal = Journal.now(web1)
    try:
        web1.sh("systemctl mask virtd.service")
        (entry,) = journal.await_entries(f"MESSAGE_ID={Message.STORE_AT_RISK}")
        assert "masked" in entry["MESSAGE"]
        (problem,) = web1.wait("the problem", lambda: status(web1)["problems"], 20)
        assert "systemctl unmask virtd.service" in problem["hint"]
    finally:
        web1.sh("systemctl unmask virtd.service")
    web1.wait("the slots", lambda: web1.slots() == 5, 20)
    nothing_wrong(web1)
    if version(web1) < 254:
        return
    web1.sh(f"{STOP}; {START}")
    assert state_of(web1) == ("running", pid)
    before = check(web1.console("web1")).lines
    web1.wait("more lines", lambda: check(web1.console("web1")).lines > before, 20)
    assert check(web1.console("web1")).whole


def test_fewer_open_files_than_are_kept(web1: Lab) -> None:
    web1.define("web2")
    file = "/run/systemd/system/virtd.service.d/few.conf"
    try:
        web1.sh(f"mkdir -p $(dirname {file}); printf '[Service]\\nLimitNOFILE=7\\n' >{file}; systemctl daemon-reload")
        (problem,) = web1.wait("the problem", lambda: status(web1)["problems"], 20)
        assert "LimitNOFILE= of virtd.service is 7" in problem["text"]
        done = web1.virtdctl("start", "web2", check=False)
        assert done.returncode == 1
        assert "LimitNOFILE" in done.stderr
    finally:
        web1.sh(f"rm -r $(dirname {file}); systemctl daemon-reload")
    nothing_wrong(web1)


LAUNCHERS = {
    "exits": "printf '#!/bin/sh\nexit 1\n' >virtd; chmod 755 virtd",
    "ends well": "printf '#!/bin/sh\nexit 0\n' >virtd; chmod 755 virtd",
    "can't be executed": "echo x >virtd; chmod 755 virtd",
    "is missing": ":",
}
SETTINGS = ("LimitNOFILE=3", "LimitNOFILE=4", "LimitNOFILE=10", "SystemCallFilter=~openat")
WATCHED = 5  # seconds


def held_back(lab: Lab, what: str) -> None:
    """virtd is killed, can't be started again, and isn't tried more than some twice a second."""
    restarts = "systemctl show -P NRestarts virtd.service"
    lab.sh(KILL)
    lab.wait("its restarts", lambda: int(lab.sh(restarts)) > 22, 90)  # RestartSteps= of virtd.service, and some
    before, tried = int(lab.sh(restarts)), time.monotonic()
    time.sleep(WATCHED)
    more = int(lab.sh(restarts)) - before
    assert more <= 3 * (time.monotonic() - tried), f"{what}: {more} restarts in {WATCHED} s"


def is_well_again(lab: Lab, pid: int | None) -> None:
    lab.wait("virtd", lambda: lab.virtdctl("list", check=False).returncode == 0, 30)
    assert state_of(lab) == ("running", pid)
    nothing_wrong(lab)


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.hard] * (how != "exits")) for how in LAUNCHERS])
def test_a_virtd_that_cannot_start(web1: Lab, how: str) -> None:
    pid = state_of(web1)[1]
    try:
        web1.sh(f"cd /usr/libexec; mv virtd virtd.away; {LAUNCHERS[how]}")
        held_back(web1, how)
    finally:
        web1.sh("mv /usr/libexec/virtd.away /usr/libexec/virtd")
    is_well_again(web1, pid)
    assert web1.slots() == 5
    before = check(web1.console("web1")).lines
    web1.wait("more lines", lambda: check(web1.console("web1")).lines > before, 20)
    assert check(web1.console("web1")).whole


@pytest.mark.hard
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_keeps_virtd_from_starting(web1: Lab, setting: str) -> None:
    pid = state_of(web1)[1]
    file = "/run/systemd/system/virtd.service.d/odd.conf"
    try:
        web1.sh(f"mkdir -p $(dirname {file}); printf '[Service]\n{setting}\n' >{file}; systemctl daemon-reload")
        held_back(web1, setting)
    finally:
        web1.sh(f"rm -r $(dirname {file}); systemctl daemon-reload")
    is_well_again(web1, pid)


@pytest.mark.hard
def test_a_crash_after_a_good_while_is_made_up_for_at_once(web1: Lab) -> None:
    """None of that holds back the first restart."""
    web1.sh(KILL)
    is_well_again(web1, state_of(web1)[1])
    if version(web1) >= 254:
        web1.wait(
            "systemd to start over with counting",
            # In an order of systemd's own.
            lambda: (
                set(web1.sh("systemctl show -P NRestarts -P RestartUSecNext virtd.service").split()) == {"0", "1us"}
            ),
            30,
        )
        web1.sh(KILL)
        web1.wait("virtd", lambda: web1.virtdctl("list", check=False).returncode == 0, 30)
        assert web1.sh("systemctl show -P NRestarts virtd.service").strip() == "1"
    else:
        web1.sh("sleep 3.5")
        assert web1.sh("find /run/virtd/failed -newermt '-3 seconds'") == "", "what the next failure looks at"


@pytest.mark.hard
def test_no_alarm_on_a_tidy_host(web1: Lab) -> None:
    journal = Journal.now(web1)
    for _ in range(3):
        web1.sh("systemctl restart virtd.service; systemctl daemon-reload; systemctl reload virtd.service")
        web1.virtdctl("suspend", "web1")
        web1.virtdctl("resume", "web1")
        web1.virtdctl("stop", "web1")
        web1.virtdctl("start", "web1")
    nothing_wrong(web1)
    loud = [entry for entry in journal.entries("SYSLOG_IDENTIFIER=virtd") if int(entry["PRIORITY"]) <= 4]
    assert loud == []


def test_a_small_store_is_told_as_before(web1: Lab) -> None:
    with drop_in(web1, "[Service]\nFileDescriptorStoreMax=12\n"):
        assert status(web1)["problems"] == []
