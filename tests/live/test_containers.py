# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers under real LXC: their life, what survives what, their consoles, and what their root can't do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import LAB, Lab, check
from tests.live.conftest import SUITE
from tests.live.test_dbus import WATCHER
from tests.live.tools import spawn
from tests.proof.survival import containers as small

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.live

FORGETS = SUITE == "bookworm"  # systemd 252: its FD store is empty once the service has been stopped
MINI = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'  # what small.ROOT needs besides
ROOT = "/var/lib/virtd/containers/base"
FIRST = 0x60000000
# As tests/lab/guest/console.c prints them, so that the checker knows each of them by heart.
LINES = (
    'awk \'BEGIN { a = "abcdefghijklmnopqrstuvwxyz"; a = a a a a; '
    'for (n = 1; n <= COUNT; n++) printf "line %010d %s .\\n", n, substr(a, n % 26 + 1, 60) }\''
)


@pytest.fixture(scope="module")
def root(booted: Lab) -> str:
    """A Debian that belongs to the container's own root."""
    booted.sh(f"""set -e
        mkdir -p {ROOT} && cd {ROOT} && test -e usr || tar -xf /usr/share/virtd-lab/debian.tar.xz --exclude='./dev/*'
        python3 - <<'END'
import os
for directory, names, files in os.walk({ROOT!r}):
    for name in [".", *files, *(name for name in names if os.path.islink(os.path.join(directory, name)))]:
        path = os.path.join(directory, name)
        status = os.lstat(path)
        if status.st_uid < 65536:
            os.lchown(path, status.st_uid + {FIRST}, status.st_gid + {FIRST})
            if not os.path.islink(path):
                os.chmod(path, status.st_mode & 0o7777)
END""", timeout=300)  # fmt: skip
    return ROOT


@pytest.fixture
def containers(lab: Lab, root: str) -> Iterator[Containers]:
    yield Containers(lab, root)
    for item in lab.json("container", "list"):
        lab.virtdctl("container", "stop", item["name"], check=False)
        lab.virtdctl("container", "undefine", item["name"], check=False)
    assert lab.sh("systemctl list-units --all --plain --no-legend 'virtd-lxc-*.service'") == ""
    assert lab.sh("ls /run/virtd/lxc") == ""
    lab.sh("rm -f /var/log/virtd/lxc/*")


class Containers:
    def __init__(self, lab: Lab, root: str) -> None:
        self.lab = lab
        self.root = root

    def define(self, name: str, more: str = "", *, start: bool = True, root: str = "") -> None:
        text = f'name = "{name}"\nrootfs = "{root or self.root}"\n{more}'
        self.lab.virtdctl("container", "define", "-", stdin=text)
        if start:
            self.lab.virtdctl("container", "start", name)

    def info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.lab.json("container", "info", name)
        return found

    def state(self, name: str) -> str:
        return str(self.info(name)["state"])

    def log(self, name: str) -> bytes:
        argv = [LAB, "exec", self.lab.name, "--", "virtdctl", "container", "log", name]
        return subprocess.run(argv, check=True, capture_output=True, timeout=120).stdout

    def said(self, name: str, word: bytes, count: int = 1) -> None:
        self.lab.wait(f"{word!r} on {name}'s console", lambda: self.log(name).count(word) >= count, 60)

    def ended(self, name: str) -> dict[str, Any]:
        self.lab.wait(f"{name}'s end", lambda: self.state(name) in ("stopped", "crashed"), 60)
        return self.info(name)

    def refused(self, name: str, more: str = "", *, root: str = "") -> str:
        """What start says of a definition that can't be started."""
        self.define(name, more, start=False, root=root)
        done = self.lab.virtdctl("container", "start", name, check=False)
        assert done.returncode == 1
        assert self.state(name) == "stopped"
        return done.stderr


# As nobody, to the abstract socket on which LXC takes commands; it keeps 3,000 connections until it is told to end.
_CROWD = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
name = next(line.split()[-1] for line in open("/proc/net/unix") if "/lxc/crowded/" in line)
crowd = []
while len(crowd) < 3000:
    one = socket.socket(socket.AF_UNIX)
    one.connect("\\0" + name[1:])
    crowd.append(one)
print("crowded", flush=True)
sys.stdin.read()
"""


def test_lxc_takes_as_many_connections_as_anybody_makes(containers: Containers) -> None:
    """It ends, with its container, when it has no descriptor left; the container's own limit is the usual one."""
    lab = containers.lab
    containers.define("crowded", 'command = ["/bin/sh", "-c", "echo limit $(ulimit -Sn).; exec sleep 1000"]\n')
    containers.said("crowded", b"limit 1024.")
    crowd = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))" + _CROWD
    with spawn(lab, "python3", "-c", crowd) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "crowded\n"
        lab.virtdctl("container", "exec", "crowded", "true")
        client.communicate("", timeout=60)
    assert containers.state("crowded") == "running"


def test_a_full_systemd_boots_to_its_login_prompt_and_shuts_down(containers: Containers) -> None:
    """And it reboots from inside and from outside as the same object, and is frozen and thawed."""
    lab = containers.lab
    containers.define("deb", '[limits]\nmemory = "300M"\npids = 300\ncpus = 1.5\n')
    containers.said("deb", b"login:")
    info = containers.info("deb")
    assert info["ids"] == [FIRST, 65536]
    shown = lab.sh("systemctl show virtd-lxc-deb.service -p MemoryMax,TasksMax,CPUQuotaPerSecUSec")
    assert set(shown.split()) == {f"MemoryMax={300 << 20}", "TasksMax=300", "CPUQuotaPerSecUSec=1.500000s"}
    lab.sh(f"test $(readlink /proc/{info['pid']}/exe) = /usr/lib/systemd/systemd")

    bus = "org.virtd1 /org/virtd1/container/deb org.virtd1.Container"
    assert lab.sh(f"busctl call {bus} Freeze").strip() == "b true"
    assert lab.sh(f"busctl get-property {bus} State Pid").split() == ["s", '"paused"', "u", str(info["pid"])]
    assert containers.state("deb") == "paused"
    lab.sh("systemctl restart virtd")
    assert (containers.state("deb"), containers.info("deb")["pid"]) == ("paused", info["pid"])
    lab.virtdctl("container", "thaw", "deb")
    assert containers.state("deb") == "running"

    unit = info["unit"], lab.sh("systemctl show -P MainPID virtd-lxc-deb.service")
    lab.virtdctl("container", "reboot", "deb")
    again = containers.info("deb")
    assert (again["uuid"], again["unit"]) == (info["uuid"], info["unit"])
    assert again["pid"] != info["pid"]
    containers.said("deb", b"login:", 2)
    lab.virtdctl("container", "freeze", "deb")
    assert containers.state("deb") == "paused"
    lab.virtdctl("container", "thaw", "deb")
    lab.sh(f"kill -s RTMIN+5 {again['pid']}")
    lab.wait("another first process", lambda: containers.info("deb")["pid"] not in (None, again["pid"]))
    containers.said("deb", b"login:", 3)
    assert unit == (containers.info("deb")["unit"], lab.sh("systemctl show -P MainPID virtd-lxc-deb.service"))

    lab.virtdctl("container", "shutdown", "deb")
    end = containers.info("deb")
    assert (end["state"], end["exit"]["cause"], end["exit"]["by"]) == ("stopped", "shutdown", "root")
    assert b"Reached target" in containers.log("deb").split(b"login:")[-1]
    assert lab.slots() == 0


def test_a_login_on_the_console(containers: Containers) -> None:
    containers.define("deb")
    containers.said("deb", b"login:")
    typed = "root\necho the answer is $((6 * 7)) on $(tty)\nexit\n"
    lab = containers.lab
    lab.virtdctl("container", "console", "--timeout", "1", "deb", stdin="root\n")
    containers.said("deb", b"#")
    lab.virtdctl("container", "console", "--timeout", "2", "deb", stdin=typed.partition("\n")[2])
    containers.said("deb", b"the answer is 42 on /dev/console")


def test_how_it_ended_is_on_record(containers: Containers) -> None:
    """By itself, with a status, by a signal, by us, and all of it also while nobody was looking."""
    lab = containers.lab

    def command(words: str) -> str:
        return f'command = ["sh", "-c", "{words}"]\n'

    containers.define("good", command("exit 0"))
    containers.define("bad", command("sleep 0.2; exit 7"))
    containers.define("away", command("sleep 2; exit 9"))
    containers.define("killed", command("sleep 600"))
    containers.define("monitor", command("sleep 600"))
    lab.sh("systemctl stop virtd.socket virtd.service")
    # Not a PID of 0, which would be this test's own process group.
    monitor = int(lab.sh("systemctl show -P MainPID virtd-lxc-monitor.service"))
    assert monitor > 1
    lab.sh(f"kill -9 {monitor}; sleep 2.5")
    lab.sh("systemctl start virtd.socket virtd.service")
    seen = {name: containers.ended(name) for name in ("good", "bad", "away", "monitor")}
    assert {name: (item["state"], item["exit"]["cause"], item["exit"]["code"]) for name, item in seen.items()} == {
        "good": ("stopped", "exited", 0),
        "bad": ("crashed", "failed", 7),
        "away": ("crashed", "failed", 9),
        "monitor": ("crashed", "killed", None),
    }
    assert seen["monitor"]["exit"]["signal"] == "SIGKILL"
    # 252 has problems to tell: it has dropped the pipes of what runs on.
    since = json.loads(lab.virtdctl("status", "--json", check=not FORGETS).stdout)["since"]
    assert seen["away"]["exit"]["at"] < since
    if FORGETS:  # with LXC's log it has lost what tells of a signal
        lab.virtdctl("container", "stop", "killed")
        lab.virtdctl("container", "start", "killed")
    lab.virtdctl("container", "kill", "-s", "KILL", "killed")
    end = containers.ended("killed")
    assert (end["exit"]["cause"], end["exit"]["signal"], end["exit"]["by"]) == ("killed", "SIGKILL", "root")
    assert lab.sh("pgrep -x sleep", check=False) == ""


def test_no_byte_of_a_console_is_lost(containers: Containers) -> None:
    """A flood on a terminal, and the daemon killed again and again while it lasts."""
    lab = containers.lab
    count = 100000
    # Into a file first: what it costs to make the lines must not be what limits the flood. Then in pieces, so that it
    # lasts for some kills however fast the machine is.
    lines = LINES.replace("COUNT", str(count))
    pieces = (
        "for n in 0 1 2 3 4 5 6 7 8 9; do tail -n +$((n * 10000 + 1)) /tmp/lines | head -n 10000; sleep 0.5; done"
    )
    containers.define("flood", f"command = {json.dumps(['sh', '-c', f'{lines} >/tmp/lines; {pieces}'])}\n")
    kills = 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and containers.state("flood") in ("starting", "running", "stopping"):
        lab.sh("sleep 0.2; systemctl kill -s KILL virtd.service", check=False)
        kills += 1
        lab.wait("the daemon", lambda: lab.virtdctl("status", check=False).returncode != 3)
    containers.ended("flood")
    tally = check(containers.log("flood"))
    assert kills >= 3, containers.info("flood")
    assert (tally.lines, tally.lost, tally.repeated, tally.broken) == (count, 0, 0, [])


def test_a_command_without_a_terminal(containers: Containers) -> None:
    """Its standard input is a pipe, and what it writes comes out as it is."""
    lab = containers.lab
    containers.define(
        "pipe", 'terminal = false\ncommand = ["sh", "-c", "tty; read a; echo got $a; echo wrong >&2"]\n'
    )
    lab.virtdctl("container", "console", "--timeout", "1", "pipe", stdin="hello\n")
    assert containers.ended("pipe")["exit"]["cause"] == "exited"
    assert containers.log("pipe") == b"not a tty\ngot hello\nwrong\n"


def test_what_it_survives(containers: Containers) -> None:
    """Restart, kill -9, a reload of systemd, the package's upgrade: same first process, same console."""
    lab = containers.lab
    containers.define("deb")
    containers.said("deb", b"login:")
    pid = containers.info("deb")["pid"]
    for event in (
        "systemctl restart virtd",
        "systemctl kill -s KILL virtd",
        *([] if FORGETS else ["systemctl stop virtd; systemctl start virtd"]),
        "systemctl daemon-reexec",
    ):
        lab.sh(event)
        lab.wait("the daemon", lambda: lab.virtdctl("status", check=False).returncode != 3)
        assert (containers.state("deb"), containers.info("deb")["pid"]) == ("running", pid), event
    lab.virtdctl("container", "console", "--timeout", "1", "deb", stdin="root\n")
    containers.said("deb", b"#")
    assert containers.info("deb")["pid"] == pid


@pytest.mark.skipif(not FORGETS, reason="systemd from 254 on keeps the store")
def test_a_stop_of_the_service_costs_the_console_only(containers: Containers) -> None:
    """On systemd 252, and `virtdctl status` says so: what runs in it runs on, and is obeyed and started again."""
    lab = containers.lab
    containers.define("deb")
    talks = "while :; do echo still here; sleep 0.1; done"
    containers.define("talks", f"command = {json.dumps(['sh', '-c', talks])}\n")
    containers.said("deb", b"login:")
    pid = containers.info("deb")["pid"]
    lab.sh("systemctl stop virtd.socket virtd.service; systemctl start virtd.socket virtd.service")
    lab.wait("the daemon", lambda: lab.virtdctl("status", check=False).returncode != 3)
    assert (containers.state("deb"), containers.info("deb")["pid"]) == ("running", pid)
    # Its terminal isn't hung up, though nobody reads it.
    lab.sh("sleep 1")
    assert containers.state("talks") == "running"
    told = lab.virtdctl("status", check=False)
    assert told.returncode == 1
    assert "older than 254" in told.stdout
    assert "lxc/deb/stdin" in told.stdout
    refused = lab.virtdctl("container", "console", "deb", check=False)
    assert "takes no input" in refused.stderr
    assert lab.virtdctl("container", "exec", "deb", "--", "echo", "well").stdout == "well\n"
    lab.virtdctl("container", "shutdown", "deb")
    assert containers.info("deb")["exit"]["cause"] == "shutdown"
    lab.virtdctl("container", "stop", "talks")
    count = containers.log("deb").count(b"login:")
    lab.virtdctl("container", "start", "deb")
    containers.said("deb", b"login:", count + 1)
    assert lab.json("status")["problems"] == []


def test_an_upgrade_of_the_package(containers: Containers, packages: dict[str, Path]) -> None:
    """And the way back, while a full systemd in it writes to its console: same process, same addresses, each byte."""
    lab = containers.lab
    for version, path in packages.items():
        lab.copy(path, f"/root/virtd-{version}.rpm")
    lab.virtdctl("network", "define", "default")
    try:
        containers.define("deb", '[[nic]]\nnetwork = "default"\n')
        containers.said("deb", b"login:")
        slow = f'{LINES.replace("COUNT", "1000000")} | while read -r line; do echo "$line"; sleep 0.01; done'
        inside = ("container", "exec", "deb", "--")
        lab.virtdctl(*inside, "ip", "address", "add", "192.0.2.7/24", "dev", "eth0")
        lab.virtdctl(*inside, "systemd-run", "-q", "--unit=lines", "sh", "-c", f"(echo; {slow}) >/dev/console")
        before = lab.wait("lines", lambda: check(containers.log("deb")).lines > 50 and containers.info("deb"), 60)
        for version, options in (("0.1.1", ""), ("0.1.0", "--oldpackage")):
            last = check(containers.log("deb")).last
            lab.sh(f"rpm -U {options} /root/virtd-{version}.rpm")
            assert lab.json("status")["version"] == version
            info = containers.info("deb")
            assert (info["state"], info["pid"]) == ("running", before["pid"])
            assert set(before["addresses"]) <= set(info["addresses"])
            assert "192.0.2.7" in info["addresses"]
            lab.wait("more lines", lambda last=last: check(containers.log("deb")).last > last + 50, 60)
        lab.virtdctl(*inside, "systemctl", "stop", "lines")
        tally = check(containers.log("deb"))
        assert (tally.first, tally.lost, tally.repeated, tally.broken) == (1, 0, 0, [])
    finally:
        lab.virtdctl("container", "stop", "deb", check=False)
        lab.virtdctl("network", "stop", "--force", "default", check=False)
        lab.virtdctl("network", "undefine", "default", check=False)


LOOPS = """set -e
test -e /dev/loop-control || mknod /dev/loop-control c 10 237
for number in 0 1 2 3 4 5 6 7; do test -e /dev/loop$number || mknod /dev/loop$number b 7 $number; done
"""
VOLUME = f'name = "vol"\nrootfs = {{ pool = "roots", volume = "one" }}\ncommand = ["/steady", "20"]\n{MINI}'


def with_volume(lab: Lab) -> None:
    """A volume, still without a file system, and in /srv/image what VOLUME needs in one."""
    make = small.MAKE.replace(small.ROOT, "/srv/image").replace(f"chown -hR {small.FIRST}:{small.FIRST} .", "")
    lab.run("sh", "-c", make, stdin=small.PROGRAM)
    lab.sh(f"{LOOPS}mkdir -p /srv/volumes")
    lab.virtdctl("pool", "define", "-", stdin='name = "roots"\ntype = "directory"\npath = "/srv/volumes"\n')
    lab.virtdctl("pool", "start", "roots", check=False)
    lab.virtdctl("volume", "create", "roots", "one", "32M")


def without_volume(lab: Lab) -> None:
    lab.virtdctl("container", "undefine", "vol", check=False)
    lab.virtdctl("volume", "delete", "roots", "one", check=False)
    lab.virtdctl("pool", "stop", "roots", check=False)
    lab.virtdctl("pool", "undefine", "roots", check=False)
    lab.sh("rm -rf /srv/volumes /srv/image")


# Groups come and go in it all the time: a command runs in a unit of its own, and then the next.
CHURN = "while :; do systemd-run -q --wait true && echo >>/run/churned; done"


@pytest.mark.skipif(FORGETS, reason="systemd 252 has no soft reboot")
def test_it_lives_through_a_soft_reboot(containers: Containers) -> None:
    """All processes of a full systemd, its console, its address; not a byte of one that writes all the while; and the
    mount of a volume that is a root.
    """
    lab = containers.lab
    lab.virtdctl("network", "define", "default")
    names = ("deb", "flood", "vol")
    try:
        with_volume(lab)
        lab.sh("mkfs.ext4 -q -F -d /srv/image /srv/volumes/one")
        lab.virtdctl("container", "define", "-", stdin=VOLUME)
        lab.virtdctl("container", "start", "vol")
        containers.define("deb", '[[nic]]\nnetwork = "default"\n')
        slow = f'{LINES.replace("COUNT", "1000000")} | while read -r line; do echo "$line"; sleep 0.01; done'
        containers.define("flood", f"command = {json.dumps(['sh', '-c', slow])}\n")
        containers.said("deb", b"login:")
        lab.virtdctl("container", "exec", "deb", "--", "systemd-run", "-q", "--unit=churn", "sh", "-c", CHURN)
        lab.virtdctl("container", "exec", "deb", "--", "ip", "address", "add", "192.0.2.7/24", "dev", "eth0")
        lab.wait(
            "churn",
            lambda: (
                lab.virtdctl("container", "exec", "deb", "--", "test", "-s", "/run/churned", check=False).returncode
                == 0
            ),
        )
        before = {name: containers.info(name) for name in names}
        main = lab.virtdctl("container", "exec", "deb", "--", "systemctl", "show", "-P", "MainPID", "churn").stdout
        lab.soft_reboot()
        after = {name: containers.info(name) for name in names}
        for name, info in after.items():
            assert (info["state"], info["pid"]) == ("running", before[name]["pid"]), info
        assert "192.0.2.7" in after["deb"]["addresses"]
        assert set(before["deb"]["addresses"]) <= set(after["deb"]["addresses"])
        now = lab.virtdctl("container", "exec", "deb", "--", "systemctl", "show", "-P", "MainPID", "churn").stdout
        assert now == main != "0\n"
        failed = lab.virtdctl("container", "exec", "deb", "--", "systemctl", "list-units", "--failed", "--no-legend")
        assert failed.stdout == ""
        last = check(containers.log("flood")).last
        lab.wait("more lines", lambda: check(containers.log("flood")).last > last + 50, 60)
        tally = check(containers.log("flood"))
        assert (tally.first, tally.lost, tally.repeated, tally.broken) == (1, 0, 0, [])
        lab.virtdctl("container", "console", "--timeout", "1", "deb", stdin="root\n")
        containers.said("deb", b"#")
        assert lab.json("status")["problems"] == []
        last = check(containers.log("vol")).last
        lab.wait("more of the volume's", lambda: check(containers.log("vol")).last > last, 60)
        assert lab.sh("findmnt -n -o FSTYPE /run/virtd/lxc/.roots/vol").strip() == "ext4"
        lab.virtdctl("container", "stop", "vol")
        assert lab.sh("findmnt -n /run/virtd/lxc/.roots/vol; losetup -j /srv/volumes/one", check=False) == ""
    finally:
        for name in names:
            lab.virtdctl("container", "stop", name, check=False)
        without_volume(lab)
        lab.virtdctl("network", "stop", "--force", "default", check=False)
        lab.virtdctl("network", "undefine", "default", check=False)


def test_the_shutdown_of_its_unit_asks_it(containers: Containers) -> None:
    """As the host's does, and with the daemon away."""
    lab = containers.lab
    containers.define("deb")
    containers.said("deb", b"login:")
    # Frozen, too: it was waited for a minute, and killed.
    lab.virtdctl("container", "freeze", "deb")
    lab.sh("systemctl stop virtd.socket virtd.service; systemctl stop virtd-lxc-deb.service")
    lab.sh("systemctl start virtd.socket virtd.service")
    end = containers.ended("deb")
    assert (end["state"], end["exit"]["cause"]) == ("stopped", "host-shutdown")
    assert FORGETS or b"Reached target" in containers.log("deb").split(b"login:")[-1]


def test_bad_input_is_refused_before_anything_starts(containers: Containers) -> None:
    lab = containers.lab
    lab.sh("mkdir -p /srv/empty; touch /srv/file")
    assert "no such directory: /srv/none" in containers.refused("a", root="/srv/none")
    assert "expected a directory" in containers.refused("b", root="/srv/file")
    assert "has no usr, bin or etc" in containers.refused("c", root="/srv/empty")
    assert "no such program" in containers.refused("d", 'init = "/sbin/nothing"\n')
    assert "no such file" in containers.refused("e", '[[mount]]\nsource = "/srv/none"\ntarget = "/mnt"\n')
    assert "to whom" in containers.refused("f", f"[idmap]\nfirst = {FIRST + 65536}\n")
    for text, key in (("[idmap]\nfirst = 100000\n", "idmap"), ('[limits]\nmemory = "much"\n', "limits.memory")):
        wrong = f'name = "g"\nrootfs = "{containers.root}"\n{text}'
        done = lab.virtdctl("container", "define", "-", stdin=wrong, check=False)
        assert done.returncode == 1
        assert f"<stdin>: {key}: expected" in done.stderr
    # The lab's own file system has no idmapped mounts.
    lab.run("sh", "-c", small.MAKE.replace(small.ROOT, "/var/lib/virtd/containers/roots").replace(
        f"chown -hR {small.FIRST}:{small.FIRST} .", ""), stdin=small.PROGRAM)  # fmt: skip
    said = containers.refused("h", f'command = ["/brief"]\n{MINI}', root="/var/lib/virtd/containers/roots")
    assert "no idmapped mounts" in said
    assert "virtdctl container create NEW --image /var/lib/virtd/containers/roots" in said
    lab.virtdctl("container", "undefine", "h")
    lab.sh("rm -rf /var/lib/virtd/containers/roots")
    assert [item["name"] for item in lab.json("container", "list")] == list("abcdef")
    assert lab.sh("ls /run/virtd/lxc") == ""
    assert lab.slots() == 0


# What root in a container can't do. Each line is tried in it, and has to fail.
ESCAPES = (
    "insmod /x.ko || modprobe dummy",
    "mknod /tmp/disk b 8 0 && cat /tmp/disk",
    "echo 1 >/proc/sys/kernel/sysrq",
    "echo b >/proc/sysrq-trigger",
    "echo /tmp/x >/proc/sys/kernel/core_pattern",
    "mount -t cgroup2 none /mnt && ls -d /mnt/virtd.slice",
    "echo $$ >/sys/fs/cgroup/../cgroup.procs && grep -q '^0::/$' /proc/self/cgroup",
    "ls -d /run/virtd/virtd.sock /run/systemd/system/../../virtd",
    "grep -qs virtd.sock /proc/net/unix",
    "pgrep -f /usr/libexec/virtd",
    "kill -0 MONITOR",
    "ls /proc/MONITOR/root/",
    "nsenter -t 1 -m ls /var/lib/virtd-secret",
    "mount -o remount,rw /sys",
    "date -s 2001-01-01",
    "chroot /proc/1/root/../../../.. ls /var/lib/virtd-secret",
    "cat /var/lib/virtd-secret",
    "unshare -m mount --bind / /mnt && ls /mnt/var/lib/virtd-secret",
    "ip link show virbr0",
    "dmesg",
)


def test_what_its_root_cannot_do(containers: Containers) -> None:
    lab = containers.lab
    lab.sh("echo secret >/var/lib/virtd-secret")
    script = "".join(
        f"if ( {escape} ) >/dev/null 2>&1; then echo OUT {at}; fi\n" for at, escape in enumerate(ESCAPES)
    )
    # The monitor's PID is told to it: that it can guess it must not help.
    script += "id -u; grep CapEff /proc/self/status; ls -l /dev | wc -l; sort /proc/1/uid_map; echo done; sleep 600\n"
    containers.define("jail", 'command = ["sh", "/escape"]\n', start=False)
    lab.write(
        f"{ROOT}/escape",
        "while ! test -s /monitor; do sleep 0.1; done; read m </monitor\n" + script.replace("MONITOR", "$m"),
    )
    lab.sh(f"chown {FIRST}:{FIRST} {ROOT}/escape; rm -f {ROOT}/monitor")
    lab.virtdctl("container", "start", "jail")
    lab.sh(f"systemctl show -P MainPID virtd-lxc-jail.service >{ROOT}/monitor; chmod 644 {ROOT}/monitor")
    containers.said("jail", b"done")
    said = containers.log("jail").decode().splitlines()
    assert [ESCAPES[int(line.split()[1])] for line in said if line.startswith("OUT")] == []
    assert "0" in said  # it is root in there, and yet nobody:
    pid = containers.info("jail")["pid"]
    assert lab.sh(f"stat -c %u /proc/{pid}").strip() == str(FIRST)
    status = lab.sh(f"cat /proc/{pid}/status")
    assert re.search(r"^Seccomp:\s+2$", status, re.M)
    lab.sh(f"rm -f {ROOT}/escape {ROOT}/monitor")


def test_which_sockets_it_gets(containers: Containers) -> None:
    """None of a family that no namespace separates: by AF_VSOCK it would reach the host's guests."""
    families = "$| = 1; print socket(my $s, $_, 1, 0) ? 1 : 0 for 40, 1, 2;"  # AF_VSOCK, AF_UNIX, AF_INET
    if containers.lab.run("perl", "-e", families).stdout != "111":
        pytest.skip("this kernel has no vsock")
    containers.define("box", f'command = ["perl", "-e", "{families} sleep 600"]\n')
    containers.said("box", b"011")
    assert containers.lab.virtdctl("container", "exec", "box", "--", "perl", "-e", families).stdout == "011"


def test_only_listed_devices(containers: Containers) -> None:
    """Even what its root makes a node of, or is given by the host, is closed unless it is in the definition."""
    more = '[[mount]]\nsource = "/dev/net"\ntarget = "/dev/net"\n'
    look = 'command = ["sh", "-c", "exec 3<>/dev/net/tun && echo open; echo done"]\n'
    containers.define("closed", look + more)
    containers.ended("closed")
    containers.define("open", look + '[[device]]\npath = "/dev/net/tun"\n')
    containers.ended("open")
    assert b"open" not in containers.log("closed")
    assert b"open" in containers.log("open")


def test_a_command_in_it(containers: Containers) -> None:
    """Streams, exit status, signals, a terminal, and the daemon killed while the command runs."""
    lab = containers.lab
    containers.define("box", 'command = ["sleep", "600"]\n')

    def run(script: str, *options: str, stdin: str = "") -> tuple[int, str, str]:
        argv = ("container", "exec", *options, "box", "--", "sh", "-c", script)
        done = lab.virtdctl(*argv, stdin=stdin, check=False)
        return done.returncode, done.stdout, done.stderr

    assert run("echo out; echo err >&2; exit 5") == (5, "out\n", "err\n")
    assert run("cat", stdin="hello\n") == (0, "hello\n", "")
    assert run("kill -9 $$")[0] == 128 + 9
    assert run("echo $A", "-e", "A=b c") == (0, "b c\n", "")
    # What it has left in the background goes on talking; who reads lines in a loop keeps them.
    assert run("(while :; do date; sleep 0.1; done) & exit 3", "-T")[0] == 3
    loop = "printf 'a\\nb\\n' | while read -r x; do echo $x; virtdctl container exec -n box -- cat; done"
    assert lab.sh(loop).split() == ["a", "b"]
    lab.sh("(until systemctl list-units --plain --no-legend 'virtd-exec-*' | grep -q running; do sleep 0.1; done; "
           "sleep 0.5; systemctl kill -s KILL virtd) >/dev/null 2>&1 &")  # fmt: skip
    assert run("sleep 4; echo survived; exit 3") == (3, "survived\n", "")
    signalled = lab.run(
        "bash", "-c",
        "virtdctl container exec box -- "
        "sh -c 'trap \"echo got; exit 9\" TERM; echo on; while :; do sleep 0.1; done' >/tmp/o &"
        "until grep -q on /tmp/o; do sleep 0.1; done; kill -TERM $!; wait $!; echo $?; cat /tmp/o",
    )  # fmt: skip
    assert signalled.stdout.split() == ["9", "on", "got"]
    terminal = lab.run(
        "script", "-qec", "virtdctl container exec -t box -- sh -c 'tty; exit 4'", "/dev/null", check=False
    )
    assert "/dev/pts/" in terminal.stdout
    assert terminal.returncode == 4
    assert lab.sh("systemctl list-units --all --no-legend 'virtd-exec-*'") == ""


def test_create_from_an_archive_and_from_a_directory(containers: Containers) -> None:
    """Each gets IDs of its own; what can't be made leaves nothing; what was made boots."""
    lab = containers.lab
    try:
        lab.virtdctl("container", "create", "made", "--image", "/usr/share/virtd-lab/debian.tar.xz")
        text = lab.virtdctl("container", "dump", "made").stdout
        first = int(re.search(r"first = (\d+)", text)[1])  # type: ignore[index]
        assert first != FIRST
        assert lab.sh("stat -c %u:%g /var/lib/virtd/containers/made/usr").strip() == f"{first}:{first}"
        assert lab.sh("cat /var/lib/virtd/containers/made/etc/hostname").strip() == "made"
        lab.virtdctl("container", "start", "made")
        containers.said("made", b"made login:")
        lab.sh("mkdir -p /srv/image/usr/bin && cp /usr/share/virtd-lab/vmlinuz /srv/image/usr/bin/init")
        lab.virtdctl("container", "create", "copied", "--image", "/srv/image")
        assert f"first = {first}" not in lab.virtdctl("container", "dump", "copied").stdout
        lab.sh("cmp /usr/share/virtd-lab/vmlinuz /var/lib/virtd/containers/copied/usr/bin/init")
        lab.sh("head -c 100000 /usr/share/virtd-lab/debian.tar.xz >/srv/broken.tar.xz; mkdir -p /srv/none")
        for name, image in (
            ("broken", "/srv/broken.tar.xz"),
            ("none", "/srv/none"),
            ("gone", "/srv/gone"),
            ("made", "/srv"),
        ):
            done = lab.virtdctl("container", "create", name, "--image", image, check=False)
            assert done.returncode != 0, name
            assert done.stderr.startswith(f"Failed to create {name}: "), done.stderr
        assert [item["name"] for item in lab.json("container", "list")] == ["copied", "made"]
        assert lab.sh("ls -A /var/lib/virtd/containers").split() == ["base", "copied", "made"]
    finally:
        lab.virtdctl("container", "stop", "made", check=False)
        lab.sh("rm -rf /var/lib/virtd/containers/made /var/lib/virtd/containers/copied")


HOSTILE = """
import io, tarfile
def add(tar, name, kind=tarfile.REGTYPE, link="", mode=0o755, data=b""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode, member.size = kind, link, mode, len(data)
    tar.addfile(member, io.BytesIO(data))
with tarfile.open("/srv/hostile.tar", "w") as tar:
    add(tar, "etc", tarfile.DIRTYPE)
    add(tar, "etc/hostname", tarfile.FIFOTYPE)
    add(tar, "etc/machine-id", tarfile.SYMTYPE, "/etc/machine-id")
    add(tar, "usr", tarfile.DIRTYPE)
    add(tar, "usr/suid", mode=0o4755)
    add(tar, "out", tarfile.SYMTYPE, "/srv")
    add(tar, "/srv/absolute", data=b"x")
with tarfile.open("/srv/leading.tar", "w") as tar:
    add(tar, "usr", tarfile.DIRTYPE)
    add(tar, "../../../../../srv/above", data=b"x")
    add(tar, "usr/hard", tarfile.LNKTYPE, "/etc/shadow")
    add(tar, "usr/disk", tarfile.BLKTYPE)
with tarfile.open("/srv/deep.tar", "w", format=tarfile.GNU_FORMAT) as tar:
    add(tar, "usr", tarfile.DIRTYPE)
    add(tar, "a/" * 2000, tarfile.DIRTYPE)
    add(tar, "x" * 100000)
with tarfile.open("/srv/bomb.tar.xz", "w:xz") as tar:
    add(tar, "usr/bomb", data=bytes(256 << 20))
"""


def test_archives_from_anywhere(containers: Containers) -> None:
    """Made, or refused with nothing left; none of them holds up the next one, or leads out."""
    lab = containers.lab
    machine = lab.sh("cat /etc/machine-id")
    lab.run("python3", "-c", HOSTILE)
    lab.sh(f"""{LOOPS}
        truncate -s 64M /srv/small.img && mkfs.ext4 -q -F /srv/small.img && mkdir -p /srv/small
        mount -o loop /srv/small.img /srv/small; echo outside >/srv/outside; mkfifo /srv/fifo.tar""")
    try:
        lab.virtdctl("container", "create", "hostile", "--image", "/srv/hostile.tar")
        made = "/var/lib/virtd/containers/hostile"
        first = int(lab.sh(f"stat -c %u {made}"))
        assert lab.sh(f"cat {made}/etc/hostname").strip() == "hostile"
        assert lab.sh(f"stat -c '%F %s' {made}/etc/machine-id").strip() == "regular empty file 0"
        assert lab.sh("cat /etc/machine-id") == machine
        assert lab.sh(f"stat -c '%u %a' {made}/usr/suid").split() == [str(first), "4755"]
        for name, image, words in (
            ("leading", "/srv/leading.tar", "Failed to create leading"),
            ("deep", "/srv/deep.tar", "Failed to create deep"),
            ("waits", "/srv/fifo.tar", "a FIFO, not a regular file"),
        ):
            done = lab.virtdctl("container", "create", name, "--image", image, check=False)
            assert done.returncode == 1, name
            assert words in done.stderr
        lab.sh("printf '[lxc]\\ndirectory = \"/srv/small\"\\n' >/etc/virtd/virtd.toml; chmod 700 /srv/small")
        lab.sh("systemctl restart virtd")
        done = lab.virtdctl("container", "create", "bomb", "--image", "/srv/bomb.tar.xz", check=False)
        assert "fill the disk" in done.stderr or "No space left" in done.stderr
        assert lab.sh("ls -A /srv/small").split() == ["lost+found"]
        assert lab.sh("ls -A /var/lib/virtd/containers").split() == ["base", "hostile"]
        assert lab.sh("ls /srv/absolute /srv/above", check=False) == ""
        assert [item["name"] for item in lab.json("container", "list")] == ["hostile"]
    finally:
        lab.sh("rm -f /etc/virtd/virtd.toml; systemctl restart virtd; umount /srv/small")
        lab.sh(f"rm -rf {made} /srv/*.tar /srv/*.tar.xz /srv/small* /srv/outside")


def test_how_exposed_its_units_are(containers: Containers) -> None:
    """What unpacks and enters is held tight. What is in a container inherits the filters of its unit, so that these
    refuse only what no system may do; LXC itself has few of root's capabilities.
    """
    lab = containers.lab
    containers.define("box", 'command = ["sleep", "600"]\n')
    lab.sh("virtdctl container exec box -- sleep 600 </dev/null >/dev/null 2>&1 & exit 0")
    lab.wait("the command", lambda: lab.sh("systemctl list-units --plain --no-legend 'virtd-exec-*'"))
    (entering,) = [line.split()[0] for line in lab.sh(
        "systemctl list-units --plain --no-legend 'virtd-exec-*'").splitlines()]  # fmt: skip
    for unit, most in (("virtd-lxc-box.service", 60), (entering, 57)):
        lab.sh(f"systemd-analyze security --no-pager --threshold={most} {unit} >&2")
    lab.sh("virtdctl container create made --image /usr/share/virtd-lab/debian.tar.xz >/dev/null 2>&1 &")
    unit = "virtd-create-lxc-made.service"
    lab.wait("the unpacking", lambda: lab.sh(f"systemctl show -P ActiveState {unit}").strip() == "active")
    lab.sh(f"systemd-analyze security --no-pager --threshold=20 {unit} >&2")
    bounding = lab.sh("systemctl show -P CapabilityBoundingSet virtd-lxc-box.service").split()
    assert set(bounding) == {
        "cap_dac_override", "cap_kill", "cap_setgid", "cap_setuid", "cap_setfcap", "cap_sys_admin"
    }  # fmt: skip
    shown = lab.sh("systemctl show -P MemoryMax -P TasksMax virtd-lxc-box.service").split()
    info = containers.info("box")["limits"]
    assert [int(one) for one in shown] == [info["memory"], info["pids"]]
    assert 1024 <= info["pids"] <= 16384
    limits = lab.virtdctl("container", "exec", "box", "--", "cat", "/proc/1/limits").stdout
    assert limits.split("open files")[1].split()[0] == "1024"
    lab.wait("its making", lambda: "made" in [item["name"] for item in lab.json("container", "list")], 60)
    lab.sh("rm -rf /var/lib/virtd/containers/made")


# acl(5) as the kernel has it, linux/posix_acl_xattr.h: the owner, user 33, the group, the mask, others.
ACL = """
import os, struct
NOBODY = 0xFFFFFFFF
ENTRIES = [(1, 7, NOBODY), (2, 5, 33), (4, 5, NOBODY), (16, 5, NOBODY), (32, 5, NOBODY)]
packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ENTRIES)
def user(path):
    return struct.unpack_from("<HHI", os.getxattr(path, "system.posix_acl_access"), 12)[2]
"""


def test_create_keeps_file_capabilities_and_attributes(containers: Containers) -> None:
    """Of an archive and of a directory; the container's root is the one that a capability is good for, and its user
    33 the one whom an ACL names.
    """
    lab = containers.lab
    lab.write("/srv/acl.py", ACL)
    lab.sh("""set -e
        mkdir -p /srv/attributes/usr/bin && cd /srv/attributes
        cp /bin/true usr/bin/init && cp /bin/ls usr/bin/able
        python3 - <<'END'
exec(open("/srv/acl.py").read())
os.setxattr("usr/bin/init", "system.posix_acl_access", packed)
os.setxattr("usr/bin/able", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))  # net_raw
os.setxattr("usr/bin/able", "user.note", b"kept")
END
        tar --acls --xattrs --xattrs-include='*' -cf /srv/attributes.tar .""")
    try:
        for name, image in (("packed", "/srv/attributes.tar"), ("copied", "/srv/attributes")):
            lab.virtdctl("container", "create", name, "--image", image)
            read = f"""exec(open("/srv/acl.py").read())
path = "/var/lib/virtd/containers/{name}/usr/bin/able"
magic, permitted, _, _, _, root = struct.unpack("<6I", os.getxattr(path, "security.capability"))
print(magic >> 24, permitted, root == os.stat(path).st_uid, os.getxattr(path, "user.note").decode())
print(user(os.path.dirname(path) + "/init") - os.stat(path).st_uid)"""
            assert lab.run("python3", "-c", read).stdout.split() == ["3", str(1 << 13), "True", "kept", "33"]
    finally:
        lab.sh(
            "rm -rf /srv/acl.py /srv/attributes* /var/lib/virtd/containers/packed /var/lib/virtd/containers/copied"
        )


def test_a_create_that_is_cut_off_leaves_nothing(containers: Containers) -> None:
    """Killed while it is unpacked, and between the name of its directory and its definition."""
    lab = containers.lab
    directory = "/var/lib/virtd/containers"
    for number in range(2):
        lab.sh(
            f"virtdctl container create cut --image /usr/share/virtd-lab/debian.tar.xz >/dev/null 2>&1 & "
            f"until test -e {directory}/.cut.new/usr/bin; do sleep 0.02; done; "
            "systemctl kill -s KILL virtd.service; wait",
            check=False,
        )
        if number:
            # As the second instant leaves it, which is too short to be hit.
            lab.sh(f"systemctl stop virtd.service virtd.socket; mv {directory}/.cut.new {directory}/cut || true")
            lab.sh(f"printf %s {directory} >/run/virtd/lxc/cut.creating; mkdir -p {directory}/cut")
            lab.sh("systemctl start virtd.socket virtd.service")
        lab.wait("the daemon", lambda: lab.virtdctl("status", check=False).returncode != 3)
        assert lab.json("container", "list") == []
        lab.wait("nothing", lambda: lab.sh(f"ls -A {directory} /run/virtd/lxc").split() == [
            "/run/virtd/lxc:", f"{directory}:", "base"], 60)  # fmt: skip
        assert lab.sh("systemctl list-units --all --no-legend 'virtd-create-*'") == ""


def test_a_container_is_made_while_the_daemon_starts(containers: Containers) -> None:
    """The host's first: what a daemon before has left is removed, and nothing that this one makes."""
    lab = containers.lab
    lab.sh("mkdir -p /srv/tiny/usr")
    try:
        for _ in range(8):
            lab.sh("systemctl restart virtd.service && virtdctl container create made --image /srv/tiny")
            lab.virtdctl("container", "undefine", "made")
            lab.sh("rm -r /var/lib/virtd/containers/made; systemctl reset-failed virtd.service")
    finally:
        lab.sh("rm -rf /srv/tiny")


def test_a_container_in_a_network(containers: Containers) -> None:
    """A veth into a network of virtd's: an address from its DHCP, shown, and kept over a restart."""
    lab = containers.lab
    lab.virtdctl("network", "define", "default")
    try:
        containers.define("net", '[[nic]]\nnetwork = "default"\n')
        containers.said("net", b"login:")
        # Debian's own DHCP client in it.
        wanted = "[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\n"
        script = f"mkdir -p /run/systemd/network; printf '{wanted}' >/run/systemd/network/eth0.network"
        lab.virtdctl(
            "container", "exec", "net", "--", "sh", "-c", f"{script}; systemctl start systemd-networkd.service"
        )
        (mac,) = lab.sh("sed -n 's/.*hwaddr = //p' /run/virtd/lxc/net/config").split()

        def leased() -> str | None:
            rows = [row["address"] for row in lab.json("network", "leases", "default") if row["mac"] == mac]
            return rows[0] if rows and rows[0] in containers.info("net")["addresses"] else None

        address = lab.wait("an address", leased, 60)
        info = containers.info("net")
        assert len(info["interfaces"]) == 1
        assert info["interfaces"][0] in lab.sh("ls /sys/class/net")
        network = lab.json("network", "info", "default")
        bridge = network["bridge"]
        assert lab.sh(f"ls /sys/class/net/{bridge}/brif").split() == info["interfaces"]
        assert any("lxc/net" in str(user) for user in network["users"])
        lab.sh("systemctl restart virtd")
        # It may have given itself another one meanwhile.
        assert set(info["addresses"]) <= set(containers.info("net")["addresses"])
        assert address in info["addresses"]
        lab.virtdctl("container", "stop", "net")
        lab.wait("the interface's end", lambda: info["interfaces"][0] not in lab.sh("ls /sys/class/net").split())
    finally:
        lab.virtdctl("container", "stop", "net", check=False)
        lab.virtdctl("network", "stop", "--force", "default", check=False)
        lab.virtdctl("network", "undefine", "default", check=False)


def test_what_a_definition_asks_for(containers: Containers) -> None:
    """Environment, host name, a mount that is for reading, a capability less; seen from inside."""
    lab = containers.lab
    lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
    lab.sh("mkdir -p /srv/shown && echo shown >/srv/shown/file && chmod 777 /srv/shown")
    look = "echo $COLOUR; uname -n; cat /shown/file; touch /shown/x || echo no; grep CapBnd /proc/self/status"
    containers.define(
        "asks",
        f'hostname = "www"\ndrop_capabilities = ["net_raw"]\ncommand = {json.dumps(["/shell", "-c", look])}\n'
        f'[environment]\nCOLOUR = "deep red"\n{MINI}'
        '[[mount]]\nsource = "/srv/shown"\ntarget = "/shown"\nreadonly = true\n',
        root=small.ROOT,
    )
    containers.ended("asks")
    said = containers.log("asks").decode().splitlines()
    assert (said[:3], "no" in said) == (["deep red", "www", "shown"], True), said
    bounding = int(said[-1].split()[1], 16)
    assert (bounding >> 13 & 1, bounding >> 16 & 1, bounding & 1) == (0, 0, 1)  # net_raw, sys_module, chown
    assert lab.sh("ls /srv/shown").split() == ["file"]


def test_the_host_s_network(containers: Containers) -> None:
    lab = containers.lab
    lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
    look = f'command = ["/shell", "-c", "readlink /proc/self/ns/net"]\n{MINI}'
    containers.define("shared", f'{look}[[nic]]\nmode = "host"\n', root=small.ROOT)
    containers.define("own", look, root=small.ROOT)
    containers.ended("shared")
    containers.ended("own")
    host = lab.sh("readlink /proc/self/ns/net").encode().strip()
    assert host in containers.log("shared")
    assert host not in containers.log("own")
    assert b"net:[" in containers.log("own")


def test_a_root_of_the_host_s_root_is_shifted(containers: Containers) -> None:
    """On a file system that has idmapped mounts: nothing in it changes hands, and what it makes is root's there."""
    lab = containers.lab
    lab.sh(f"""{LOOPS}
        truncate -s 32M /srv/shifted.img && mkfs.ext4 -q -F /srv/shifted.img
        mkdir -p /srv/shifted && mount -o loop /srv/shifted.img /srv/shifted && chmod 700 /srv/shifted""")
    make = small.MAKE.replace(small.ROOT, "/srv/shifted/root").replace(f"chown -hR {small.FIRST}:{small.FIRST} .", "")
    try:
        lab.run("sh", "-c", make, stdin=small.PROGRAM)
        # An ACL's users are shifted with the owners.
        lab.write("/srv/shifted/root/acl.py", ACL)
        give = "exec(open('acl.py').read()); os.setxattr('steady', 'system.posix_acl_access', packed)"
        lab.run("env", "-C", "/srv/shifted/root", "python3", "-c", give)
        lab.write("/srv/shifted/root/look.py", "exec(open('/acl.py').read())\nprint(user('/steady'))\n")
        asks = "stat -c %u /steady; python3 /look.py; touch /tmp/made; cat /proc/self/uid_map"
        look = f"command = {json.dumps(['/shell', '-c', asks])}\n"
        containers.define("shifted", f"{look}{MINI}", root="/srv/shifted/root")
        assert containers.ended("shifted")["exit"]["cause"] == "exited", containers.log("shifted")
        said = containers.log("shifted").split()
        assert said[:3] == [b"0", b"33", b"0"]
        assert said[3] != b"0"
        assert lab.sh("stat -c %u /srv/shifted/root/steady /srv/shifted/root/tmp/made").split() == ["0", "0"]
    finally:
        lab.virtdctl("container", "undefine", "shifted", check=False)
        lab.sh("umount /srv/shifted; rm -rf /srv/shifted /srv/shifted.img")


# As a local user who tries: what comes out is what was possible.
OUTSIDER = """
import os, sys
os.setgroups([]), os.setresgid(4242, 4242, 4242), os.setresuid(4242, 4242, 4242)
for path in sys.argv[1:]:
    base = os.path.basename(path)
    try:
        if base == "suid":
            pid = os.fork()
            if not pid:
                os.close(2), os.execv(path, [path, "-c", "import os; os.setuid(0); print('OUT: root')"])
            os.waitpid(pid, 0)
        elif base == "planted":
            open(path, "w").close()
            print("OUT: planted", path)
        else:
            os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
            print("OUT: read", path)
    except OSError:
        pass
"""
# What its root makes for one outside: a setuid program, a device, a place to plant files in.
FOR_OTHERS = (
    "cp /usr/bin/python3 /suid && chown 0:0 /suid && chmod 4755 /suid; mknod /null c 1 3; chmod 1777 /tmp; "
    "echo readable >/note; cp /suid /shared/suid && chmod 4755 /shared/suid; echo made; sleep 600"
)


def test_nobody_else_reaches_its_files(containers: Containers) -> None:
    """Not even with its root's help, where what that makes is the host's root's on disk: an idmapped mount, a volume
    and a directory of its own. Of what is shared on purpose nothing belongs to the host's root.
    """
    lab = containers.lab
    lab.sh(f"""{LOOPS}
        truncate -s 64M /srv/shifted.img && mkfs.ext4 -q -F /srv/shifted.img
        mkdir -p /srv/shifted /srv/shared && mount -o loop /srv/shifted.img /srv/shifted && chmod 700 /srv/shifted
        chmod 777 /srv/shared""")
    make = small.MAKE.replace(small.ROOT, "/srv/shifted/root").replace(f"chown -hR {small.FIRST}:{small.FIRST} .", "")
    more = f'{MINI}[[mount]]\nsource = "/srv/shared"\ntarget = "/shared"\n'
    command = f"command = {json.dumps(['/shell', '-c', FOR_OTHERS])}\n"
    try:
        with_volume(lab)
        lab.sh("mkfs.ext4 -q -F -d /srv/image /srv/volumes/one")
        lab.run("sh", "-c", make, stdin=small.PROGRAM)
        lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
        lab.virtdctl("container", "define", "-", stdin=VOLUME.replace('["/steady", "20"]', json.dumps(
            ["/shell", "-c", FOR_OTHERS])) + '[[mount]]\nsource = "/srv/shared"\ntarget = "/shared"\n')  # fmt: skip
        lab.virtdctl("container", "start", "vol")
        containers.define("shifted", command + more, root="/srv/shifted/root")
        containers.define("own", command + more, root=small.ROOT)
        roots = ["/run/virtd/lxc/.roots/vol", "/srv/shifted/root", small.ROOT]
        for name in ("vol", "shifted", "own"):
            containers.said(name, b"made")
            roots.append(f"/proc/{containers.info(name)['pid']}/root")
        for root in roots[:2]:
            assert lab.sh(f"stat -c %u:%a {root}/suid").strip() == "0:4755"  # it is really there

        def tried(*paths: str) -> list[str]:
            return lab.run("python3", "-c", OUTSIDER, *paths).stdout.split()

        inside = [f"{root}/{name}" for root in roots for name in ("", "suid", "note", "null", "tmp/planted")]
        sockets = lab.sh("find /run/virtd/lxc -mindepth 1").split()
        assert tried(*inside, *sockets, "/run/virtd/lxc", "/var/lib/virtd/containers") == []
        assert tried("/srv/shared/suid") == []
        assert lab.sh("find /srv/shared -user 0 -type f") == ""
        # On the host the volume's setuid programs are none; in the container they are.
        assert "nosuid" in lab.sh("findmnt -n -o OPTIONS /run/virtd/lxc/.roots/vol")
        check = (
            "import os; os.setresuid(7, 7, 7); os.execv('/suid', ['/suid', '-c', 'import os; print(os.geteuid())'])"
        )
        done = lab.virtdctl("container", "exec", "-T", "vol", "--", "/usr/bin/python3", "-c", check)
        assert done.stdout == "0\n"
        # What others may come to reach is told of while it runs, and not started again.
        lab.sh("chmod 755 /srv/shifted; systemctl reload virtd")
        assert "OUT:" in tried("/srv/shifted/root/note")
        assert any("Others can reach" in one["text"] for one in lab.json("container", "info", "shifted")["problems"])
        lab.virtdctl("container", "stop", "shifted")
        refused = lab.virtdctl("container", "start", "shifted", check=False)
        assert "nobody but root can reach" in refused.stderr
        assert "nobody but root can reach" in lab.virtdctl(
            "container", "define", "-", stdin=lab.virtdctl("container", "dump", "shifted").stdout).stderr  # fmt: skip
        lab.sh("chmod 700 /srv/shifted; mkdir -p /srv/again && mount --bind /srv/shifted /srv/again; chmod 755 /srv")
        assert (
            lab.virtdctl("container", "start", "shifted", check=False).stderr == ""
        )  # its own mode holds there, too
        lab.virtdctl("container", "stop", "shifted")
        lab.sh("umount /srv/again; mount --bind /srv/shifted/root /srv/again")
        assert "as /srv/again" in lab.virtdctl("container", "start", "shifted", check=False).stderr
    finally:
        lab.sh("umount /srv/again", check=False)
        for name in ("vol", "shifted", "own"):
            lab.virtdctl("container", "stop", name, check=False)
        without_volume(lab)
        lab.sh("umount /srv/shifted; rm -rf /srv/shifted /srv/shifted.img /srv/shared /srv/again")


def test_the_name_of_its_socket_cannot_be_taken_before(containers: Containers) -> None:
    """LXC's is an abstract one: whoever has bound it keeps the container from being started."""
    lab = containers.lab
    lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
    taker = (
        "import socket, time; s = socket.socket(socket.AF_UNIX); s.bind(bytes(1) + b'/run/virtd/lxc/sock/command'); "
        "time.sleep(600)"
    )
    lab.run("systemd-run", "-q", "--unit=taker", "--uid=nobody", "/usr/bin/python3", "-c", taker)
    try:
        lab.wait("the socket", lambda: "lxc/sock/command" in lab.sh("cat /proc/net/unix"))
        names = []
        for _ in range(2):
            containers.define("sock", f'command = ["/steady", "0"]\n{MINI}', root=small.ROOT)
            (name,) = re.findall(r"@(/run/virtd/lxc/sock/\S+)", lab.sh("cat /proc/net/unix").replace(
                "@/run/virtd/lxc/sock/command", ""))  # fmt: skip
            names.append(name)
            assert lab.virtdctl("container", "exec", "sock", "--", "/usr/bin/true", check=False).returncode == 0
            lab.virtdctl("container", "stop", "sock")
        assert len(set(names)) == 2
    finally:
        lab.sh("systemctl stop taker")


def test_a_volume_as_its_root(containers: Containers) -> None:
    """In use by nobody else while it is; mounted over crashes of the daemon, and no longer than it runs."""
    lab = containers.lab
    try:
        with_volume(lab)
        lab.virtdctl("container", "define", "-", stdin=VOLUME)
        empty = lab.virtdctl("container", "start", "vol", check=False)
        assert empty.returncode == 1
        assert "Cannot mount" in empty.stderr
        lab.sh("mkfs.ext4 -q -F /srv/volumes/one")
        empty = lab.virtdctl("container", "start", "vol", check=False)
        assert "has no usr, bin or etc" in empty.stderr
        assert lab.sh("findmnt -n /run/virtd/lxc/.roots/vol", check=False) == ""
        assert ".roots" not in lab.sh("ls -A /run/virtd/lxc")
        lab.sh("mkfs.ext4 -q -F -d /srv/image /srv/volumes/one")
        lab.virtdctl("container", "start", "vol")
        info = containers.info("vol")
        assert info["volume"] == {"pool": "roots", "volume": "one"}
        assert lab.sh(f"stat -c %u /proc/{info['pid']}").strip() != "0"
        lab.wait("lines", lambda: check(containers.log("vol")).lines > 5, 60)
        for command in (
            ("volume", "delete", "roots", "one"),
            ("volume", "resize", "roots", "one", "64M"),
            ("pool", "stop", "roots"),
        ):
            done = lab.virtdctl(*command, check=False)
            assert done.returncode == 1
            assert "container vol" in done.stderr, done.stderr
        assert lab.json("volume", "list", "roots")[0]["used_by"] == ["lxc/vol"]
        lab.define("disk", more='[[disk]]\npool = "roots"\nvolume = "one"\n')
        assert "container vol has it mounted" in lab.virtdctl("start", "disk", check=False).stderr
        lab.sh("systemctl kill -s KILL virtd.service")
        lab.wait("the daemon", lambda: lab.virtdctl("status", check=False).returncode != 3)
        assert (containers.info("vol")["pid"], containers.state("vol")) == (info["pid"], "running")
        assert lab.sh("findmnt -n -o FSTYPE /run/virtd/lxc/.roots/vol").strip() == "ext4"
        lab.virtdctl("container", "stop", "vol")
        assert lab.sh("findmnt -n /run/virtd/lxc/.roots/vol; losetup -j /srv/volumes/one", check=False) == ""
        assert "vol.json" in (left := lab.sh("ls -A /run/virtd/lxc").split())
        assert ".roots" not in left
        # A start that is cut off may leave the mount, and nothing else; the next daemon takes it away.
        lab.sh("systemctl stop virtd.service virtd.socket; mkdir -p /run/virtd/lxc/.roots/vol")
        lab.sh("mount -o loop /srv/volumes/one /run/virtd/lxc/.roots/vol")
        lab.sh("systemctl start virtd.socket virtd.service")
        lab.wait("the end of the mount", lambda: not lab.sh("findmnt -n /run/virtd/lxc/.roots/vol", check=False), 60)
        lab.wait("nothing to be left", lambda: ".roots" not in lab.sh("ls -A /run/virtd/lxc"), 60)
    finally:
        lab.virtdctl("container", "stop", "vol", check=False)
        lab.virtdctl("undefine", "disk", check=False)
        without_volume(lab)


def test_its_end_is_told_on_the_bus(containers: Containers) -> None:
    lab = containers.lab
    lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
    command = 'command = ["/shell", "-c", "read line; exit 5"]\n'
    containers.define("told", f"{command}{MINI}", root=small.ROOT)
    argv = [LAB, "exec", lab.name, "--", "timeout", "100", "python3", "-c", WATCHER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        lab.virtdctl("container", "console", "--timeout", "1", "told", stdin="go\n")
        *_, (path, member, (ending,)) = [json.loads(line) for line in watcher.stdout]
    assert (path, member) == ("/org/virtd1/container/told", "Ended")
    assert (ending["code"], ending["cause"]) == (5, "failed")


def test_what_a_container_calls_its_interfaces(containers: Containers) -> None:
    """Nobody's listing is lost by it."""
    lab = containers.lab
    lab.run("sh", "-c", small.MAKE, stdin=small.PROGRAM)
    containers.define("odd", f'command = ["/steady", "0"]\n{MINI}', root=small.ROOT)
    enter = ("nsenter", "-t", str(containers.info("odd")["pid"]), "-n", "sh", "-c")
    lab.run(*enter, "n=$(printf '\\377\\205'); ip link add name $n type veth peer name other; ip link set $n up; "
            "ip link set other up; ip -6 address add fd00::7/64 dev $n nodad")  # fmt: skip
    assert "fd00::7" in containers.info("odd")["addresses"]
    lab.sh("runuser -u nobody -- busctl call org.virtd1 /org/virtd1 org.freedesktop.DBus.ObjectManager "
           "GetManagedObjects | grep -q fd00::7")  # fmt: skip


def machines(lab: Lab) -> dict[str, tuple[str, int]]:
    """What systemd-machined knows: class and leader by name, each name but once."""
    said = lab.sh(
        "busctl --json=short call org.freedesktop.machine1 /org/freedesktop/machine1 "
        "org.freedesktop.machine1.Manager ListMachines"
    )
    rows = [row for row in json.loads(said)["data"][0] if row[0] != ".host"]
    leaders = {
        row[0]: int(lab.sh(f"machinectl show --value -p Leader {row[0]} 2>/dev/null || echo 0")) for row in rows
    }
    assert len(leaders) == len(rows)
    return {row[0]: (row[1], leaders[row[0]]) for row in rows}


def test_machinectl_shows_what_runs(containers: Containers) -> None:
    """A domain and a container of one name; machined restarted, without a memory, frozen, masked: no harm."""
    lab = containers.lab
    lab.define("web1", start=True)
    containers.define("web1")
    guest = lab.info("web1")["pid"]

    def shown() -> bool:
        container = containers.info("web1")["pid"]
        return machines(lab) == {"qemu-web1": ("vm", guest), "lxc-web1": ("container", container)}

    lab.wait("both", shown, 60)
    assert "qemu-web1" in lab.sh("machinectl --no-legend list")
    assert lab.info("web1")["uuid"].replace("-", "") == lab.sh("machinectl show --value -p Id qemu-web1").strip()
    for event in (
        "systemctl restart virtd.service",
        "systemctl restart systemd-machined.service",
        "systemctl kill -s KILL systemd-machined.service",
        "set -- systemd-machined.service; systemctl stop $1; rm -rf /run/systemd/machines; systemctl start $1",
    ):
        lab.sh(event)
        lab.wait(f"both after {event}", shown, 60)
    # Its own reboot: another first process, and nobody is ended for it.
    containers.said("web1", b"login:")
    daemon, first = lab.main_pid(), containers.info("web1")["pid"]
    lab.virtdctl("container", "exec", "web1", "--", "systemctl", "reboot", check=False)
    lab.wait("the reboot", lambda: containers.info("web1")["pid"] not in (None, first), 60)
    lab.wait("both after the reboot", shown, 60)
    assert containers.state("web1") == "running"
    assert (lab.main_pid(), lab.info("web1")["pid"]) == (daemon, guest)
    # One that stands still is waited for by nobody.
    lab.sh("systemctl kill -s STOP systemd-machined.service")
    containers.define("other", 'command = ["sleep", "600"]\n')
    lab.virtdctl("container", "stop", "other")
    assert containers.info("other")["exit"]["cause"] == "stop"
    lab.sh("systemctl kill -s CONT systemd-machined.service")
    lab.virtdctl("container", "stop", "web1")
    lab.virtdctl("stop", "web1")
    lab.wait("an empty list", lambda: machines(lab) == {}, 90)
    lab.sh("systemctl mask --now systemd-machined.service")
    try:
        lab.virtdctl("container", "start", "other")
        assert lab.json("status")["problems"] == []
        lab.virtdctl("container", "stop", "other")
    finally:
        lab.sh("systemctl unmask systemd-machined.service")
    assert lab.sh("systemctl list-units --all --plain --no-legend 'virtd-register-*'") == ""


def test_a_start_that_is_cut_off_leaves_nothing(containers: Containers) -> None:
    """The daemon is killed at some point of each of many starts."""
    lab = containers.lab
    containers.define("cut", 'command = ["sleep", "600"]\n', start=False)
    for number in range(12):
        lab.sh(
            f"virtdctl --daemon-timeout 20 container start cut & sleep {0.01 + 0.025 * number:.3f}; "
            "systemctl kill -s KILL virtd.service; wait",
            check=False,
        )
        lab.wait("a state", lambda: containers.state("cut") in ("running", "stopped"))
        if containers.state("cut") == "running":
            lab.virtdctl("container", "stop", "cut")
        assert lab.slots() == 0
    assert os.path.exists(LAB)
