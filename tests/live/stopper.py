#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stops the first copying program that there is, as soon as it is one: what systemd has forked may not be yet.

Runs in a lab, so that things can happen while a job stands still.
"""

import os
import signal
import time

while True:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:
            continue
        if any(word.endswith("worker.py") for word in words):
            os.kill(int(pid), signal.SIGSTOP)
            raise SystemExit
    time.sleep(0.002)
