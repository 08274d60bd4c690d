# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab as the sweep sees it from inside: the daemon and its API, the guests, and whether all of it agrees.

Nothing here uses virtd's own code, so that what it believes can't be wrong in the same way.
"""

from __future__ import annotations

import array
import contextlib
import glob
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.harness import Checker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = "/root/sweep"
SOCKET = "/run/virtd/virtd.sock"
RECORDS = "/run/virtd/qemu"
DEFINITIONS = "/etc/virtd/qemu"
LOGS = "/var/log/virtd/qemu"
IMAGES = "/var/lib/virtd/images"
USER_IDS = "/var/lib/virtd/qemu-ids.json"
NAMES, KINDS = "/run/userdb", ("user", "group")
ALIASES = "/run/virtd/paths"
ARMED = "/run/sweep-armed"
DROP_IN = "/run/systemd/system/virtd.service.d/sweep.conf"
SLOTS = {"stdin", "stdout", "stderr", "console.log", "log"}
ALIVE = ("running", "paused")
PATIENCE = 30.0
BACKUPS = 20  # of a log, at most; there may be gaps among them

# Stops before it becomes the daemon, when asked to, so that somebody can attach to it before its first step.
BEGIN = f"""#!/bin/sh
if [ -e {ARMED} ]; then rm {ARMED}; kill -STOP $$; fi
exec /usr/libexec/virtd
"""


class Gone(Exception):
    """The daemon went away before it answered."""


class Refused(Exception):
    """The daemon answered with an error: its kind, and what it said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Broken(Exception):
    """A promise that wasn't kept."""


def until(what: str, condition: Callable[[], Any], limit: float = PATIENCE) -> Any:
    """Call `condition` until it is true, its value. An exception of it counts as "not yet"; Broken with the last."""
    deadline = time.monotonic() + limit
    while True:
        problem: Exception | None = None
        try:
            if value := condition():
                return value
        except (Broken, Gone, Refused, OSError, LookupError) as exc:
            problem = exc
        if time.monotonic() > deadline:
            raise Broken(f"{what}: {problem or 'did not come about'}")
        time.sleep(0.02)


class Connection:
    """One connection to the daemon, without any of virtdctl's patience."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE * 3)
        self._socket.connect(SOCKET)
        self._buffer = b""
        self.fds: list[int] = []

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        while self.fds:
            os.close(self.fds.pop())

    def call(self, method: str, *, more: bool = False, **parameters: Any) -> dict[str, Any]:
        """The reply's parameters. Raises Gone or Refused."""
        message = {"method": f"org.virtd1.{method}", "parameters": parameters} | ({"more": True} if more else {})
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\0")
            while b"\0" not in self._buffer:
                data, ancillary, _, _ = self._socket.recvmsg(1 << 16, socket.CMSG_SPACE(64))
                for _level, _kind, payload in ancillary:
                    self.fds += array.array("i", payload[: len(payload) // 4 * 4])
                if not data:
                    raise Gone(method)
                self._buffer += data
        except ConnectionError:
            raise Gone(method) from None
        raw, _, self._buffer = self._buffer.partition(b"\0")
        reply = json.loads(raw)
        if "error" in reply:
            told = reply["parameters"]
            raise Refused(reply["error"].rpartition(".")[2], str(told.get("message", told)))
        answer: dict[str, Any] = reply.get("parameters") or {}
        return answer


def call(method: str, **parameters: Any) -> dict[str, Any]:
    with Connection() as connection:
        return connection.call(method, **parameters)


def info(name: str) -> dict[str, Any]:
    item: dict[str, Any] = call("Info", name=name)["object"]
    return item


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=False, capture_output=True, text=True).stdout.strip()


def main_pid() -> int:
    return int(systemctl("show", "-P", "MainPID", "virtd.service") or 0)


# Guests


def image(name: str) -> str:
    return f"{IMAGES}/{name}.img"


def definition(name: str, memory: str = "16M", more: str = "") -> str:
    return (
        f'name = "{name}"\nmemory = "{memory}"\nrng = false\n{more}\n'
        f'[[disk]]\npath = "{image(name)}"\nformat = "raw"\n'
    )


def make_image(name: str, kind: str = "tiny") -> None:
    """A disk of its own, root's until a guest is given it, that boots the tiny guest."""
    with open(f"{HERE}/{kind}.img", "rb") as file:
        sector = file.read()
    with open(image(name), "wb") as file:
        file.write(sector)
        file.truncate(1 << 20)
    os.chmod(image(name), 0o600)
    os.chown(image(name), 0, 0)


class Guest:
    """A guest that runs throughout: its PID mustn't change, and its lines must be whole over all log files."""

    def __init__(self, name: str, kind: str = "tiny") -> None:
        self.name = name
        for method in ("Stop", "Undefine"):  # what an earlier sweep may have left
            with contextlib.suppress(Refused):
                call(method, name=name)
        make_image(name, kind)
        for path in glob.glob(f"{LOGS}/{name}.*"):
            os.unlink(path)
        call("Define", text=definition(name), source="sweep")
        call("Start", name=name)
        self.pid: int = info(name)["pid"]
        self._checker = Checker()
        self._at = (0, 0)  # inode and offset up to which the lines were checked
        self._said = 0
        until(f"{name}'s first lines", lambda: self.lines() > 3)

    def lines(self) -> int:
        """Check what has come since the last look; how many lines there were in all. Raises Broken."""
        # Newest first, for a rotation moves files to older names: one that has just moved is met again, never missed.
        opened = []
        with contextlib.suppress(FileNotFoundError):
            opened.append(open(f"{LOGS}/{self.name}.console.log", "rb"))  # noqa: SIM115 (closed below, all together)
        for number in itertools.count(1):
            try:
                opened.append(open(f"{LOGS}/{self.name}.console.log.{number}", "rb"))  # noqa: SIM115
            except FileNotFoundError:
                if number > BACKUPS:
                    break
        opened.reverse()
        try:
            inodes = [os.fstat(file.fileno()).st_ino for file in opened]
            first = inodes.index(self._at[0]) if self._at[0] in inodes else 0
            if self._at[0] and self._at[0] not in inodes:
                raise Broken(f"{self.name}: its log was rotated away before it was checked; give it more backups")
            seen = set()
            for file, inode in list(zip(opened, inodes, strict=True))[first:]:
                if inode in seen:
                    continue
                seen.add(inode)
                file.seek(self._at[1] if inode == self._at[0] else 0)
                data = file.read()
                self._checker.feed(data)
                self._at = (inode, file.tell())
        finally:
            for file in opened:
                file.close()
        tally = self._checker.tally
        if not tally.whole:
            raise Broken(
                f"{self.name}: {tally.lost} lines lost, {tally.repeated} repeated, broken {tally.broken[:2]}"
            )
        return tally.lines

    def check(self) -> None:
        """It hasn't noticed a thing, and answers. Raises Broken."""
        now = info(self.name)
        if (now["pid"], now["state"]) != (self.pid, "running"):
            raise Broken(f"{self.name} is {now['state']} with PID {now['pid']}, not {self.pid}")
        before = self.lines()
        self._said += 1
        word = f"word-{self._said}"
        type_on(self.name, word)
        until(f"{self.name}'s answer to {word}", lambda: self._heard(word), 10)
        until(f"{self.name}'s next lines", lambda: self.lines() > before, 10)

    def _heard(self, word: str) -> bool:
        self.lines()
        return word.encode() in self._checker.tally.words


def type_on(name: str, word: str) -> None:
    """A line for a guest's console."""
    with Connection() as connection:
        connection.call("OpenConsole", more=True, name=name, force=True)
        os.write(connection.fds[0], f"{word}\n".encode())


# The daemon


def killed() -> None:
    systemctl("reset-failed", "virtd.service")  # or systemd would take it for a crash loop, and wait
    with contextlib.suppress(ProcessLookupError):
        if pid := main_pid():
            os.kill(pid, signal.SIGKILL)


def begin_stopped() -> int:
    """Kill the daemon and hold the next one before its first step: its PID."""
    with open(ARMED, "w"):
        pass
    killed()

    def stopped() -> int:
        pid = main_pid()
        if not pid or os.path.exists(ARMED):
            return 0
        with open(f"/proc/{pid}/stat") as file:
            return pid if file.read().rpartition(")")[2].split()[0] == "T" else 0

    pid: int = until("a daemon that waits", stopped)
    return pid


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """virtd.service starts by way of BEGIN meanwhile."""
    with open(f"{HERE}/begin", "w") as file:
        file.write(BEGIN)
    os.chmod(f"{HERE}/begin", 0o755)
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, "w") as file:
        file.write(f"[Service]\nExecStart=\nExecStart={HERE}/begin\n")
    systemctl("daemon-reload")
    systemctl("restart", "virtd.service")
    try:
        yield
    finally:
        os.unlink(DROP_IN)
        systemctl("daemon-reload")
        systemctl("restart", "virtd.service")


def settled() -> bool:
    """The daemon answers, and has found out what became of every domain. Raises Broken with what is still open."""
    for item in call("List")["objects"]:
        if item["state"] not in ("stopped", "running", "paused", "crashed"):
            raise Broken(f"{item['name']} stays {item['state']}: {item['reason']}")
        if item["state"] in ALIVE and info(item["name"])["monitor"] != "connected":
            raise Broken(f"the monitor of {item['name']} is not connected")
    return True


# Agreement


def agreement() -> bool:
    """Units, slots, records, directories and definitions tell the same. Raises Broken with what doesn't agree."""
    problems = list(_disagreements())
    if problems:
        raise Broken("; ".join(problems))
    return True


def _disagreements() -> Iterator[str]:
    domains = {item["name"]: item for item in call("List")["objects"]}
    alive = {name for name, item in domains.items() if item["state"] in ALIVE}
    units = {
        line.split()[0].removeprefix("virtd-qemu-").removesuffix(".service"): line.split()[2]
        for line in systemctl("list-units", "--all", "--plain", "--no-legend", "virtd-qemu-*.service").splitlines()
    }
    if set(units) != alive:
        yield f"units {units}, but alive are {sorted(alive)}"
    slots: dict[str, set[str]] = {}
    held = dump()
    mine = [name for name in held if name.startswith("qemu/")]
    for name in mine:
        slots.setdefault(name.split("/")[1], set()).add(name.split("/")[2])
    if len(mine) != 5 * len(alive) or any(slots.get(name) != SLOTS for name in alive):
        yield f"slots {sorted(mine)}, but alive are {sorted(alive)}"
    directories = set()
    for entry in sorted(os.listdir(RECORDS)):
        path = f"{RECORDS}/{entry}"
        if os.path.isdir(path):
            directories.add(entry)
        elif not entry.startswith("."):
            yield from _record(path, domains.get(entry.removesuffix(".json")), alive)
    pipes = {path.rpartition("/qemu.")[2] for path in glob.glob("/run/virtd/fifos/qemu.*")}
    if pipes != alive:
        yield f"pipes of {sorted(pipes)}, but alive are {sorted(alive)}"
    if directories != alive:
        yield f"directories {sorted(directories)}, but alive are {sorted(alive)}"
    for name in alive:
        if not os.path.exists(f"{RECORDS}/{name}.json"):
            yield f"{name} is alive and has no record"
    defined = {entry.removesuffix(".toml") for entry in os.listdir(DEFINITIONS) if not entry.startswith(".")}
    if defined != set(domains):
        yield f"definitions of {sorted(defined)}, but virtdctl lists {sorted(domains)}"
    yield from (f"left over: {path}" for path in temporary_files())
    yield from _users(domains, alive)
    status = call("Status")["status"]
    yield from (f"problem: {problem['text']}" for problem in status["problems"])
    if status["budget"]["used"] != len(held):
        yield f"the daemon counts {status['budget']['used']} slots, PID 1 has {len(held)}"


def _users(domains: dict[str, Any], alive: set[str]) -> Iterator[str]:
    """Each guest that runs has a user of its own, by the table and by name, who has its disk; nobody else has one."""
    uids = {name: int(systemctl("show", "-P", "UID", f"virtd-qemu-{name}.service")) for name in alive}
    for name in domains:
        if os.path.exists(image(name)) and (owner := os.stat(image(name)).st_uid) != uids.get(name, 0):
            yield f"the disk of {name} belongs to {owner}, not {uids.get(name, 0)}"
    if len(set(uids.values())) != len(uids):
        yield f"guests run as one user: {uids}"
    with contextlib.suppress(FileNotFoundError), open(USER_IDS) as file:
        known = json.load(file)["ids"]
        for name, uid in uids.items():
            if (noted := known.get(info(name)["uuid"])) != uid:
                yield f"{name} runs as {uid}, and its user is noted as {noted}"
    wanted = {f"{who}.{kind}" for name, uid in uids.items() for who in (f"vm-{name}", uid) for kind in KINDS}
    there = os.listdir(NAMES) if os.path.isdir(NAMES) else []  # made with the first name
    named = {
        entry for entry in there if os.path.realpath(f"{NAMES}/{entry}").startswith((f"{NAMES}/vm-", f"{NAMES}/."))
    }
    if named != wanted:
        yield f"names of users: {sorted(named)}, needed are {sorted(wanted)}"
    if left := set(os.listdir(ALIASES)) if os.path.isdir(ALIASES) else set():
        left -= {f"qemu.{name}" for name in alive}
        yield from (f"links to what nobody needs: {entry}" for entry in sorted(left))


def temporary_files() -> list[str]:
    """What is written before it gets its real name."""
    places = ["/run/virtd", "/etc/virtd"]
    places += [f"{place}/{kind}" for place in places for kind in ("qemu", "network", "storage", "lxc")]
    places = [place for place in places if os.path.isdir(place)]
    found = [f"{place}/{entry}" for place in places for entry in os.listdir(place) if entry.startswith(".")]
    return found + glob.glob(f"{LOGS}/*.new")


def _record(path: str, item: dict[str, Any] | None, alive: set[str]) -> Iterator[str]:
    with open(path) as file:
        record = json.load(file)
    name = record["name"]
    if item is None:
        yield f"a record of {name}, which virtdctl doesn't list"
    elif record["state"] != item["state"] or (record["main_pid"] or None) != item["pid"]:
        yield f"{name}: record {record['state']}, {record['main_pid']}; virtdctl {item['state']}, {item['pid']}"
    wanted = (f"virtd-qemu-{name}.service", 5) if name in alive else ("", 0)
    if (record["unit"], len(record["slots"])) != wanted:
        yield f"the record of {name} has unit {record['unit']!r} and {len(record['slots'])} slots"
    if name in alive and str(record["main_pid"]) != systemctl("show", "-P", "MainPID", wanted[0]):
        yield f"the record of {name} has PID {record['main_pid']}, its unit another"


def dump() -> list[str]:
    """The names of what PID 1 holds for virtd."""
    done = subprocess.run(
        ["busctl", "-j", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
         "org.freedesktop.systemd1.Manager", "DumpUnitFileDescriptorStore", "s", "virtd.service"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [entry[0] for entry in json.loads(done.stdout)["data"][0]]


def fsck() -> None:
    """virtdctl fsck finds nothing. Raises Broken with what it says."""
    done = subprocess.run(["virtdctl", "fsck"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"virtdctl fsck: {done.stdout}{done.stderr}")
