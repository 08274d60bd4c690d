# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1 on the system bus, as busctl(1) and a client that never pauses see it."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import LAB
from virtd.connections import HANGING, UNITS_LIMIT

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

NAME = "org.virtd1"
ROOT = "/org/virtd1"
DOMAIN = "org.virtd1.Domain"
MANAGER = "org.virtd1.Manager"
WEB = f"{ROOT}/domain/web_2d1"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

# Lists for so many seconds without a pause; prints how many calls were answered, and the errors.
CALLER = """
import json, sys, time
import pydbus
from gi.repository import GLib
connection = pydbus.connect("unix:path=/run/dbus/system_bus_socket").con
end = time.monotonic() + float(sys.argv[1])
answered, failed = 0, []
while time.monotonic() < end:
    try:
        connection.call_sync("org.virtd1", "/org/virtd1", "org.virtd1.Manager", "List", None, None, 0, 60000, None)
        answered += 1
    except GLib.Error as error:
        failed.append(error.message)
print(json.dumps([answered, failed]))
"""

# Prints virtd's signals, up to and with the first Ended.
WATCHER = """
import json
import pydbus
from gi.repository import GLib
loop = GLib.MainLoop()
connection = pydbus.connect("unix:path=/run/dbus/system_bus_socket").con
def heard(connection, sender, path, interface, member, values):
    print(json.dumps([path, member, values.unpack()]), flush=True)
    if member == "Ended":
        loop.quit()
connection.signal_subscribe("org.virtd1", None, None, None, None, 0, heard)
connection.call_sync("org.virtd1", "/", "org.freedesktop.DBus.Peer", "Ping", None, None, 0, 60000, None)
print("watching", flush=True)
loop.run()
"""


def busctl(lab: Lab, *arguments: str, by: tuple[str, ...] = ()) -> list[Any]:
    """The values that a busctl command prints."""
    out = lab.run(*by, "busctl", "--json=short", *arguments).stdout
    return [json.loads(line)["data"] for line in out.splitlines()]


def call(lab: Lab, path: str, interface: str, method: str, *arguments: str) -> list[Any]:
    """The out-arguments of a method."""
    found = busctl(lab, "call", NAME, path, interface, method, *arguments)
    return list(found[0]) if found else []


def test_a_domain_from_start_to_end(lab: Lab) -> None:
    lab.define("web-1")
    assert WEB in lab.run("busctl", "tree", "--list", NAME).stdout.split()
    assert ".Start" in lab.run("busctl", "introspect", NAME, WEB, DOMAIN).stdout
    assert busctl(lab, "get-property", NAME, WEB, DOMAIN, "State", "Pid", "Id") == ["stopped", 0, -1]
    assert call(lab, WEB, DOMAIN, "Start") == [True]
    assert call(lab, WEB, DOMAIN, "Start") == [False]
    pid = lab.info("web-1")["pid"]
    assert busctl(lab, "get-property", NAME, WEB, DOMAIN, "State", "Pid") == ["running", pid]
    assert busctl(lab, "get-property", NAME, ROOT, MANAGER, "Running", "Domains") == [1, 1]
    (managed,) = call(lab, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    assert managed[WEB][DOMAIN]["Pid"]["data"] == pid
    refused = lab.run("busctl", "call", NAME, WEB, DOMAIN, "Undefine", check=False)
    assert refused.returncode == 1
    assert "it is running" in refused.stderr
    assert call(lab, WEB, DOMAIN, "Stop") == [True]
    (ending,) = busctl(lab, "get-property", NAME, WEB, DOMAIN, "Exit")
    assert ending["cause"]["data"] == "stop"
    assert call(lab, WEB, DOMAIN, "Undefine") == []
    assert WEB not in lab.run("busctl", "tree", "--list", NAME).stdout.split()


def test_what_happens_is_told(lab: Lab) -> None:
    lab.define("web-1", start=True)
    command = (LAB, "exec", lab.name, "--", "timeout", "30", "python3", "-c", WATCHER)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        call(lab, WEB, DOMAIN, "Kill", "i", "9")
        heard = [json.loads(line) for line in watcher.stdout]
    changed: dict[str, Any] = {}
    for path, member, values in heard:
        if member == "PropertiesChanged" and path == WEB:
            changed |= values[1]
    assert changed["Pid"] == 0
    assert changed["State"] in ("crashed", "stopped")
    path, member, (ending,) = heard[-1]
    assert (path, member) == (WEB, "Ended")
    assert (ending["signal"], ending["cause"]) == ("SIGKILL", "killed")


def test_no_call_fails_in_a_restart(lab: Lab) -> None:
    lab.define("web-1", start=True)
    # A stop job needs a moment, so the last restart is over before the caller is.
    script = "for i in 1 2 3 4 5 6 7 8; do systemctl restart virtd.service; sleep 0.3; done"
    command = (LAB, "exec", lab.name, "--", "python3", "-c", CALLER, "12")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        lab.sh(f"systemctl reset-failed virtd.service; {script}")
        out, _ = caller.communicate(timeout=60)
    answered, failed = json.loads(out)
    assert not failed
    assert answered > 8


def test_a_call_starts_the_daemon(lab: Lab) -> None:
    lab.define("web-1", start=True)
    pid = lab.info("web-1")["pid"]
    lab.sh("systemctl stop virtd.service 2>&1")
    assert busctl(lab, "get-property", NAME, WEB, DOMAIN, "Pid") == [pid]
    assert lab.main_pid() > 0


def test_reading_is_for_all_and_changing_for_root(lab: Lab) -> None:
    lab.define("web-1")
    assert busctl(lab, "get-property", NAME, WEB, DOMAIN, "State", by=NOBODY) == ["stopped"]
    assert busctl(lab, "call", NAME, ROOT, MANAGER, "List", by=NOBODY)[0][0][0][0] == "web-1"
    assert WEB in lab.run(*NOBODY, "busctl", "tree", "--list", NAME).stdout.split()
    refused = lab.run(*NOBODY, "busctl", "call", NAME, WEB, DOMAIN, "Start", check=False)
    assert refused.returncode == 1
    assert "denied" in refused.stderr.lower()
    assert lab.info("web-1")["state"] == "stopped"


def test_an_operation_waits_for_a_bus_that_hangs(lab: Lab) -> None:
    """As dbus-daemon does while it waits for systemd-machined. One that isn't there isn't waited for that long."""
    lab.define("web1")
    lab.sh("systemctl kill -s STOP dbus.service && systemctl restart virtd.service")
    with subprocess.Popen([LAB, "exec", lab.name, "--", "virtdctl", "start", "web1"]) as starting:
        try:
            lab.wait("the problem", lambda: told(lab) == [HANGING[0]], 60)
            time.sleep(UNITS_LIMIT)
            assert starting.poll() is None
        finally:
            lab.sh("systemctl kill -s CONT dbus.service")
        assert starting.wait(60) == 0
    assert lab.info("web1")["state"] == "running"
    assert told(lab) == []
    assert "D-Bus answers again" in lab.sh("journalctl -b -u virtd.service")


def told(lab: Lab) -> list[str]:
    problems = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return [one["text"] for one in problems]


def test_dbus_daemon_does_not_wait_for_machined(lab: Lab) -> None:
    """For which it takes the file that the package brings, and a dbus-daemon that was started with it."""
    lab.define("web1", start=True)
    lab.wait("its registration", lambda: "qemu-web1" in lab.sh("machinectl --no-legend list"), 60)
    lab.sh("systemctl restart dbus.service")
    lab.wait("machined on the new bus", lambda: "qemu-web1" in lab.sh("machinectl --no-legend list", check=False), 60)
    lab.sh("systemctl kill -s STOP systemd-machined.service; kill -HUP $(systemctl show -P MainPID dbus.service)")
    try:
        words = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId")
        assert lab.run("timeout", "20", "busctl", "call", *words).stdout.startswith("s ")
    finally:
        lab.sh("systemctl kill -s CONT systemd-machined.service")
