# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools as a subject: one that is mounted, with a guest that writes a volume and a clone that ends meanwhile."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from tests.harness import Attached, Failed, Lab, definition
from tests.live.test_storage import STOPPER
from tests.live.test_storage_domains import LOOP
from tests.proof.survival.table import Finding, Verdict

POOL, PLAIN, GUEST = "mounted", "plain", "writer"
PATH = f"/srv/{POOL}"
# Each sector is synced; each tenth is told on the console. One that can't be written ends it.
WRITES = (
    "i=0; while true; do echo mark-$i | dd of=/dev/vda bs=512 seek=$i conv=notrunc,fsync 2>/dev/null || break; "
    "i=$((i+1)); [ $((i%10)) = 0 ] && echo at-$i; usleep 100000; done"
)


class Storage:
    """The promises: both pools are active, the mount is the same one, the clone is found whole, the guest goes on
    writing to a volume that nobody else may have, and nothing is half made."""

    name = "pool"
    driver = "storage"
    plural = "pools and jobs"

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pid = 0
        self.mount = ""
        self.job: dict[str, Any] = {}
        self.written = 0

    def prepare(self) -> None:
        lab = self.lab
        device = lab.sh(LOOP.format(kind="ext4", size=192, quiet="-q")).strip()
        text = f'name = "{POOL}"\ntype = "filesystem"\npath = "{PATH}"\nsource = "{device}"\n'
        lab.virtdctl("pool", "define", "-", stdin=text)
        lab.virtdctl("pool", "start", POOL)
        lab.sh(f"losetup -d {device}")  # as soon as it is unmounted: nobody else would do it if the lab is lost
        lab.sh(f"mkdir -p -m 711 /srv/{PLAIN}")
        lab.virtdctl("pool", "define", "-", stdin=f'name = "{PLAIN}"\npath = "/srv/{PLAIN}"\n')
        lab.virtdctl("pool", "start", PLAIN)
        lab.sh(f"head -c 20M /dev/urandom >{PATH}/source")
        lab.virtdctl("volume", "import", POOL, "source", "--from", "raw")
        lab.virtdctl("volume", "create", POOL, "base", "64M", "--format", "qcow2")
        lab.virtdctl("volume", "create", POOL, "top", "--backing", "base")
        disk = f'[[disk]]\npool = "{POOL}"\nvolume = "top"\n'
        lab.virtdctl("define", "-", stdin=definition(GUEST, more=disk))
        lab.virtdctl("start", GUEST)
        lab.wait_ready(GUEST, timeout=120)
        self.pid = lab.info(GUEST)["pid"]
        console = Attached(lab, GUEST)
        console.type(f"sh {WRITES}\n")
        told = console.heard("sh: at-10", 60)
        console.close()
        if not told:
            raise Failed("the guest that is to write doesn't")

    def before(self) -> None:
        lab = self.lab
        if "copy" in self._volumes():
            lab.virtdctl("volume", "delete", POOL, "copy")
        lab.run("sh", "-c", 'python3 -c "$0" >/dev/null 2>&1 &', STOPPER)
        lab.sh(f"setsid virtdctl volume clone {POOL} source copy >/dev/null 2>&1 &")
        self.job = lab.wait("a clone that stands still", self._stopped, 60)
        lab.sh("pkill -KILL -f '[v]irtdctl volume clone'")  # it would ask, and so start a daemon that was stopped
        self.mount = self._mount()
        self.written = self._written()

    def strike(self, *, gap: bool) -> None:
        """The clone may come to its end now."""
        self.lab.sh(f"kill -CONT {self.job['pid']}")

    def after(self, *, attached: bool) -> list[Finding]:
        lab, found = self.lab, list[Finding]()

        def lost(what: str) -> None:
            found.append(Finding(Verdict.LOST, what))

        job = lab.wait("the end of the clone", self._over, 90)
        for pool in (POOL, PLAIN):
            now = lab.json("pool", "info", pool)
            if now["state"] != "active" or now["problems"]:
                lost(f"pool {pool} is {now['state']}: {now['problems']}")
        if (mount := self._mount()) != self.mount:
            lost(f"the pool's mount is {mount or 'gone'} instead of {self.mount}")
        if job["state"] == "done":
            if lab.run("cmp", f"{PATH}/source", f"{PATH}/copy", check=False).returncode:
                lost("the clone isn't whole")
        elif "copy" in self._volumes() or not job["error"]:
            lost(f"the clone is {job['state']}, and a half of it is there")
        else:
            found.append(Finding(Verdict.DEGRADED, f"the job was cut off, and says so: {job['error']}"))
        if left := lab.sh(f"ls {PATH}/.virtd/new", check=False).split():
            lost(f"what is unfinished is left: {left}")
        if lab.info(GUEST)["pid"] != self.pid:
            lost("the guest that writes is another process")
            return found
        told = lab.virtdctl("volume", "delete", POOL, "top", check=False).stderr
        if f"domain {GUEST} writes to it" not in told:
            lost(f"the volume of a guest that runs could be deleted: {told}")
        return found + self._writes()

    def detach(self) -> None:
        """It has no clients outside."""

    def clear(self) -> list[Finding]:
        lab = self.lab
        with contextlib.suppress(Failed):
            lab.virtdctl("volume", "cancel", str(self.job.get("job")), check=False)
        lab.undefine_all()
        lab.forget_log(GUEST)
        for pool in (POOL, PLAIN):
            lab.virtdctl("pool", "stop", pool, check=False)
            lab.virtdctl("pool", "undefine", pool, check=False)
        lab.sh(f"rm -rf /srv/{PLAIN} /srv/loops")
        left = lab.sh(f"findmnt -n {PATH}; ls /run/virtd/storage", check=False)
        return [Finding(Verdict.LOST, f"left over: {' '.join(left.split())}")] if left else []

    # Promises

    def _writes(self) -> list[Finding]:
        """The guest hears of every write; that it goes on is enough, unless virtdctl can't tell what it says."""
        try:
            self.lab.wait("more that is written", lambda: self._written() > self.written + 10, 60)
        except Failed:
            slots = self.lab.info(GUEST)["slots"]
            if f"qemu/{GUEST}/stdout" in slots:
                return [Finding(Verdict.LOST, "the guest doesn't go on writing")]
        return []

    def _mount(self) -> str:
        """By its number, which another one at the same place wouldn't have."""
        return self.lab.sh(f"findmnt -n -o ID,SOURCE {PATH}", check=False).strip()

    def _volumes(self) -> set[str]:
        return {volume["name"] for volume in self.lab.json("volume", "list", POOL)}

    def _stopped(self) -> dict[str, Any] | None:
        for job in self.lab.json("volume", "jobs"):
            if job["state"] == "running" and job["pid"]:
                status = self.lab.sh(f"cat /proc/{job['pid']}/status", check=False)
                return job if re.search(r"^State:\s+T", status, re.MULTILINE) else None
        return None

    def _over(self) -> dict[str, Any] | None:
        with contextlib.suppress(Failed):
            for job in self.lab.json("volume", "jobs"):
                if job["job"] == self.job["job"] and job["state"] not in ("running", "waiting"):
                    found: dict[str, Any] = job
                    return found
        return None

    def _written(self) -> int:
        """How many sectors the guest has told of."""
        told = re.findall(rb"sh: at-(\d+)", self.lab.console(GUEST))
        return int(told[-1]) if told else 0
