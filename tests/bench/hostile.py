# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a local user without rights can do to the daemon: floods on both front ends, and what root notices of them.

    python -m tests.bench.hostile [--seconds N] [--processes N] [--kind NAME]... [--guests N] [--json]

Runs inside a lab, by itself. Each flood is so many processes of `nobody` that do one thing as fast as they can; "all"
ones do a different one each. Beside them root lists over a connection of its own, runs `virtdctl list`, and starts
and stops a guest. The turn "spin" is as many processes that only burn CPU time: what they cost isn't the daemon's
doing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET = "/run/virtd/virtd.sock"
BUS = "/run/dbus/system_bus_socket"
NOBODY = 65534
PR_SET_PDEATHSIG = 1  # prctl(2)
PAUSE = 0.02
GUEST = "hostile-guest"

# What each process of a flood does until it is killed.


def spin() -> None:
    while True:
        pass


def _connect(path: str = SOCKET) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(30)
    while True:
        try:
            link.connect(path)
            return link
        except BlockingIOError:
            time.sleep(0.001)


def _call(method: str, **parameters: Any) -> bytes:
    return json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"


def _asking(method: str, **parameters: Any) -> Callable[[], None]:
    """One call after the other, each answered before the next."""
    message = _call(method, **parameters)

    def run() -> None:
        while True:
            with contextlib.suppress(OSError), _connect() as link:
                while True:
                    link.sendall(message)
                    while chunk := link.recv(1 << 20):
                        if chunk.endswith(b"\0"):
                            break
                    else:
                        break

    return run


def hasty() -> None:
    """A call each, and gone before the answer."""
    message = _call("org.virtd1.Check")
    while True:
        with contextlib.suppress(OSError), _connect() as link:
            link.sendall(message)


def pipelined() -> None:
    """Calls without end, whose answers nobody reads."""
    message = _call("org.virtd1.List") * 100
    while True:
        with contextlib.suppress(OSError), _connect() as link:
            while True:
                link.sendall(message)


def churn() -> None:
    while True:
        with contextlib.suppress(OSError):
            _connect().close()


def _holding(first: bytes) -> Callable[[], None]:
    """Connections that say something and then nothing, as many as there may be."""

    def run() -> None:
        links: list[socket.socket] = []
        while True:
            try:
                link = _connect()
                link.setblocking(False)
                links.append(link)
                with contextlib.suppress(OSError):
                    link.send(first)
            except OSError:
                time.sleep(0.01)
            if len(links) >= 900:
                for link in links[:450]:
                    link.close()
                del links[:450]

    return run


def huge() -> None:
    message = _call("org.virtd1.Define", text="x" * (3 << 20), source="x")
    while True:
        with contextlib.suppress(OSError), _connect() as link:
            link.sendall(message)
            link.recv(4096)


class Bus:
    """A connection to the message bus, spoken by hand: D-Bus specification 0.43, little-endian."""

    def __init__(self) -> None:
        self.link = _connect(BUS)
        self.link.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        self.link.recv(4096)
        self.link.sendall(b"BEGIN\r\n")
        self.serial = 0
        self.link.sendall(
            self.message("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        )
        self.link.recv(4096)

    def message(
        self, to: str, path: str, interface: str, member: str, *words: str, flags: int = 0, kind: int = 1
    ) -> bytes:
        self.serial += 1
        body = b""
        for word in words:
            body += b"\0" * (-len(body) % 4) + struct.pack("<I", len(word)) + word.encode() + b"\0"
        fields = b""
        given = [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", to)]
        for code, signature, value in given:
            fields += b"\0" * (-len(fields) % 8)
            fields += bytes([code, 1]) + signature.encode() + b"\0" + struct.pack("<I", len(value)) + value.encode()
            fields += b"\0"
        if words:
            fields += b"\0" * (-len(fields) % 8)
            fields += bytes([8, 1]) + b"g\0" + bytes([len(words)]) + b"s" * len(words) + b"\0"
        head = b"l" + bytes([kind, flags, 1]) + struct.pack("<III", len(body), self.serial, len(fields)) + fields
        return head + b"\0" * (-len(head) % 8) + body


def _bus_flood(
    path: str, interface: str, member: str, *words: str, flags: int = 0, kind: int = 1, to: str = "org.virtd1"
) -> Callable[[], None]:
    """Messages without end, whose answers are thrown away; `flags` 1 wants none."""

    def run() -> None:
        while True:
            with contextlib.suppress(OSError):
                bus = Bus()
                target = to if to != "owner" else _owner(bus)
                threading.Thread(target=_drain, args=(bus.link,), daemon=True).start()
                while True:
                    batch = b"".join(
                        bus.message(target, path, interface, member, *words, flags=flags, kind=kind)
                        for _ in range(50)
                    )
                    bus.link.sendall(batch)

    return run


def _owner(bus: Bus) -> str:
    """The unique name behind org.virtd1."""
    name = "org.freedesktop.DBus"
    bus.link.sendall(bus.message(name, "/org/freedesktop/DBus", name, "GetNameOwner", "org.virtd1"))
    time.sleep(0.5)
    answer = bus.link.recv(65536)
    at = answer.rfind(b":1.")
    return answer[at : answer.index(b"\0", at)].decode()


def _drain(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while link.recv(1 << 20):
            pass


def bus_churn() -> None:
    """A connection for each call."""
    while True:
        with contextlib.suppress(OSError):
            bus = Bus()
            bus.link.sendall(bus.message("org.virtd1", "/org/virtd1", "org.virtd1.Manager", "Status"))
            bus.link.close()


def bus_rules() -> None:
    """Match rules for all that virtd says, and nobody who reads it."""
    name = "org.freedesktop.DBus"
    while True:
        with contextlib.suppress(OSError):
            bus = Bus()
            for number in range(400):
                rule = f"type='signal',sender='org.virtd1',arg0='{number}'"
                bus.link.sendall(bus.message(name, "/org/freedesktop/DBus", name, "AddMatch", rule))
            time.sleep(1)


PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECTS = "org.freedesktop.DBus.ObjectManager"

VARLINK: dict[str, Callable[[], None]] = {
    "check": _asking("org.virtd1.Check"),
    "status": _asking("org.virtd1.Status"),
    "list": _asking("org.virtd1.List"),
    "slots": _asking("org.virtd1.Slots"),
    "hasty": hasty,
    "pipelined": pipelined,
    "churn": churn,
    "half-open": _holding(b""),
    "unfinished": _holding(b'{"method":"' + b"x" * (512 << 10)),
    "waiting": _holding(_call("org.virtd1.Wait", name=GUEST, states=["crashed"])),
    "huge": huge,
    "odd": _asking("org.virtd1.Wait", name="\ud800", states=["running"], timeout=1e400),
}
DBUS: dict[str, Callable[[], None]] = {
    "bus-managed": _bus_flood("/org/virtd1", OBJECTS, "GetManagedObjects"),
    "bus-managed-silent": _bus_flood("/org/virtd1", OBJECTS, "GetManagedObjects", flags=1),
    "bus-getall": _bus_flood("/org/virtd1", PROPERTIES, "GetAll", "org.virtd1.Manager"),
    "bus-check": _bus_flood("/org/virtd1", "org.virtd1.Manager", "Check", flags=1),
    "bus-status": _bus_flood("/org/virtd1", "org.virtd1.Manager", "Status"),
    "bus-ping": _bus_flood("/org/virtd1", "org.freedesktop.DBus.Peer", "Ping", flags=1),
    "bus-big": _bus_flood("/org/virtd1", PROPERTIES, "GetAll", "x" * (1 << 20)),
    "bus-signals": _bus_flood("/org/virtd1", "org.example", "Noise", kind=4, to="owner"),
    "bus-rules": bus_rules,
    "bus-churn": bus_churn,
}
FLOODS = VARLINK | DBUS
MIXED = {"quiet": [], "spin": [spin], "all-varlink": list(VARLINK.values()), "all-dbus": list(DBUS.values())}


class Flood:
    """So many processes of nobody."""

    def __init__(self, what: list[Callable[[], None]], count: int) -> None:
        self.children = [self._fork(what[number % len(what)]) for number in range(count if what else 0)]

    def _fork(self, run: Callable[[], None]) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # setuid has cleared it
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            run()
        except BaseException:
            status = 2
        finally:
            os._exit(status)

    def end(self) -> None:
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        for child in self.children:
            os.waitpid(child, 0)


class Root:
    """What root does meanwhile, and how long it takes."""

    def __init__(self) -> None:
        self.lists: list[float] = []
        self.commands: list[float] = []
        self.starts: list[float] = []
        self.failed: list[str] = []
        self.rss = self.fds = 0.0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work) for work in (self._list, self._command, self._start, self._look)
        ]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _list(self) -> None:
        """A connection for each, as a client has it."""
        message = _call("org.virtd1.List")
        while not self._over.wait(PAUSE):
            begun = time.perf_counter()
            try:
                with _root_link() as link:
                    link.sendall(message)
                    while chunk := link.recv(1 << 20):
                        if chunk.endswith(b"\0"):
                            break
                    else:
                        self.failed.append("list: hung up")
            except OSError as exc:
                self.failed.append(f"list: {exc}")
            self.lists.append(time.perf_counter() - begun)

    def _command(self) -> None:
        while not self._over.wait(0.25):
            begun = time.perf_counter()
            done = subprocess.run(["virtdctl", "list", "--json"], capture_output=True, text=True)
            self.commands.append(time.perf_counter() - begun)
            if done.returncode:
                self.failed.append(f"virtdctl list: {done.stderr.strip()}")

    def _start(self) -> None:
        while not self._over.wait(0.5):
            begun = time.perf_counter()
            for verb in ("start", "stop"):
                done = subprocess.run(["virtdctl", verb, GUEST], capture_output=True, text=True)
                if verb == "start":
                    self.starts.append(time.perf_counter() - begun)
                if done.returncode:
                    self.failed.append(f"virtdctl {verb}: {done.stderr.strip()}")

    def _look(self) -> None:
        while not self._over.wait(0.1):
            with contextlib.suppress(OSError, StopIteration, ValueError):
                pid = main_pid()
                self.rss = max(self.rss, rss_of(pid))
                self.fds = max(self.fds, len(os.listdir(f"/proc/{pid}/fd")))


def _root_link() -> socket.socket:
    """As virtdctl does it."""
    for path in ("/run/virtd/root.sock", SOCKET):
        link = socket.socket(socket.AF_UNIX)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 30, 0))
        try:
            link.connect(path)
            return link
        except FileNotFoundError:
            link.close()
    raise FileNotFoundError(SOCKET)


def main_pid() -> int:
    with open("/sys/fs/cgroup/system.slice/virtd.service/cgroup.procs") as file:
        return min(map(int, file.read().split()))


def rss_of(pid: int) -> float:
    """MiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def cpu_of(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values) or [0.0]
    return {
        "n": len(values),
        "median": round(ordered[len(ordered) // 2] * 1000, 1),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 1),
        "max": round(ordered[-1] * 1000, 1),
    }


def property_of(name: str) -> str:
    return subprocess.check_output(["systemctl", "show", "-P", name, "virtd.service"], text=True).strip()


def turn(kind: str, processes: int, seconds: float) -> dict[str, Any]:
    restarts, pid = property_of("NRestarts"), main_pid()
    cpu = cpu_of(pid)
    flood = Flood(MIXED[kind] if kind in MIXED else [FLOODS[kind]], processes)
    root = Root()
    try:
        time.sleep(0.5)
        root.begin()
        time.sleep(seconds)
        root.end()
    finally:
        flood.end()
    with contextlib.suppress(OSError):
        cpu = cpu_of(main_pid()) - cpu
    time.sleep(2)
    try:
        after, fds_after = round(rss_of(main_pid()), 1), len(os.listdir(f"/proc/{main_pid()}/fd"))
    except (OSError, ValueError):
        after = fds_after = -1
    return {
        "list": spread(root.lists),
        "virtdctl": spread(root.commands),
        "start": spread(root.starts),
        "failed": root.failed[:5] + ([f"and {len(root.failed) - 5} more"] if len(root.failed) > 5 else []),
        "rss": round(root.rss, 1),
        "rss_after": after,
        "fds": root.fds,
        "fds_after": fds_after,
        "cpu": round(cpu / (seconds + 0.5), 2),
        "killed": (property_of("NRestarts"), pid) != (restarts, main_pid()),
    }


def prepare(guests: int) -> None:
    """Guests to be listed, and one to be started: tests/children's sleeper is taken for QEMU, if it is there."""
    os.makedirs("/etc/virtd/qemu", exist_ok=True)
    if os.path.exists("/usr/local/bin/sleeper"):
        with open("/etc/virtd/virtd.toml", "w") as file:
            file.write('[qemu]\nbinary = "/usr/local/bin/sleeper"\n')
    with open("/var/lib/virtd/hostile.iso", "wb") as file:
        file.truncate(1 << 20)
    os.chmod("/var/lib/virtd/hostile.iso", 0o644)
    for name in [GUEST, *(f"hostile{number:03d}" for number in range(guests))]:
        with open(f"/etc/virtd/qemu/{name}.toml", "w") as file:
            file.write(
                f'name = "{name}"\nmemory = "1M"\nrng = false\n[[cdrom]]\npath = "/var/lib/virtd/hostile.iso"\n'
            )
    subprocess.run(["systemctl", "restart", "virtd.service"], check=True)
    time.sleep(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--guests", type=int, default=50)
    parser.add_argument("--kind", action="append", choices=[*MIXED, *FLOODS])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prepare(options.guests)
    results = {}
    for kind in options.kind or [*MIXED, *FLOODS]:
        found = results[kind] = turn(kind, options.processes, options.seconds)
        if not options.json:
            print(
                f"{kind:19} list {found['list']['median']:7} /{found['list']['p99']:7} ms  virtdctl "
                f"{found['virtdctl']['median']:7} /{found['virtdctl']['p99']:7} ms  starts {found['start']['n']:2} "
                f"{found['start']['max']:7} ms  RSS {found['rss']:6} -> {found['rss_after']:6} MiB  fds "
                f"{found['fds']:5} -> {found['fds_after']:4}  CPU {found['cpu']:4}"
                + ("  KILLED" if found["killed"] else "")
                + (f"  {found['failed']}" if found["failed"] else ""),
                flush=True,
            )
    if options.json:
        json.dump(results, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
