# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be seen of virtd and its guests with the system's own tools: D-Bus, Varlink, the journal, /proc.

test_dbus.py has the calls of org.virtd1; here are its objects' coming and going, and everything else.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab, definition
from tests.live.tools import KILL, Journal, drop_in, spawn, write
from virtd.messages import FIELDS, Message

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

SOCKET = "/run/virtd/virtd.sock"
USER = "virtd-test-user"
# Shown by test_networks.py, test_neighbours.py, test_hard_days*.py, test_hostile_children.py and test_late_boot.py.
ELSEWHERE = {message for message in Message if message.name.startswith("NETWORK_")} | {
    Message.STORE_AT_RISK, Message.DISK_LOST, Message.EVENTS_HELD_BACK, Message.AUTOSTARTED_LATE,
    Message.GUEST_STOOD_STILL, Message.DISK_FAILED, Message.TPM_ENDED, Message.MEDIUM_MISSING,
}  # fmt: skip

# Prints org.freedesktop.DBus.ObjectManager's signals of virtd, up to and with the first InterfacesRemoved.
WATCHER = """
import json
import pydbus
from gi.repository import GLib
loop = GLib.MainLoop()
connection = pydbus.connect("unix:path=/run/dbus/system_bus_socket").con
def heard(connection, sender, path, interface, member, values):
    print(json.dumps([path, member, values.unpack()]), flush=True)
    if member == "InterfacesRemoved":
        loop.quit()
connection.signal_subscribe("org.virtd1", "org.freedesktop.DBus.ObjectManager", None, None, None, 0, heard)
connection.call_sync("org.virtd1", "/", "org.freedesktop.DBus.Peer", "Ping", None, None, 0, 60000, None)
print("watching", flush=True)
loop.run()
"""


@pytest.fixture(scope="module")
def user(booted: Lab) -> Iterator[tuple[str, ...]]:
    """How to run a command as an ordinary user."""
    booted.sh(f"useradd --create-home {USER}")
    yield ("runuser", "-u", USER, "--")
    booted.sh(f"userdel --remove {USER} 2>/dev/null")


@pytest.fixture(scope="module")
def varlinkctl(booted: Lab) -> None:
    if booted.run("sh", "-c", "command -v varlinkctl", check=False).returncode:
        pytest.skip("systemd before 255 has no varlinkctl")


# D-Bus


def test_objects_come_and_go(lab: Lab) -> None:
    with spawn(lab, "timeout", "60", "python3", "-c", WATCHER) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        lab.define("web1")
        lab.virtdctl("undefine", "web1")
        heard = [json.loads(line) for line in watcher.stdout]
    (root, added, (path, interfaces)), (_, removed, (gone, names)) = heard
    assert (root, added, removed) == ("/org/virtd1", "InterfacesAdded", "InterfacesRemoved")
    assert path == gone == "/org/virtd1/domain/web1"
    assert interfaces["org.virtd1.Domain"]["Name"] == "web1"
    assert "org.virtd1.Domain" in names


# Varlink


@pytest.mark.usefixtures("varlinkctl")
def test_varlinkctl(lab: Lab) -> None:
    lab.define("web1", start=True)
    assert "org.virtd1" in lab.run("varlinkctl", "info", SOCKET).stdout
    assert "org.virtd1" in lab.run("varlinkctl", "list-interfaces", SOCKET).stdout.split()
    described = lab.run("varlinkctl", "introspect", SOCKET, "org.virtd1").stdout
    assert "method Start(" in described
    assert "error InvalidDefinition" in described
    (item,) = varlink(lab, "List", {})["objects"]
    assert (item["name"], item["state"]) == ("web1", "running")
    refused = lab.run("varlinkctl", "call", SOCKET, "org.virtd1.Info", '{"name": "nobody"}', check=False)
    assert refused.returncode != 0
    assert "org.virtd1.NotFound" in refused.stderr
    refused = lab.run("varlinkctl", "call", SOCKET, "org.virtd1.Info", '{"name": 7}', check=False)
    assert "org.varlink.service.InvalidParameter" in refused.stderr
    refused = lab.run("varlinkctl", "call", SOCKET, "org.virtd1.Fly", "{}", check=False)
    assert "org.varlink.service.MethodNotFound" in refused.stderr


def varlink(lab: Lab, method: str, parameters: dict[str, Any]) -> Any:
    done = lab.run("varlinkctl", "--json=short", "call", SOCKET, f"org.virtd1.{method}", json.dumps(parameters))
    return json.loads(done.stdout)


def test_a_call_starts_the_daemon_and_is_answered(lab: Lab) -> None:
    lab.define("web1", start=True)
    pid = lab.info("web1")["pid"]
    lab.sh("systemctl stop virtd.service 2>/dev/null")
    assert lab.sh("systemctl is-active virtd.service", check=False) == "inactive\n"
    assert lab.info("web1")["pid"] == pid
    assert lab.sh("systemctl is-active virtd.service") == "active\n"


def test_twenty_calls_around_a_restart(lab: Lab) -> None:
    lab.define("web1", start=True)
    script = (
        "for n in $(seq 20); do { said=$(virtdctl info web1 --json 2>&1) || echo $said; } & "
        "sleep 0.02; [ $n -eq 5 ] && systemctl restart virtd.service & done; wait"
    )
    assert lab.sh(script) == ""
    assert lab.info("web1")["state"] == "running"


# Who may what


def test_an_ordinary_user_may_look(lab: Lab, user: tuple[str, ...]) -> None:
    lab.define("web1", start=True)
    for reading in (
        ("list",),
        ("info", "web1"),
        ("status",),
        ("dump", "web1"),
        ("wait", "--state", "running", "web1"),
    ):
        assert lab.run(*user, "virtdctl", *reading).returncode == 0, reading
    assert "web1" in lab.run(*user, "virtdctl", "list").stdout
    uid = lab.sh(f"id -u {USER}").strip()
    changing = [("start", "web1"), ("stop", "web1"), ("kill", "web1"), ("suspend", "web1"), ("undefine", "web1"),
                ("shutdown", "web1"), ("reboot", "web1"), ("resume", "web1"), ("autostart", "web1"), ("define", "-"),
                ("reload",), ("console", "web1"), ("log", "web1")]  # fmt: skip
    for command in changing:
        refused = lab.run(*user, "virtdctl", *command, check=False, stdin=definition("web2"))
        assert refused.returncode == 1, command
        assert f"uid {uid} may not call" in refused.stderr, (command, refused.stderr)
        assert "Only root may" in refused.stderr
    (item,) = lab.json("list")
    assert (item["name"], item["state"], item["autostart"]) == ("web1", "running", False)
    # Neither can the files be read behind the daemon's back.
    for path in (
        "/var/log/virtd/qemu/web1.console.log",
        "/run/virtd/qemu/web1.json",
        "/run/virtd/qemu/web1/qmp.sock",
    ):
        assert lab.run(*user, "cat", path, check=False).returncode != 0, path
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/virtd/qemu/web1/qmp.sock')"
    assert "PermissionError" in lab.run(*user, "python3", "-c", connect, check=False).stderr


# The guest's process


def test_how_qemu_runs(lab: Lab) -> None:
    lab.define("web1", start=True)
    lab.define("web2", start=True)
    pid = lab.info("web1")["pid"]
    status = dict(line.split(":\t", 1) for line in lab.sh(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    uid = lab.sh("id -u vm-web1").strip()
    assert set(status["Uid"].split()) == {uid}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[key], 16) for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    environment = lab.sh(f"tr '\\0' '\\n' </proc/{pid}/environ").splitlines()
    names = {line.partition("=")[0] for line in environment}
    assert not {name for name in names if name.startswith(("NOTIFY_", "LISTEN_", "FDSTORE", "WATCHDOG_"))}, names
    command = lab.sh(f"tr '\\0' ' ' </proc/{pid}/cmdline")
    assert "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny" in command
    # Its unit's view of the file system: its own files, and nobody else's.
    seen = lab.run("nsenter", f"--target={pid}", "--mount", "--", "sh", "-c",
                   "ls /run/virtd/qemu /etc /var /home /root /srv 2>&1; cat /etc/shadow; exit 0")  # fmt: skip
    assert "web1" in seen.stdout
    for hidden in ("web2", "web1.json", "passwd", "log", "lib"):
        assert hidden not in seen.stdout.split(), (hidden, seen.stdout)
    # It has what virtd gave it and what it opened itself, and nothing of virtd's.
    files = lab.sh(f"ls -l /proc/{pid}/fd")
    assert "/var/log" not in files
    assert "virtd.sock" not in files
    assert lab.sh("systemctl show -P Slice virtd-qemu-web1.service") == "virtd-qemu.slice\n"
    assert lab.sh("systemctl show -P Slice virtd.service").strip() in ("system.slice", "virtd.slice")


# The journal


def test_what_the_journal_tells(lab: Lab) -> None:
    journal = Journal.now(lab)
    lab.define("web1", start=True)
    info = lab.info("web1")
    lab.sh(KILL)
    lab.wait("the adoption", lambda: lab.virtdctl("info", "web1", check=False).returncode == 0)
    with drop_in(lab, "[Service]\nFileDescriptorStoreMax=8\n"):
        lab.define("web2")
        assert lab.virtdctl("start", "web2", check=False).returncode == 1
    # A start that was cut off: the record is there, and nothing else is.
    record = json.loads(lab.sh("cat /run/virtd/qemu/web1.json"))
    # A slot that the record tells of, and that isn't there.
    lab.sh("systemctl stop virtd.service 2>/dev/null")
    record["slots"]["qemu/web1/stdin"] = "1:1"
    write(lab, "/run/virtd/qemu/web1.json", json.dumps(record))
    record |= {"name": "web2", "uuid": lab.sh("cat /proc/sys/kernel/random/uuid").strip(), "state": "starting"}
    record |= {"unit": "virtd-qemu-web2.service", "main_pid": 0, "main_start": 0, "invocation_id": "", "slots": {}}
    write(lab, "/run/virtd/qemu/web2.json", json.dumps(record))
    write(lab, "/run/virtd/qemu/web3.json", "{")
    lab.sh("systemctl start virtd.service")
    assert lab.info("web2")["state"] == "stopped"
    write(lab, "/etc/virtd/qemu/bad.toml", "name = 1")
    assert lab.run("systemctl", "reload", "virtd.service", check=False).returncode == 1
    lab.sh("rm /etc/virtd/qemu/bad.toml; systemctl reload virtd.service; rm -r /run/virtd/quarantine")
    lab.virtdctl("kill", "-s", "KILL", "web1")

    for message in (message for message in Message if message not in ELSEWHERE):
        entry = journal.await_entries(f"MESSAGE_ID={message}")[0]
        assert entry["SYSLOG_IDENTIFIER"] == "virtd"
        assert entry["_SYSTEMD_UNIT"] == "virtd.service"
        for field in FIELDS[message]:
            assert entry.get(field), (message.name, field)
    of_web1 = journal.entries("VIRTD_NAME=web1", "VIRTD_DRIVER=qemu", f"VIRTD_UUID={info['uuid']}")
    told = [entry["MESSAGE_ID"] for entry in of_web1 if "MESSAGE_ID" in entry]
    assert told[0] == Message.STARTED
    assert told[-1] == Message.ENDED
    (ended,) = journal.entries(f"MESSAGE_ID={Message.ENDED}")
    assert (ended["VIRTD_CAUSE"], ended["VIRTD_UNIT"]) == ("killed", "virtd-qemu-web1.service")
    (lost,) = journal.entries(f"MESSAGE_ID={Message.SLOT_LOST}")
    assert lost["VIRTD_SLOT"] == "qemu/web1/stdin"
    # The catalogue explains each of them, with the object's name in it.
    explained = lab.run("journalctl", "-q", "-x", "--after-cursor", journal.cursor, "-t", "virtd").stdout
    for words in (
        'qemu "web1" was started', "virtd has recovered its objects", "is still running and under control again",
        'An unfinished start of qemu "web2" was rolled back', "no room for its file descriptors", "has ended: killed",
        "systemd no longer holds qemu/web1/stdin", "bad.toml can't be used", 'record of qemu "web3" can\'t be read',
    ):  # fmt: skip
        assert words in explained, words
    assert not re.search(r"@[A-Z_]+@", explained), "a field that the entry hasn't got"


def test_what_qemu_says_is_in_the_journal(lab: Lab) -> None:
    journal = Journal.now(lab)
    lab.define("web1", start=True)
    lab.sh(f"kill -TERM {lab.info('web1')['pid']}")
    entries = journal.await_entries("VIRTD_NAME=web1", "_SYSTEMD_UNIT=virtd.service")
    said = lab.wait(
        "QEMU's words",
        lambda: [
            e["MESSAGE"] for e in journal.entries("VIRTD_NAME=web1") if "terminating on signal 15" in e["MESSAGE"]
        ],
    )
    assert len(said) == 1
    assert entries[0]["VIRTD_UUID"]


def test_systemctl_status(lab: Lab) -> None:
    lab.define("web1", start=True)
    lab.sh("systemctl restart virtd.service")
    shown = lab.wait(
        "the status", lambda: "1 domain running" in (s := lab.sh("systemctl status virtd.service --no-pager")) and s
    )
    assert re.search(r"1 domain running; recovered 1 in [0-9.]+ ms at the last start", shown), shown
    # That is said once systemd was asked, a moment after READY.
    recovered = re.compile(r"Recovered 1 domain in [0-9.]+ ms \(1 adopted\)")
    lab.wait("the journal", lambda: recovered.search(lab.sh("journalctl -u virtd.service -n 20")), 20)
    shown = lab.virtdctl("status").stdout
    assert "1 running" in shown
    assert "running on: web1" in shown
    assert "Slots: 5 of " in shown


def test_a_start_right_after_the_daemons_own(lab: Lab) -> None:
    """The daemon answers before it has compared what it knows with systemd; a start waits for that."""
    lab.define("web1")
    for _ in range(8):
        lab.sh("systemctl restart virtd.service; virtdctl start web1")
        info = lab.info("web1")
        assert (info["state"], len(info["slots"])) == ("running", 5)
        lab.virtdctl("stop", "web1")
    assert lab.json("status")["problems"] == []
