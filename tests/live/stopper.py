#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stops the first copying program that there is, as soon as it has opened what it copies.

Runs in a lab, so that things can happen while a job stands still. Until then the program goes in steps of a
millisecond: it can't come to its end while nobody looks.
"""

import os
import signal
import time

# What Python and its libraries open on their way, and its standard input, output and error.
FOREIGN = ("/usr/", "/etc/", "/proc/", "/lib", "/dev/null", "/run/virtd/fifos/")


def opened(pid: int) -> bool:
    links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return any(link.startswith("/") and not link.startswith(FOREIGN) for link in links)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while True:
        try:
            if opened(pid):
                return
        except FileNotFoundError:  # what it had open in that moment
            pass
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)


while True:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:
            continue
        if any(word.endswith("worker.py") for word in words):
            stop(int(pid))
            raise SystemExit
    time.sleep(0.002)
