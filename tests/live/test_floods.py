# SPDX-License-Identifier: LGPL-2.1-or-later
"""Too much, for too long: a console that is flooded, a pipe that nobody empties, readers that don't read.

How long things take is `python -m tests.bench --only flood`; here is what mustn't grow, and what must still work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.harness import Attached, Checker, Lab, check
from tests.live.tools import KILL, attached, settings, spawn

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.live

LIMIT, BACKUPS = 256 << 10, 2
LINE = 512  # bytes past its limit that a log may have, so that it ends with a line
LOGS = "/var/log/virtd/qemu"

# What a process has: descriptors, and PSS in KiB.
USED = """
import os, sys
pid = sys.argv[1]
with open(f"/proc/{pid}/smaps_rollup") as file:
    print(len(os.listdir(f"/proc/{pid}/fd")), next(line.split()[1] for line in file if line.startswith("Pss:")))
"""

# The pipe of a guest's console: its size, which is changed to argv[2] if that is given, and what is in it.
PIPE = """
import fcntl, os, sys, termios
fd = os.open(f"/proc/{sys.argv[1]}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
if len(sys.argv) > 2:
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, int(sys.argv[2]))
fill = fcntl.ioctl(fd, termios.FIONREAD, b"\\0\\0\\0\\0")
print(fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ), int.from_bytes(fill, sys.byteorder))
"""

# Clients that ask and never read an answer. Each sends as much as it is let; then all of them just stay.
DEAF_CALLERS = """
import json, signal, socket
links = []
for method, parameters, more in (
    *[("Info", {"name": "other"}, False)] * 10,
    *[("Status", {}, False)] * 10,
    *[("Follow", {"name": "flood", "log": "console", "wait": True}, False)] * 10,
    *[("OpenConsole", {"name": "flood", "force": True}, True)] * 10,
):
    link = socket.socket(socket.AF_UNIX)
    link.connect("/run/virtd/virtd.sock")
    call = json.dumps({"method": f"org.virtd1.{method}", "parameters": parameters, "more": more}).encode() + b"\\0"
    link.setblocking(False)
    try:
        for _ in range(20000):
            link.send(call)
    except BlockingIOError:
        pass
    links.append(link)
print("asked", flush=True)
signal.pause()
"""

# A client that wants every signal of virtd's and takes none.
DEAF_SUBSCRIBER = """
import os, signal
from gi.repository import Gio
bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
bus.signal_subscribe("org.virtd1", None, None, None, None, Gio.DBusSignalFlags.NONE, print)
bus.call_sync("org.virtd1", "/org/virtd1", "org.freedesktop.DBus.Peer", "Ping", None, None, 0, -1)
print("subscribed", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""

# Events without end: each change of state is a signal on D-Bus, and a word for whoever follows.
EVENTS = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect("/run/virtd/virtd.sock")
    for _ in range(int(sys.argv[1])):
        for method in ("Suspend", "Resume"):
            call = {"method": f"org.virtd1.{method}", "parameters": {"name": "other"}}
            link.sendall(json.dumps(call).encode() + b"\\0")
            answer = b""
            while not answer.endswith(b"\\0"):
                answer += link.recv(65536)
            assert b"error" not in answer, answer
"""


def used(lab: Lab) -> tuple[int, int]:
    """The daemon's descriptors, and its PSS in KiB."""
    fds, pss = lab.run("python3", "-c", USED, str(lab.main_pid())).stdout.split()
    return int(fds), int(pss)


def pipe(lab: Lab, pid: int, *size: int) -> tuple[int, int]:
    """How much the guest's pipe holds, and how much is in it."""
    holds, has = lab.run("python3", "-c", PIPE, str(pid), *map(str, size)).stdout.split()
    return int(holds), int(has)


def sizes(lab: Lab, name: str) -> list[int]:
    return [int(size) for size in lab.sh(f"stat -c %s {LOGS}/{name}.console.log*").split()]


def said(lab: Lab, pid: int) -> int:
    """Bytes that a QEMU has written: its console, but for a little."""
    return int(re.findall(r"wchar: (\d+)", lab.sh(f"cat /proc/{pid}/io"))[0])


@pytest.fixture
def other(lab: Lab) -> str:
    """A guest that has nothing to do with it."""
    lab.define("other", start=True)
    lab.wait_ready("other")
    return "other"


def test_a_flood_stays_within_its_bounds(lab: Lab, other: str) -> None:
    with settings(lab, f'[log]\nmax_size = "{LIMIT >> 10}K"\nbackups = {BACKUPS}\n'):
        with attached(lab, other) as console:
            lab.define("flood", cmdline="virtd.rate=max", start=True)
            pid = lab.info("flood")["pid"]
            lab.wait("the flood's beginning", lambda: said(lab, pid) > 4 * LIMIT, 120)
            before = used(lab)
            begun = said(lab, pid)
            number = 0
            # Five times as much as its logs may hold.
            while said(lab, pid) < begun + 5 * LIMIT * (BACKUPS + 1):
                number += 1
                assert console.ask(f"word-{number}", 60), "the other guest's console answers all the while"
                assert lab.info(other)["state"] == "running"
                found = sizes(lab, "flood")
                assert len(found) <= BACKUPS + 1
                assert all(size <= LIMIT + LINE for size in found), found
            after = used(lab)
        assert after[0] <= before[0] + 2, "no descriptor is left of any rotation"
        assert after[1] <= before[1] + (4 << 10), f"PSS went from {before[1]} to {after[1]} KiB"
        assert lab.info("flood")["pid"] == pid
        lab.virtdctl("stop", "flood")
        tally = check(lab.console("flood"))
        assert (tally.lost, tally.repeated) == (0, 0), "what is kept is the end of it, without a hole"


def test_a_pipe_that_nobody_empties(lab: Lab) -> None:
    """What programs write waits, and nothing of it is lost; everything else in the guest runs on."""
    lines = 20000  # 1.6 MB
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    with attached(lab, "web1") as console:
        console.type("sh (while :; do date +%s >>/tmp/ticks; sleep 0.1; done) >/dev/null 2>&1 &\n")
        assert console.heard("sh exit 0")
        size = pipe(lab, pid)[0]
        assert size == 1 << 20
        lab.sh("systemctl stop virtd.service 2>/dev/null")
        console.type(f"lines 20000 {lines}\n")
        lab.wait("a full pipe", lambda: pipe(lab, pid) == (size, size), 60)
        # QEMU obeys: a host that goes down now can still shut the guest down.
        answer = lab.sh(
            "python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); "
            's.connect("/run/virtd/qemu/web1/shutdown.sock"); s.settimeout(60); '
            'f = s.makefile("rw"); f.readline(); '
            'f.write("{\\"execute\\": \\"qmp_capabilities\\"}{\\"execute\\": \\"query-status\\"}"); f.flush(); '
            "print(f.readline(), f.readline())'"
        )
        assert '"status": "running"' in answer
        lab.sh("sleep 3")
        assert pipe(lab, pid) == (size, size), "it is still waiting"
        lab.sh("systemctl start virtd.service")
        assert console.heard(f"virtd-lab end {lines}", 120)
        assert console.tally.whole
        assert lab.info("web1")["pid"] == pid
        tally = check(lab.console("web1"))
        assert (tally.lines, tally.whole) == (lines, True), (tally.lost, tally.repeated, tally.broken[:3])
        # While the pipe was full, what had nothing to do with the console went on.
        console.type("sh sort -u /tmp/ticks | wc -l; expr $(tail -n 1 /tmp/ticks) - $(head -n 1 /tmp/ticks)\n")
        lab.wait("the count of ticks", lambda: len(_numbers(console)) == 2, 30)
        seconds, span = _numbers(console)
        assert seconds >= span - 2, "hardly a second without a tick"


def _numbers(console: Attached) -> list[int]:
    return [int(word[4:]) for word in console.tally.words if re.fullmatch(rb"sh: \d+", word)]


def test_only_the_guests_kernel_gives_up_on_a_full_pipe(lab: Lab) -> None:
    """Linux waits 10 ms for a serial port, for each byte of a message, and then goes on without (8250_port.c)."""
    lab.define("web1", start=True)
    lab.wait_ready("web1")
    pid = lab.info("web1")["pid"]
    with attached(lab, "web1") as console:
        lab.wait("an empty pipe", lambda: pipe(lab, pid)[1] == 0)
        # As small as the kernel makes it for a user who has too many (fs.pipe-user-pages-soft), and smaller.
        assert pipe(lab, pid, 4096)[0] == 4096
        console.type("sh echo 7 >/proc/sys/kernel/printk\n")
        assert console.heard("sh exit 0")
        console.forget("sh exit 0")
        lab.sh("systemctl stop virtd.service 2>/dev/null")
        # 60 messages of 100 bytes: more than fits.
        console.type(
            'sh for n in $(seq 60); do echo "<1>message-$n-$(printf %070d 0)-$n-end" >/dev/kmsg; done; echo done\n'
        )
        lab.wait("a full pipe", lambda: pipe(lab, pid)[1] == 4096, 60)
        lab.sh("sleep 2; systemctl start virtd.service")
        assert console.heard("sh exit 0", 120)
        assert console.heard("sh: done")
    whole = [int(n) for n in re.findall(rb"message-(\d+)-0{70}-\1-end\r\n", lab.console("web1"))]
    assert whole == sorted(set(whole)), "none came twice"
    # What fitted is there, and so is what came once there was room again; only messages of the time between are cut.
    missing = sorted(set(range(1, 61)) - set(whole))
    assert whole[:30] == list(range(1, 31))
    assert whole[-1] == 60
    assert missing == [number for number in range(1, 61) if missing and missing[0] <= number <= missing[-1]]


def test_readers_that_do_not_read(lab: Lab, other: str) -> None:
    with settings(lab, '[log]\nmax_size = "1M"\nbackups = 40\n'), contextlib.ExitStack() as stack:
        lab.define("flood", cmdline="virtd.rate=3000", start=True)
        pids = {name: lab.info(name)["pid"] for name in ("flood", other)}
        lab.wait_lines("flood", 100)
        before = used(lab)
        readers = {
            "console": stack.enter_context(spawn(lab, "virtdctl", "console", "flood")),
            "log": stack.enter_context(spawn(lab, "virtdctl", "log", "-f", "-n", "all", "flood")),
            "callers": stack.enter_context(spawn(lab, "python3", "-c", DEAF_CALLERS)),
            "subscriber": stack.enter_context(spawn(lab, "python3", "-c", DEAF_SUBSCRIBER)),
        }
        for reader in readers.values():
            stack.callback(reader.kill)
        log = readers["log"].stdout
        assert log is not None
        checker = Checker()
        checker.feed(os.read(log.fileno(), 4096))
        for name, word in (("callers", "asked\n"), ("subscriber", "subscribed\n")):
            stdout = readers[name].stdout
            assert stdout is not None
            assert stdout.readline() == word
        lab.sh("pkill -STOP -f '[v]irtdctl (console|log -f)'")
        for _ in range(2):
            lab.run("python3", "-c", EVENTS, "60", timeout=300)
            number = check(lab.console("flood")).last
            lab.wait("the guest's next lines", lambda n=number: check(lab.console("flood")).last > n, 60)
            with attached(lab, other) as console:
                assert console.ask("hello")
            assert lab.sh("busctl get-property org.virtd1 /org/virtd1 org.virtd1.Manager Domains").strip() == "u 2"
            fds, pss = used(lab)
            assert fds <= before[0] + 150, (before, fds)
            assert pss <= before[1] + (16 << 10), (before, pss)
            # The next daemon has them as well: a SIGKILL first, then in order.
            lab.sh(KILL)
            lab.wait("the next daemon", lambda: lab.virtdctl("status", check=False).returncode == 0, 60)
            lab.sh("systemctl restart virtd.service")
        assert {name: lab.info(name)["pid"] for name in pids} == pids
        # One that wakes up has missed nothing, over two daemons and some rotations.
        lab.virtdctl("suspend", "flood")
        last = check(lab.console("flood")).last
        lab.sh("pkill -CONT -f '[v]irtdctl (console|log -f)'")
        while checker.tally.last < last - 1 and (data := os.read(log.fileno(), 65536)):
            checker.feed(data)
        assert checker.tally.whole, (checker.tally.lost, checker.tally.repeated, checker.tally.broken[:3])
        assert checker.tally.last >= last - 1
    assert json.loads(lab.virtdctl("status", "--json").stdout)["problems"] == []
