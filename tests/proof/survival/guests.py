# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests as a subject: one that streams all the while, one that dies in the gap, one that is stopped afterwards."""

from __future__ import annotations

import json
from typing import Any

from tests.proof.survival.supervised import Supervised
from tests.proof.survival.table import Finding, Verdict

RATE = 300  # lines a second of the steady one: 24 kB/s


class Guests(Supervised):
    """See Supervised."""

    name = "guest"
    plural = "guests"
    driver = "qemu"
    steady, victim, brief = "steady", "victim", "brief"
    pausing = ("suspend", "resume")
    signal = "9"
    booting = 120.0
    patience = 20.0
    tries = 4  # what is typed at a guest that has only just booted may not reach it whole

    def prepare(self) -> None:
        lab = self.lab
        lab.sh("mkdir -p /var/lib/virtd/images; truncate -s 1M /var/lib/virtd/images/brief.raw")
        lab.define(self.steady, cmdline=f"virtd.rate={RATE}")
        lab.define(self.victim, cmdline="virtd.rate=50")
        # No system in it: QEMU and its BIOS are there in a moment, and it's only there to be stopped.
        disk = '[[disk]]\npath = "/var/lib/virtd/images/brief.raw"\n'
        lab.virtdctl("define", "-", stdin=f'name = "{self.brief}"\nmemory = "32M"\n{disk}')
        lab.virtdctl("start", self.victim)
        self.begin()

    def look(self) -> dict[str, Any] | None:
        """Its monitor has to be there, or it isn't running."""
        info = self.info(self.steady)
        return info if info["monitor"] == "connected" or info["state"] != "running" else None

    def wrong_end(self, info: dict[str, Any]) -> str:
        end = info["exit"]
        told = (info["state"], end["signal"], end["cause"])
        if told == ("crashed", None, "unknown") and self._nobody_knows():
            return ""
        return "" if told == ("crashed", "SIGKILL", "killed") else ", ".join(map(str, told))

    def _nobody_knows(self) -> bool:
        """Whether PID 1 has lost the status, as 257 and later may: see virtd.children.witness."""
        record = json.loads(self.lab.sh(f"cat /run/virtd/qemu/{self.victim}.json"))
        run = f"UNIT={record['unit'] or f'virtd-qemu-{self.victim}.service'} INVOCATION_ID={record['invocation_id']}"
        said = self.lab.sh(f"journalctl -q -b -o cat _PID=1 {run}")
        return "which is not our child" in said and "Main process exited" not in said

    def clear(self) -> list[Finding]:
        self.detach()
        self.lab.undefine_all()
        self.lab.sh("rm -f /var/log/virtd/qemu/*")
        left = self.lab.wait("an empty store", lambda: self.lab.slots() == 0, 10)
        return [] if left else [Finding(Verdict.LOST, "slots are left in the store")]
