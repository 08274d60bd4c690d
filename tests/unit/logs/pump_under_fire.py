# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fast stream of numbered lines, a pump that is killed again and again, and what is in the logs afterwards.

    python pump_under_fire.py DIRECTORY KILLS LIMIT

A program of its own, since it forks: this process keeps the pipe and the first log's descriptor as PID 1 does; one
child writes; the pumps that come and go have both from here. Prints one JSON object, and to stderr the count of lines
written.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from virtd.logs.logfile import LogFile
from virtd.logs.pump import Pump

BACKUPS = 2000


def write_lines(fd: int, stop: int) -> int:
    """Write as fast as the pipe takes it, in cut lines, until somebody writes to `stop`; returns the count."""
    os.set_blocking(stop, False)
    number = 0
    while True:
        block = b"".join(b"%015d\n" % line for line in range(number, number + 5000))
        number += 5000
        for start in range(0, len(block), 7777):
            rest = block[start : start + 7777]
            while rest:
                rest = rest[os.write(fd, rest) :]
        try:
            if os.read(stop, 1):
                return number
        except BlockingIOError:
            pass


def pump(fd: int, kept: int, path: Path, limit: int, ready: int) -> None:
    """The process that is killed: adopt what was kept, move, end at the end of file."""
    over = threading.Event()
    pump = Pump(lambda function, *arguments: function(*arguments))
    pump.add("guest", fd, LogFile(path, fd=os.dup(kept), limit=limit, backups=BACKUPS), lambda key: over.set())
    pump.start()
    os.write(ready, b".")
    over.wait()


def main(directory: Path, kills: int, limit: int) -> None:
    """Shoot, then count."""
    path = directory / "guest.log"
    read, write = os.pipe()
    stop_read, stop = os.pipe()
    first = LogFile(path, limit=limit, backups=BACKUPS)
    dice = random.Random(kills)
    writer = os.fork()
    if not writer:
        os.close(read)
        print(write_lines(write, stop_read), file=sys.stderr)
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    ready_read, ready = os.pipe()
    landed = 0
    for shot in range(kills + 1):
        victim = os.fork()
        if not victim:
            pump(read, first.fd, path, limit, ready)
            os._exit(0)
        if shot < kills:
            # Some while they adopt, most while they move.
            if shot % 3:
                os.read(ready_read, 1)
            time.sleep(dice.uniform(0.0, 0.02))
            os.kill(victim, signal.SIGKILL)
        else:
            while limit and len(os.listdir(directory)) < 10:
                time.sleep(0.01)
            os.write(stop, b".")
        _, status = os.waitpid(victim, 0)
        landed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    os.waitpid(writer, 0)
    whole = b"".join(
        Path(segment.path).read_bytes() for segment in LogFile(path, limit=limit, backups=BACKUPS).chain.files()
    )
    print(json.dumps({"kills": landed, "files": len(list(directory.iterdir())), **count(whole)}))


def count(log: bytes) -> dict[str, int]:
    """What is wrong with a log of numbered lines."""
    lines = log.split(b"\n")
    cut = lines.pop() != b""
    numbers = [int(line) if len(line) == 15 and line.isdigit() else -1 for line in lines]
    good = [number for number in numbers if number >= 0]
    return {
        "lines": len(numbers),
        "last": max(good, default=-1),
        "lost": max(good, default=-1) + 1 - len(set(good)),
        "repeated": len(good) - len(set(good)),
        "spoilt": numbers.count(-1) + cut,
        "displaced": sum(after < before for before, after in itertools.pairwise(good)),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
