# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bad input and bad days: each gives an error that helps, a neighbour doesn't notice, and the daemon starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab, check, definition
from tests.live.tools import KILL, Bystander, Journal, attached, away, drop_in, settings, undefine_others, write
from virtd.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.live

ETC = "/etc/virtd/qemu"
RECORD = "/run/virtd/qemu/victim.json"

# Talks to PID 1 as if it were the daemon: argv is a list of "put NAME", which stores an empty pipe's end, and
# "remove NAME". It joins the daemon's control group, since PID 1 looks from where a message comes.
MEDDLER = """
import array, os, socket, sys
with open("/sys/fs/cgroup/system.slice/virtd.service/cgroup.procs", "w") as file:
    file.write("0")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect("/run/systemd/notify")
    for word in sys.argv[1:]:
        verb, name = word.split()
        if verb == "remove":
            notify.send(f"FDSTOREREMOVE=1\\nFDNAME={name}".encode())
            continue
        fds = array.array("i", os.pipe())
        text = f"FDSTORE=1\\nFDPOLL=0\\nFDNAME={name}".encode()
        notify.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds[:1])])
    # BARRIER=1: PID 1 closes the pipe when it has read all that came before.
    reader, writer = os.pipe()
    notify.sendmsg([b"BARRIER=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))])
    os.close(writer)
    os.read(reader, 1)
"""

# A QEMU whose monitor takes connections and never says a word. Whatever it is asked otherwise, it does nothing.
MUTE = """#!/usr/bin/python3
import socket, sys, time
listeners = []
for word in sys.argv:
    if word.startswith("socket,") and "path=" in word:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(word.partition("path=")[2].partition(",")[0])
        listener.listen()
        listeners.append(listener)
while True:
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def bystander(booted: Lab) -> Iterator[Bystander]:
    try:
        booted.define("victim", cmdline="virtd.rate=200", start=True)
        yield Bystander.started(booted)
    finally:
        booted.undefine_all()
        booted.sh("rm -f /var/log/virtd/qemu/*")


@pytest.fixture
def lab(booted: Lab, bystander: Bystander) -> Iterator[Lab]:
    """The lab with the bystander in it, which is as it was when the test is over."""
    yield booted
    undefine_others(booted, bystander.name, "victim")
    if booted.info("victim")["problems"]:
        booted.virtdctl("stop", "victim")
    bystander.check()
    assert booted.json("status")["problems"] == []
    slots = sum(len(booted.info(item["name"])["slots"]) for item in booted.json("list"))
    booted.wait("the others' slots dropped", lambda: booted.slots() == slots, 10)
    booted.sh("rm -rf /run/virtd/quarantine")


@pytest.fixture
def victim(lab: Lab) -> str:
    """A guest that streams, and something is about to be done to it. It goes on to the next test if it lives."""
    if lab.info("victim")["state"] != "running":
        lab.sh("rm -f /var/log/virtd/qemu/victim.*")
        lab.virtdctl("start", "victim")
    return "victim"


def started_again(lab: Lab) -> None:
    """The daemon runs, has looked at every unit, and answers."""
    lab.wait("the daemon's answer", lambda: lab.virtdctl("list", check=False).returncode == 0, 20)


def status(lab: Lab) -> dict[str, Any]:
    """What `virtdctl status` says, whose exit status is 1 when there are problems."""
    value: dict[str, Any] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)
    return value


def under_control(lab: Lab, name: str) -> None:
    lab.wait("the monitor", lambda: lab.info(name)["monitor"] == "connected", 20)
    lab.virtdctl("suspend", name)
    assert lab.info(name)["state"] == "paused"
    lab.virtdctl("resume", name)
    assert lab.info(name)["state"] == "running"


# Definitions

KERNEL = definition("any").partition("\n")[2].partition("\n")[2]


def domain(name: str = '"newcomer"', memory: str = '"96M"', more: str = "") -> str:
    return f"name = {name}\nmemory = {memory}\n{more}\n{KERNEL}"


BAD = {
    "a wrong type": (domain(more='vcpus = "two"'), "vcpus: expected integer, got string"),
    "a wrong type inside": (domain() + "[[disk]]\npath = 7\n", "disk[0].path: expected string, got integer"),
    "an unknown key": (domain(more="memroy = 7"), "memroy: unknown key", "Did you mean memory?"),
    "an unknown key inside": (domain() + '[[disk]]\npath = "/a"\nformt = "raw"', "formt: unknown key", "format?"),
    "a key that is missing": ('name = "newcomer"\n', "memory: expected this key, which is missing"),
    "a name with a slash": (domain('"a/b"'), "name: expected 1 to 64 letters", '"a/b"'),
    "a name with a colon": (domain('"a:b"'), "name: expected 1 to 64 letters", '"a:b"'),
    "a name of 300 characters": (domain(f'"{"x" * 300}"'), "name: expected 1 to 64 letters", "(302 characters)"),
    "a name of dots": (domain('".."'), "name: expected 1 to 64 letters"),
    "a name of nothing": (domain('""'), "name: expected 1 to 64 letters"),
    "no memory": (domain(memory="0"), "memory: expected 1M to 4T, got 0"),
    "memory of 10 TiB": (domain(memory='"10TiB"'), "memory: expected 1M to 4T", "10TiB"),
    "a memory of words": (domain(memory='"plenty"'), 'memory: expected a size such as "256M"', "plenty"),
    "half a line": ("name = ", "expected TOML"),
    "no text at all": ("", "name: expected this key, which is missing"),
    "a choice that there isn't": (domain(more='on_crash = "explode"'), "on_crash: expected one of"),
    "a disk in nobody's format": (domain() + '[[disk]]\npath = "/a"\nformat = "vhdx"', "format: expected one of"),
}


def test_definitions_that_are_wrong(lab: Lab) -> None:
    before = lab.sh(f"ls -la --time-style=full-iso {ETC}"), lab.json("list")
    for what, (text, *said) in BAD.items():
        for options in ((), ("--check",)):
            done = lab.virtdctl("define", *options, "-", stdin=text, check=False)
            assert done.returncode == 1, what
            for words in ("<stdin>: ", *said):
                assert words in done.stderr, (what, done.stderr)
            assert "Traceback" not in done.stderr
    lab.write("/root/wrong.toml", domain(more="vcpus = true"))
    done = lab.virtdctl("define", "/root/wrong.toml", check=False)
    assert "/root/wrong.toml: vcpus: expected integer, got boolean" in done.stderr
    lab.sh("head -c 2000000 /dev/urandom >/root/wrong.toml")
    assert lab.virtdctl("define", "/root/wrong.toml", check=False).returncode == 1
    assert lab.virtdctl("define", "/nowhere.toml", check=False).returncode == 1
    assert (lab.sh(f"ls -la --time-style=full-iso {ETC}"), lab.json("list")) == before


def test_check_changes_nothing(lab: Lab) -> None:
    before = lab.sh(f"ls -la --time-style=full-iso {ETC}"), lab.json("list")
    done = lab.virtdctl("define", "--check", "-", stdin=domain())
    assert "OK, would define newcomer" in done.stdout
    done = lab.virtdctl("define", "--check", "-", stdin=domain('"bystander"', '"1G"'))
    assert "OK, would change bystander" in done.stdout
    assert (lab.sh(f"ls -la --time-style=full-iso {ETC}"), lab.json("list")) == before


def test_the_same_uuid_twice(lab: Lab, bystander: Bystander) -> None:
    taken = lab.info(bystander.name)["uuid"]
    for spelling in (taken, taken.upper(), taken.replace("-", "")):
        done = lab.virtdctl("define", "-", stdin=domain(more=f'uuid = "{spelling}"'), check=False)
        assert done.returncode == 1
        assert f"<stdin>: uuid: {taken} is the uuid of domain bystander" in done.stderr
        assert "Leave it out" in done.stderr
    assert [item["name"] for item in lab.json("list")] == ["bystander", "victim"]


def test_a_disk_that_is_not_there(lab: Lab) -> None:
    done = lab.virtdctl("define", "-", stdin=domain() + '[[disk]]\npath = "/srv/gone.qcow2"\nformat = "qcow2"\n')
    assert "warning: disk[0].path: no such file: /srv/gone.qcow2" in done.stderr
    done = lab.virtdctl("start", "newcomer", check=False)
    assert done.returncode == 1
    assert f"{ETC}/newcomer.toml: disk[0].path: no such file: /srv/gone.qcow2" in done.stderr
    info = lab.info("newcomer")
    assert (info["state"], info["slots"], info["pid"]) == ("stopped", [], None)
    assert lab.sh("ls /run/virtd/qemu | grep newcomer; systemctl list-units --all | grep newcomer", check=False) == ""


def test_more_memory_than_the_host_has(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=domain(memory='"3T"'))
    done = lab.virtdctl("start", "newcomer", check=False)
    assert done.returncode == 1
    assert f"{ETC}/newcomer.toml: memory: expected at most what the host has" in done.stderr


def test_systemd_refuses_the_unit(lab: Lab) -> None:
    """StartTransientUnit fails at once: an administrator has masked the unit."""
    lab.define("newcomer")
    unit = "virtd-qemu-newcomer.service"
    lab.sh(f"systemctl mask {unit}")
    refused_start(lab, f"there is a unit {unit} already", f"See: systemctl status {unit}")
    lab.sh(f"systemctl unmask {unit}")
    assert lab.json("fsck")["differences"] == []
    lab.virtdctl("start", "newcomer")
    lab.virtdctl("stop", "newcomer")


def test_a_unit_of_that_name_is_not_ours(lab: Lab) -> None:
    lab.define("newcomer")
    unit = "virtd-qemu-newcomer.service"
    lab.sh(f"systemd-run --unit={unit} sleep infinity")
    pid = lab.sh(f"systemctl show -P MainPID {unit}")
    refused_start(lab, f"{unit} is still running", f"See: systemctl status {unit}")
    assert lab.sh(f"systemctl show -P MainPID {unit}") == pid
    lab.sh(f"systemctl stop {unit}")
    lab.virtdctl("start", "newcomer")
    lab.virtdctl("stop", "newcomer")


def test_bad_files_put_there_by_hand(lab: Lab, bystander: Bystander) -> None:
    journal = Journal.now(lab)
    uuid = lab.info(bystander.name)["uuid"]
    lab.write(f"{ETC}/good.toml", domain('"good"'))
    lab.write(f"{ETC}/half.toml", "name = ")
    lab.write(f"{ETC}/other.toml", domain('"another"'))
    lab.write(f"{ETC}/twin.toml", domain('"twin"', more=f'uuid = "{uuid}"'))
    lab.sh(
        f"mkdir {ETC}/directory.toml; ln -s /nowhere {ETC}/dangling.toml; head -c 5000 /dev/urandom >{ETC}/noise.toml"
    )
    bad = {"half", "other", "twin", "directory", "dangling", "noise"}
    try:
        reload = lab.run("systemctl", "reload", "virtd.service", check=False)
        assert reload.returncode == 1, "a reload that found something wrong says so"
        assert "active" in lab.sh("systemctl is-active virtd.service")
        for again in ("", "systemctl restart virtd.service", KILL):
            lab.sh(again or "true")
            started_again(lab)
            problems = status(lab)["problems"]
            assert {problem["object"] for problem in problems} == {f"qemu/{name}" for name in bad}
            assert all(f"{ETC}/" in problem["text"] and problem["hint"] for problem in problems), problems
            assert {item["name"] for item in lab.json("list")} == {"bystander", "victim", "good"}
        text = lab.virtdctl("status", check=False)
        assert text.returncode == 1
        assert f'qemu/other: {ETC}/other.toml: name: expected "other", as the file is called' in text.stdout
        told = {entry["VIRTD_FILE"] for entry in journal.await_entries(f"MESSAGE_ID={Message.DEFINITION_PROBLEM}")}
        assert told == {f"{ETC}/{name}.toml" for name in bad}
    finally:
        lab.sh(f"cd {ETC}; rm -rf {' '.join(f'{name}.toml' for name in bad)}; systemctl reload virtd.service")


def test_the_running_guests_own_file_is_spoilt(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    good = lab.sh(f"cat {ETC}/victim.toml")
    lab.write(f"{ETC}/victim.toml", "name = 5\n")
    lab.sh(f"{KILL}; sleep 0.3", check=False)
    started_again(lab)
    info = lab.info(victim)
    assert (info["pid"], info["state"], info["memory"]) == (pid, "running", 96 << 20)
    assert lab.virtdctl("status", check=False).returncode == 1
    under_control(lab, victim)
    lab.write(f"{ETC}/victim.toml", good)
    lab.sh("systemctl reload virtd.service")
    assert lab.virtdctl("status").returncode == 0
    lab.virtdctl("stop", victim)


def test_settings_that_are_wrong(lab: Lab) -> None:
    for text, said in (
        ("[log]\nmax_size = 7\n", "log.max_size: expected a size of at least 64K"),
        ("[qemu]\nbinry = '/bin/true'\n", "qemu.binry: unknown key"),
        ("nonsense", "expected TOML"),
    ):
        with settings(lab, text):
            started_again(lab)
            shown = lab.virtdctl("status", check=False)
            assert shown.returncode == 1
            assert f"/etc/virtd/virtd.toml: {said}" in shown.stdout


# Records


def spoil(lab: Lab, change: Callable[[str], str] | None) -> None:
    """Have the victim's record be something else when the daemon comes to read it."""
    with away(lab):
        if change is None:
            lab.sh(f"rm {RECORD}")
        else:
            write(lab, RECORD, change(lab.sh(f"cat {RECORD}")))


def of_the_future(text: str) -> str:
    record = json.loads(text) | {"schema": 99, "hologram": {"depth": [1, 2.5, "ü"]}, "colour": None}
    record["data"]["tractor-beam"] = "on"
    return json.dumps(record)


SPOILT: dict[str, Callable[[str], str] | None] = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2, 3]",
    "wrong types": lambda text: json.dumps(json.loads(text) | {"main_pid": "many", "slots": 7}),
    "of another name": lambda text: json.dumps(json.loads(text) | {"name": "somebody"}),
    "gone": None,
}


def test_records_that_are_spoilt(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    lab.wait_lines(victim, 20)
    for what, change in SPOILT.items():
        journal = Journal.now(lab)
        spoil(lab, change)
        info = lab.wait(f"the rebuilding ({what})", lambda: (i := lab.info(victim))["state"] == "running" and i, 20)
        assert (info["pid"], len(info["slots"])) == (pid, 5), what
        recovered = lab.json("status")["recovered"]
        assert (recovered["rebuilt"], recovered["adopted"]) == (["victim"], ["bystander"]), what
        under_control(lab, victim)
        if change is not None:
            (entry,) = journal.await_entries(f"MESSAGE_ID={Message.RECORD_QUARANTINED}")
            assert (entry["VIRTD_NAME"], entry["VIRTD_DRIVER"]) == ("victim", "qemu")
            assert lab.sh(f"cat {entry['VIRTD_FILE']}") or what == "empty"
    # And the rebuilt record is as good as the first.
    lab.sh("systemctl restart virtd.service")
    assert lab.info(victim)["pid"] == pid
    tally = check(lab.console(victim))
    assert tally.whole, (tally.lost, tally.repeated, tally.broken[:3])
    lab.virtdctl("shutdown", victim)
    assert lab.info(victim)["exit"]["cause"] == "shutdown"


def test_a_record_of_a_newer_version(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    spoil(lab, of_the_future)
    info = lab.wait("its adoption", lambda: (i := lab.info(victim))["monitor"] == "connected" and i, 20)
    assert (info["pid"], info["state"]) == (pid, "running")
    under_control(lab, victim)
    record = json.loads(lab.sh(f"cat {RECORD}"))
    assert record["hologram"] == {"depth": [1, 2.5, "ü"]}
    assert record["data"]["tractor-beam"] == "on"
    assert record["schema"] == 99, "what was added to it is still there, so it is still of that schema"
    assert lab.sh("ls /run/virtd/quarantine 2>/dev/null", check=False) == ""


# The store


def meddle(lab: Lab, *words: str) -> None:
    """Change virtd's store behind its back, then have it started again."""
    lab.write("/root/meddler.py", MEDDLER)
    with drop_in(lab, "[Service]\nNotifyAccess=all\n"), away(lab):  # or it would give back what it misses
        lab.run("python3", "/root/meddler.py", *words)


def test_a_store_that_lacks_slots(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    lab.wait_lines(victim, 20)
    journal = Journal.now(lab)
    meddle(lab, "remove qemu/victim/stdin", "remove qemu/victim/console.log")
    info = lab.wait("the monitor", lambda: (i := lab.info(victim))["monitor"] == "connected" and i, 20)
    assert (info["pid"], info["state"]) == (pid, "running")
    (problem,) = status(lab)["problems"]
    assert "qemu/victim/stdin" in problem["text"]
    assert problem["hint"]
    assert {entry["VIRTD_SLOT"] for entry in journal.await_entries(f"MESSAGE_ID={Message.SLOT_LOST}")} == {
        "qemu/victim/stdin"
    }
    refused = lab.virtdctl("console", victim, check=False)
    assert refused.returncode == 1
    assert "takes no input" in refused.stderr
    before = check(lab.console(victim))
    lab.wait("more lines", lambda: check(lab.console(victim)).lines > before.lines, 20)
    under_control(lab, victim)
    # The log was opened again by its path, and is in the store once more.
    lab.wait("the log's slot", lambda: "qemu/victim/console.log" in lab.info(victim)["slots"], 20)
    assert check(lab.console(victim)).whole
    lab.virtdctl("stop", victim)
    assert lab.json("status")["problems"] == []


def test_a_store_that_has_slots_nobody_knows(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    journal = Journal.now(lab)
    meddle(
        lab,
        "put qemu/ghost/stdout",
        "put qemu/victim/extra",
        "put qemu/victim/stdin",
        "put hologram/x/y",
        "put nonsense",
    )
    info = lab.wait("the monitor", lambda: (i := lab.info(victim))["monitor"] == "connected" and i, 20)
    assert (info["pid"], info["state"]) == (pid, "running")
    assert [entry["VIRTD_NAME"] for entry in journal.await_entries(f"MESSAGE_ID={Message.ROLLED_BACK}")] == ["ghost"]
    assert {item["name"] for item in lab.json("list")} == {"bystander", "victim"}
    lab.wait_lines(victim, 20)
    with attached(lab, victim) as console:
        assert console.ask("the-right-pipe")
    degraded = "the FD store holds what this version doesn't know: hologram/x/y, nonsense"
    assert degraded in lab.json("status")["degraded"]
    lab.virtdctl("stop", victim)
    lab.wait("the slots dropped", lambda: lab.slots() == 5 + 2, 10)
    names = lab.sh("systemd-analyze fdstore virtd.service", check=False)  # 252 has no such command
    assert "qemu/ghost" not in names
    assert "qemu/victim" not in names
    meddle(lab, "remove hologram/x/y", "remove nonsense")


# QEMU


def refused_start(lab: Lab, *said: str) -> None:
    """`newcomer` doesn't start, the words say why, and nothing of the try is left."""
    units = "systemctl list-units --all --plain --no-legend 'virtd-qemu-newcomer*'"
    before = lab.slots(), lab.sh(units)
    done = lab.virtdctl("start", "newcomer", check=False)
    assert done.returncode == 1
    for words in said:
        assert words in done.stderr, done.stderr
    info = lab.info("newcomer")
    assert (info["state"], info["slots"], info["pid"]) == ("stopped", [], None)
    assert lab.sh("ls -d /run/virtd/qemu/newcomer", check=False) == ""
    assert (lab.slots(), lab.sh(units)) == before


def test_qemu_that_cannot_be_run(lab: Lab) -> None:
    lab.define("newcomer")
    lab.write("/usr/local/bin/not-executable", "#!/bin/sh")
    lab.write("/usr/local/bin/no-program", "x")
    lab.sh("chmod 755 /usr/local/bin/no-program")
    for binary, *said in (
        ("/usr/bin/no-qemu", "QEMU is missing: no /usr/bin/no-qemu", "Install qemu-system"),
        ("/usr/local/bin/not-executable", "/usr/local/bin/not-executable is not executable", "qemu.binary"),
        ("/usr/local/bin/no-program", "cannot execute /usr/local/bin/no-program"),
        ("/bin/false", "newcomer", "status 1"),
    ):
        with settings(lab, f'[qemu]\nbinary = "{binary}"\n'):
            refused_start(lab, *said)
            assert lab.json("status")["problems"] == []
    lab.sh("rm /usr/local/bin/no*")


def test_qemu_that_says_why(lab: Lab) -> None:
    for more, said in (
        ('machine = "pdp11"', "unsupported machine type"),
        ('cpu = "Z80"', "unable to find CPU model 'Z80'"),
    ):
        lab.virtdctl("define", "-", stdin=domain(more=more))
        refused_start(lab, "start newcomer: ", said)


def test_a_monitor_that_never_answers(lab: Lab) -> None:
    lab.define("newcomer")
    lab.write("/usr/local/bin/mute-qemu", MUTE)
    lab.sh("chmod 755 /usr/local/bin/mute-qemu")
    with settings(lab, '[qemu]\nbinary = "/usr/local/bin/mute-qemu"\nstart_timeout = 2\n'):
        refused_start(lab, "The QEMU monitor of newcomer didn't answer within 2 s")
        assert lab.sh("pgrep mute-qemu", check=False) == ""


def test_a_qemu_that_stops_answering(lab: Lab, victim: str) -> None:
    pid = lab.info(victim)["pid"]
    lab.sh(f"kill -STOP {pid}")
    refused = lab.virtdctl("suspend", victim, check=False)
    assert refused.returncode == 1
    assert "The QEMU monitor of victim didn't answer stop within 5 s" in refused.stderr
    assert [item["state"] for item in lab.json("list")] == ["running", "running"]
    lab.sh(KILL)
    problems = lab.wait("the problem", lambda: status(lab)["problems"], 20)
    assert [problem["object"] for problem in problems] == ["qemu/victim"]
    assert "virtdctl stop victim" in problems[0]["hint"]
    info = lab.info(victim)
    assert (info["pid"], info["state"]) == (pid, "running")
    lab.virtdctl("stop", victim)
    info = lab.info(victim)
    assert (info["state"], info["exit"]["cause"], info["exit"]["signal"]) == ("stopped", "stop", "SIGKILL")


# The budget


def test_the_budget_refuses_one_guest_too_many(lab: Lab, victim: str) -> None:
    lab.define("third")
    with drop_in(lab, "[Service]\nFileDescriptorStoreMax=12\n"):
        journal = Journal.now(lab)
        assert lab.json("status")["budget"] == {"used": 10, "max": 12, "limited_by": "FileDescriptorStoreMax"}
        done = lab.virtdctl("start", "third", check=False)
        assert done.returncode == 1
        assert "10 slots are used" in done.stderr
        assert "FileDescriptorStoreMax=" in done.stderr
        (entry,) = journal.await_entries(f"MESSAGE_ID={Message.BUDGET_REFUSED}")
        assert (entry["VIRTD_NAME"], entry["VIRTD_USED"], entry["VIRTD_MAX"]) == ("third", "10", "12")
        assert lab.info("third")["state"] == "stopped"
        assert lab.slots() == 10
    lab.virtdctl("start", "third")
