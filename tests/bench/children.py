# SPDX-License-Identifier: LGPL-2.1-or-later
"""What many children cost: a start, the restart of the daemon, a daemon-reload of PID 1. Runs inside a lab.

Guests are real in everything but QEMU, in whose place a small process runs (tests/children). Beside it, what as many
units cost PID 1 that only sleep, without virtd, stdio or sandbox.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.bench.peers import MEDIUM, Virtd, name_of

if TYPE_CHECKING:
    from tests.bench.peers import Peer

AT_ONCE = 8
TICK = os.sysconf("SC_CLK_TCK")


class Sleepers(Virtd):
    """Guests of next to no memory, which say nothing."""

    def define(self, name: str) -> None:
        text = f'name = "{name}"\nmemory = "1M"\nrng = false\n[[cdrom]]\npath = "{MEDIUM}"\n'
        self.call("Define", text=text, source="bench")


def measure(_peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """By number of children, in seconds."""
    daemon = Sleepers()
    counts = (10, 50) if quick else (10, 100, 1000)
    runs = 3
    sleeping = {count: plain(count, runs) for count in counts}
    begin()
    result: dict[str, Any] = {"runs": runs, "children": {}}
    try:
        result["children"][0] = {"reload": reload(runs)}
        there = 0
        for count in counts:
            result["children"][count] = one(daemon, there, count, runs)
            result["children"][count]["plain"] = sleeping[count]
            there = count
    finally:
        end(daemon)
    return result


def begin() -> None:
    """Have virtd take the sleeper for QEMU."""
    with open("/etc/virtd/virtd.toml", "w") as file:
        file.write('[qemu]\nbinary = "/usr/local/bin/sleeper"\n')
    subprocess.run(["systemctl", "restart", "virtd.service"], check=True)


def end(daemon: Sleepers) -> None:
    for name in daemon.running():
        daemon.call("Kill", name=name, signal=9)
    deadline = time.monotonic() + 300
    while daemon.running() and time.monotonic() < deadline:
        time.sleep(0.2)
    for item in daemon.call("List")["objects"]:
        daemon.undefine(item["name"])
    os.remove("/etc/virtd/virtd.toml")
    subprocess.run(["systemctl", "restart", "virtd.service"], check=True)


def one(daemon: Sleepers, there: int, count: int, runs: int) -> dict[str, Any]:
    """Up to `count` children, of which `there` run; the last ten are started one by one and measured."""
    names = [name_of(number) for number in range(there, count)]
    for name in names:
        daemon.define(name)
    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: daemon.call("Start", name=name), names[:-10]))
    many = time.perf_counter() - begun
    single = []
    for name in names[-10:]:
        begun = time.perf_counter()
        daemon.call("Start", name=name)
        single.append(time.perf_counter() - begun)
    figures: dict[str, Any] = {
        "start": statistics.median(single),
        "start_many": many / max(1, len(names) - 10),
        "entries": int(show("NFileDescriptorStore")),
        "slots": daemon.call("Status")["status"]["budget"]["used"],
    }
    time.sleep(2)
    listings = []
    for _ in range(runs):
        begun = time.perf_counter()
        assert len(daemon.running()) == count
        listings.append(time.perf_counter() - begun)
    figures["list"] = statistics.median(listings)
    for way in ("restart", "kill"):
        taken = []
        for _ in range(runs):
            taken.append(getattr(daemon, way)(count))
            settle(daemon)
        figures[way] = statistics.median(taken)
        figures[f"{way}_max"] = max(taken)
    figures["reload"] = reload(runs)
    settle(daemon)
    figures["pss"] = daemon.pss()
    return figures


def plain(count: int, runs: int) -> dict[str, float]:
    """A daemon-reload beside so many units of nobody's."""
    start = "systemd-run --quiet --unit=plain-{} -p StandardOutput=null -p StandardError=null sleep infinity"
    numbers = "".join(f"{number}\n" for number in range(count))
    try:
        subprocess.run(["xargs", "-P4", "-I{}", "sh", "-c", start], input=numbers, text=True, check=True)
        return reload(runs)
    finally:
        subprocess.run(["systemctl", "stop", "plain-*"], check=True)


def settle(daemon: Sleepers) -> None:
    """Until the daemon has done what it does in the background after a start."""
    pid = daemon.main_pid()
    before, quiet = cpu(pid), 0
    while quiet < 4:
        time.sleep(0.25)
        now = cpu(pid)
        quiet = quiet + 1 if now - before < 0.02 else 0
        before = now


def reload(runs: int) -> dict[str, float]:
    """A daemon-reload: how long it takes, the CPU time of PID 1, and how long PID 1 answers nobody."""
    wall, used, silent = [], [], []
    for _ in range(runs):
        loaded = manager("UnitsLoadTimestampMonotonic")
        with Asking() as asking:
            before, begun = cpu(1), time.perf_counter()
            subprocess.run(["systemctl", "daemon-reload"], check=True)
            wall.append(time.perf_counter() - begun)
            used.append(cpu(1) - before)
        silent.append(asking.longest)
        if manager("UnitsLoadTimestampMonotonic") == loaded:
            raise RuntimeError("PID 1 has not read its units again")
        time.sleep(1)
    return {"wall": statistics.median(wall), "cpu": statistics.median(used), "silent": statistics.median(silent)}


def manager(name: str) -> str:
    """A property of PID 1."""
    done = subprocess.run(["systemctl", "show", "-P", name], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


class Asking:
    """Asks PID 1 for its version, over and over; `longest` is the longest wait for an answer."""

    def __enter__(self) -> Asking:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.is_set():
            begun = time.perf_counter()
            subprocess.run(["systemctl", "show", "-P", "Version"], check=True, stdout=subprocess.DEVNULL)
            self.longest = max(self.longest, time.perf_counter() - begun)


def cpu(pid: int) -> float:
    """CPU seconds that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def show(name: str) -> str:
    done = subprocess.run(
        ["systemctl", "show", "-P", name, "virtd.service"], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()
