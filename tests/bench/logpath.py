#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the log path costs: CPU for a GB in 64 KiB writes, and CPU while guests chat byte by byte.

    tests/bench/logpath.py [--json] [--runs N] [--mib N] [--limit BYTES] [--directory DIR] [--peers cat,bare,pump]

Every consumer reads the same stream from a 1 MiB pipe that another process writes. CPU is the consumer's own, user
and system, from its first byte to its end of file, without the interpreter's start. The pump is the daemon's: thread,
epoll, rotation, and the removal of what is rotated out, which the others don't do. Runs of all consumers alternate,
so that a busy machine hits them alike; figures are medians.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LINE = b"%063d\n" % 7
BLOCK = LINE * 1024
CHAT = b"[   12.345678] virtio_blk virtio0: 1/0/0 default/read queues\r\n"[-60:]
LINES_A_SECOND = 18


class Cost(NamedTuple):
    """One run: bytes a second, CPU seconds per GB."""

    rate: float
    cpu: float


def cpu_seconds() -> float:
    """User and system time of this process, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def produce(fd: int, total: int) -> None:
    """Write `total` bytes in 64 KiB writes."""
    while total > 0:
        total -= os.write(fd, BLOCK)


def chat(seconds: float, fds: list[int]) -> None:
    """Type lines into every pipe, byte by byte, each guest at its own moment."""
    period = 1 / LINES_A_SECOND
    begin = time.monotonic()
    queue = [(begin + period * index / len(fds), fd) for index, fd in enumerate(fds)]
    while True:
        for at, fd in queue:
            if at - begin > seconds:
                return
            time.sleep(max(0.0, at - time.monotonic()))
            for byte in CHAT:
                os.write(fd, bytes((byte,)))
        queue = [(at + period, fd) for at, fd in queue]


# Consumers. Each has a process of its own, `logpath.py consume KIND PATH`, with the pipes from descriptor 10 on.


def consume_bare(path: str, fds: list[int]) -> None:
    """The least that Python can do."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    while os.splice(fds[0], out, 1 << 20):
        pass


def consume_readwrite(path: str, fds: list[int]) -> None:
    """What loses bytes when it is killed."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    while data := os.read(fds[0], 1 << 20):
        os.write(out, data)


def consume_pump(path: str, fds: list[int], limit: int, *, watched: bool = False) -> None:
    """The daemon's pump and log."""
    from virtd.logs.logfile import LogFile
    from virtd.logs.pump import Pump

    over = Event()
    left = set(range(len(fds)))

    def ended(key: str) -> None:
        left.discard(int(key))
        if not left:
            over.set()

    pump = Pump(lambda function, *arguments: function(*arguments), on_bytes=lambda key: None)
    for index, fd in enumerate(fds):
        pump.add(str(index), fd, LogFile(f"{path}.{index}.log", limit=limit), ended)
        if watched:
            pump.watch(str(index))
    pump.start()
    over.wait()
    pump.close()


def consumer(kind: str, path: str, count: int, limit: int) -> None:
    """The consumer process: consume, then print CPU seconds and context switches."""
    fds = list(range(10, 10 + count))
    if kind == "pump":
        # The imports are start-up, not the log path.
        import virtd.logs.logfile
        import virtd.logs.pump  # noqa: F401
    before = cpu_seconds()
    match kind:
        case "bare":
            consume_bare(path, fds)
        case "readwrite":
            consume_readwrite(path, fds)
        case "pump":
            consume_pump(path, fds, limit)
        case "watched":
            consume_pump(path, fds, limit, watched=True)
    print(cpu_seconds() - before, resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw)


def spawn(kind: str, directory: Path, reads: list[int], limit: int) -> subprocess.Popen[str]:
    """Start a consumer of these pipes."""
    path = directory / kind
    if kind == "cat":
        with path.open("wb") as out:
            return subprocess.Popen(["cat"], stdin=reads[0], stdout=out, text=True)

    def arrange() -> None:
        # To a safe height first: a target may be another one's source.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in reads]
        for index, fd in enumerate(high):
            os.dup2(fd, 10 + index)
            os.close(fd)

    return subprocess.Popen(
        [sys.executable, __file__, "consume", kind, str(path), str(len(reads)), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=arrange,
        close_fds=False,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[float, int]:
    """CPU seconds and voluntary context switches of a consumer that is at its end."""
    words = process.stdout.read().split() if process.stdout else []
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stdout:
        process.stdout.close()
    if process.returncode:
        raise SystemExit(f"a consumer failed with {process.returncode}")
    if not words:
        return usage.ru_utime + usage.ru_stime, usage.ru_nvcsw
    return float(words[0]), int(words[1])


def stream(kind: str, directory: Path, total: int, limit: int) -> Cost:
    """One consumer takes `total` bytes."""
    place = Path(tempfile.mkdtemp(dir=directory))
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 1 << 20)
    process = spawn(kind, place, [read], limit)
    os.close(read)
    if kind != "cat":
        time.sleep(0.3)
    begin = time.monotonic()
    produce(write, total)
    os.close(write)
    cpu, _ = finish(process)
    spent = time.monotonic() - begin
    shutil.rmtree(place)
    return Cost(total / spent, cpu / (total / 1e9))


def chatter(kind: str, directory: Path, guests: int, seconds: float) -> tuple[float, float]:
    """CPU milliseconds and wake-ups of the pump, a second, while `guests` guests chat."""
    place = Path(tempfile.mkdtemp(dir=directory))
    pipes = [os.pipe() for _ in range(guests)]
    process = spawn(kind, place, [read for read, _ in pipes], 16 << 20)
    for read, _ in pipes:
        os.close(read)
    time.sleep(0.3)
    chat(seconds, [write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    cpu, switches = finish(process)
    shutil.rmtree(place)
    return cpu * 1000 / seconds, switches / seconds


def streams(kinds: list[str], directory: Path, runs: int, total: int, limit: int) -> dict[str, list[Cost]]:
    """Every consumer `runs` times, in turns."""
    costs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind in kinds:
            costs[kind].append(stream(kind, directory, total, limit))
    return costs


def middle(costs: list[Cost]) -> Cost:
    """Medians."""
    return Cost(statistics.median(cost.rate for cost in costs), statistics.median(cost.cpu for cost in costs))


def print_streams(costs: dict[str, list[Cost]]) -> None:
    """The first table."""
    bare = middle(costs["bare"]).cpu if "bare" in costs else float("nan")
    print(f"{'consumer':<12}{'MB/s':>8}{'CPU s/GB':>12}{'lowest':>10}{'highest':>10}{'CPU to bare':>14}")
    for kind, runs in costs.items():
        rate, cpu = middle(runs)
        low, high = min(cost.cpu for cost in runs), max(cost.cpu for cost in runs)
        print(f"{kind:<12}{rate / 1e6:>8.0f}{cpu:>12.3f}{low:>10.3f}{high:>10.3f}{cpu / bare:>13.2f}x")


def main() -> int:
    """Run it all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--mib", type=int, default=512, help="size of a stream")
    parser.add_argument("--limit", type=int, default=16 << 20, help="size of a log file in bytes")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long guests chat")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where the logs go")
    parser.add_argument("--peers", default="cat,bare,readwrite,pump")
    parser.add_argument("--guests", default="10,50", help="how many chat")
    options = parser.parse_args()
    guests = [int(word) for word in options.guests.split(",") if word]
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        kinds = [kind for kind in options.peers.split(",") if kind]
        costs = streams(kinds, Path(name), options.runs, options.mib << 20, options.limit)
        chats = {
            (number, kind): chatter(kind, Path(name), number, options.seconds)
            for number in guests
            for kind in ("pump", "watched")
        }
    if options.json:
        table = {
            "stream_mib": options.mib,
            "log_limit": options.limit,
            "streams": {
                kind: {"mb_per_s": rate / 1e6, "cpu_s_per_gb": cpu, "runs": [cost.cpu for cost in costs[kind]]}
                for kind, (rate, cpu) in ((kind, middle(costs[kind])) for kind in kinds)
            },
            "chatty": [
                {"guests": number, "followed": kind == "watched", "cpu_ms_per_s": cpu, "wakes_per_s": wakes}
                for (number, kind), (cpu, wakes) in chats.items()
            ],
        }
        if {"bare", "pump"} <= set(kinds):
            table["pump_cpu_to_bare"] = middle(costs["pump"]).cpu / middle(costs["bare"]).cpu
        print(json.dumps(table, indent=2))
        return 0
    print(f"{options.mib} MiB in 64 KiB writes, medians of {options.runs}; log limit {options.limit >> 20} MiB\n")
    print_streams(costs)
    print(f"\nchatty guests, {LINES_A_SECOND} lines of {len(CHAT)} bytes a second each, byte by byte\n")
    print(f"{'guests':<8}{'followed':<12}{'CPU ms/s':>10}{'wakes/s':>10}")
    for (number, kind), (cpu, wakes) in chats.items():
        print(f"{number:<8}{'all' if kind == 'watched' else 'none':<12}{cpu:>10.2f}{wakes:>10.0f}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["consume"]:
        consumer(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        sys.exit(main())
