# SPDX-License-Identifier: LGPL-2.1-or-later
"""What others notice of a guest that floods its console: how long `info` takes, how soon another guest answers, and
what the daemon spends. Runs inside a lab.

A guest that floods also takes a processor of the host's. So there are three turns: both guests quiet, one of them
busy with nothing, and one of them flooding; what the flood itself costs is the difference between the last two.
"""

from __future__ import annotations

import array
import contextlib
import glob
import json
import os
import socket
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.peers import Peer

LOGS = "/var/log/virtd/qemu"
QUIET, LOUD = "bench-quiet", "bench-loud"
READY = b"virtd-lab ready"
PAUSE = 0.01  # seconds between two calls
ECHO = 0.5  # seconds between two words for the quiet guest
PATIENCE = 60.0
TURNS = {"quiet": "", "busy": "sh while :; do :; done\n", "flood": "lines max\n"}


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds, bytes and shares of a processor, by turn. virtd alone: of libvirt nothing is asked."""
    virtd = peers[0]
    seconds = 10 if quick else 60
    result: dict[str, Any] = {"seconds": seconds, "turns": {}}
    virtd.have(0)
    for name in (QUIET, LOUD):
        virtd.call("Define", text=_definition(name), source="bench")  # type: ignore[attr-defined]
    try:
        for turn, words in TURNS.items():
            for name in (QUIET, LOUD):
                for path in glob.glob(f"{LOGS}/{name}.*"):
                    os.unlink(path)
                virtd.run("start", name)
                _await(name, READY)
            if words:
                _type(LOUD, words)
                time.sleep(1)
            result["turns"][turn] = _turn(virtd, seconds)
            for name in (QUIET, LOUD):
                virtd.run("stop", name)
    finally:
        for name in (QUIET, LOUD):
            with contextlib.suppress(RuntimeError):
                virtd.call("Stop", name=name)  # type: ignore[attr-defined]
            virtd.undefine(name)
    return result


def _turn(virtd: Peer, seconds: float) -> dict[str, Any]:
    pid = virtd.main_pid()
    calls: list[float] = []
    echoes: list[float] = []
    said, cpu, begun = _said(), _cpu(pid), time.monotonic()
    most = 0.0
    echo_at = begun
    while (now := time.monotonic()) < begun + seconds:
        if now >= echo_at:
            echo_at = now + ECHO
            echoes.append(_echo())
            most = max(most, virtd.pss())
        at = time.perf_counter()
        virtd.call("Info", name=QUIET)  # type: ignore[attr-defined]
        calls.append(time.perf_counter() - at)
        time.sleep(PAUSE)
    passed = time.monotonic() - begun
    return {
        "calls": len(calls),
        "info": _spread(calls),
        "echo": _spread(echoes),
        "cpu": (_cpu(pid) - cpu) / passed,
        "pss": most,
        "rate": (_said() - said) / passed,
        "log": sum(os.stat(path).st_size for path in glob.glob(f"{LOGS}/{LOUD}.console.log*")),
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max": ordered[-1],
    }


def _definition(name: str) -> str:
    return (
        f'name = "{name}"\nmemory = "96M"\n[boot]\nkernel = "/usr/share/virtd-lab/vmlinuz"\n'
        'initrd = "/usr/share/virtd-lab/initramfs.gz"\ncmdline = "console=ttyS0 quiet"\n'
    )


def _echo() -> float:
    """Seconds until the quiet guest's answer to a word is in its log."""
    word = f"word-{time.monotonic_ns()}"
    begun = time.perf_counter()
    _type(QUIET, f"echo {word}\n")
    _await(QUIET, f"\n{word}\r\n".encode())
    return time.perf_counter() - begun


def _await(name: str, text: bytes) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(FileNotFoundError), open(f"{LOGS}/{name}.console.log", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            if text in file.read():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} doesn't say {text!r}")
        time.sleep(0.001)


def _type(name: str, words: str) -> None:
    with _console(name) as pipe:
        os.write(pipe, words.encode())


@contextlib.contextmanager
def _console(name: str) -> Iterator[int]:
    """The write end of a guest's console."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect("/run/virtd/virtd.sock")
        call = {"method": "org.virtd1.OpenConsole", "parameters": {"name": name, "force": True}, "more": True}
        link.sendall(json.dumps(call).encode() + b"\0")
        _, ancillary, _, _ = link.recvmsg(1 << 16, socket.CMSG_SPACE(16))
        (pipe,) = array.array("i", ancillary[0][2])
        try:
            yield pipe
        finally:
            os.close(pipe)


def _said() -> int:
    """Bytes that QEMU of the loud guest has written: its console, but for a little."""
    with open(f"/run/virtd/qemu/{LOUD}.json") as file:
        pid = json.load(file)["main_pid"]
    with open(f"/proc/{pid}/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))


def _cpu(pid: int) -> float:
    """Seconds that the daemon has spent."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
