# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers as a subject: one that streams and answers, one that ends in the gap, one that is stopped afterwards."""

from __future__ import annotations

from typing import Any

from tests.proof.survival.supervised import Supervised
from tests.proof.survival.table import Finding, Verdict

STEADY, VICTIM, BRIEF = "boxed", "doomed", "short"
RATES = {STEADY: 300, VICTIM: 20}  # lines a second, of 80 bytes
ROOT = "/var/lib/virtd/containers/mini"
FIRST = 0x61000000
STATUS = 7  # the exit status of what ends
ADDRESS = "192.0.2.9"

# As tests/lab/guest/console.c has its lines and its `echo`. Its terminal may be hung up, and it goes on.
PROGRAM = f"""#!/usr/bin/python3
import os, select, signal, sys, termios, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: os._exit({STATUS}))
modes = termios.tcgetattr(0)
modes[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, modes)
alphabet = "abcdefghijklmnopqrstuvwxyz" * 4
rate, number, typed, due, reading = int(sys.argv[1]), 0, b"", time.monotonic(), True
def say(text):
    data = text.encode()
    while data:
        try:
            data = data[os.write(1, data):]
        except OSError:
            time.sleep(0.1)
            return
while True:
    if select.select([0] if reading else [], [], [], max(0, due - time.monotonic()))[0]:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        reading = bool(data)
        *lines, typed = (typed + data).split(b"\\n")
        for line in lines:
            if line.startswith(b"echo "):
                say(line[5:].decode() + "\\n")
    if time.monotonic() >= due:
        due = max(due + 0.05, time.monotonic() - 1)
        text = ""
        for _ in range(rate // 20):
            number += 1
            text += "line %010d %s .\\n" % (number, alphabet[number % 26:][:60])
        say(text)
"""
# Its programs are the lab's own. Without its console a container is hung up; an init doesn't end by that.
MAKE = f"""set -e
test -e {ROOT}/steady && exit 0
mkdir -p {ROOT} && cd {ROOT} && mkdir -p etc tmp usr proc sys dev run
for name in bin sbin lib lib64; do ln -sfn usr/$name $name; done
printf '#!/bin/sh\\ntrap "" HUP\\nexec sleep 1000000\\n' >brief
printf '#!/bin/sh\\nexec sh "$@"\\n' >shell
cat >steady
chmod 755 . brief shell steady
chown -hR {FIRST}:{FIRST} .
"""


class Containers(Supervised):
    """See Supervised; and they keep their addresses."""

    name = noun = "container"
    plural = "containers"
    driver = "lxc"
    steady, victim, brief = STEADY, VICTIM, BRIEF
    pausing = ("freeze", "thaw")
    signal = "USR1"

    def prepare(self) -> None:
        lab = self.lab
        lab.run("sh", "-c", MAKE, stdin=PROGRAM)
        for name in (STEADY, VICTIM, BRIEF):
            command = f'"/steady", "{RATES[name]}"' if name in RATES else '"/brief"'
            mount = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'
            text = f'name = "{name}"\nrootfs = "{ROOT}"\ncommand = [{command}]\n{mount}'
            self.virtdctl("define", "-", stdin=text)
        self.begin()
        lab.sh(f"nsenter -t {self.pid} -n ip address add {ADDRESS}/24 dev lo")

    def more(self) -> list[Finding]:
        if ADDRESS in self.lab.sh(f"nsenter -t {self.pid} -n ip -o address"):
            return []
        return [Finding(Verdict.LOST, "its address is gone")]

    def wrong_end(self, info: dict[str, Any]) -> str:
        end = info["exit"]
        told = (info["state"], end["code"], end["cause"])
        return "" if told == ("crashed", STATUS, "failed") else f"{told[0]}, status {told[1]}, {told[2]}"

    def clear(self) -> list[Finding]:
        self.detach()
        self.lab.undefine_all()
        self.lab.sh("rm -f /var/log/virtd/lxc/*")
        left = self.lab.sh("systemctl list-units --all --plain --no-legend 'virtd-lxc-*'; ls /run/virtd/lxc")
        return [Finding(Verdict.LOST, f"left over: {' '.join(left.split())}")] if left else []
