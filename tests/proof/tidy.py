# SPDX-License-Identifier: LGPL-2.1-or-later
"""An hour of ordinary use, in which nothing is wrong: then nobody may be told that something is. `make tidy-hour`.

Guests, a container, a network, a pool, restarts, upgrades and daemon-reloads, again and again, in an order that a
seed decides; then `virtdctl status` has to exit with 0, `fsck` to find nothing, and the journal to have no warning of
virtd's units but what PID 1 says of itself.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from tests.harness import Failed, Lab, build_rpm, definition
from tests.live.tools import PID1S_OWN

if TYPE_CHECKING:
    from collections.abc import Callable

NETWORK = 'name = "lab"\nautostart = true\n[ipv4]\naddress = "192.168.150.1/24"\n'
OTHER = 'name = "other"\nmode = "isolated"\n[ipv4]\naddress = "192.168.151.1/24"\n'
POOL = 'name = "pool"\npath = "/srv/pool"\n'
VOLUME = '[[disk]]\npool = "pool"\nvolume = "disk"\n'
GUESTS = {
    "web1": definition("web1", cmdline="virtd.rate=50", more='[[nic]]\nnetwork = "lab"\n'),
    "web2": definition("web2", more=VOLUME),
}


def say(text: str) -> None:
    print(f"tidy: {text}", flush=True)


class Host:
    """A lab with one of each, in use."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.chance = random.Random(seed)
        self.version = "0.1.0"

    def set_up(self) -> None:
        lab = self.lab
        lab.sh("echo nameserver 192.0.2.53 >/etc/resolv.conf")  # without one dnsmasq warns, and is right
        for version in ("0.1.0", "0.1.1"):
            lab.copy(build_rpm(version), f"/root/virtd-{version}.rpm")
        for text in (NETWORK, OTHER):
            lab.virtdctl("network", "define", "-", stdin=text)
        lab.virtdctl("network", "start", "lab")
        lab.virtdctl("pool", "define", "-", stdin=POOL)
        lab.virtdctl("pool", "build", "pool")
        lab.virtdctl("pool", "start", "pool")
        lab.virtdctl("volume", "create", "pool", "disk", "16M")
        for name, text in GUESTS.items():
            lab.virtdctl("define", "-", stdin=text)
            lab.virtdctl("start", name)
            lab.wait_ready(name, timeout=300)
        lab.virtdctl("container", "create", "box", "--image", "/usr/share/virtd-lab/debian.tar.xz")
        text = lab.sh("cat /etc/virtd/lxc/box.toml") + '[[nic]]\nnetwork = "lab"\n'
        lab.virtdctl("container", "define", "-", stdin=text)
        lab.virtdctl("container", "start", "box")

    # What people do

    def suspend(self) -> None:
        self.lab.virtdctl("suspend", "web1")
        self.lab.virtdctl("resume", "web1")

    def stop(self) -> None:
        self.lab.virtdctl("stop", "web2")
        self.lab.virtdctl("start", "web2")

    def shut_down(self) -> None:
        boots = self.lab.console("web1").count(b"virtd-lab ready")
        self.lab.virtdctl("shutdown", "--timeout", "300", "web1")
        self.lab.virtdctl("start", "web1")
        self.lab.wait_ready("web1", boots + 1, 300)

    def reboot(self) -> None:
        boots = self.lab.console("web1").count(b"virtd-lab ready")
        self.lab.virtdctl("reboot", "--timeout", "300", "web1")
        self.lab.wait_ready("web1", boots + 1, 300)

    def look(self) -> None:
        for words in (
            ("list",), ("info", "web1"), ("log", "-n", "5", "web1"), ("network", "info", "lab"), ("slots",),
            ("network", "leases", "lab"), ("pool", "info", "pool"), ("volume", "list", "pool"), ("container", "list"),
            ("console", "--read-only", "--timeout", "1", "web1"),
        ):  # fmt: skip
            self.lab.virtdctl(*words)

    def contain(self) -> None:
        self.lab.virtdctl("container", "freeze", "box")
        self.lab.virtdctl("container", "thaw", "box")
        self.lab.virtdctl("container", "exec", "-T", "box", "--", "true")

    def end_container(self) -> None:
        self.lab.virtdctl("container", self.chance.choice(["stop", "shutdown"]), "box")
        self.lab.virtdctl("container", "start", "box")

    def cycle_network(self) -> None:
        self.lab.virtdctl("network", "start", "other")
        self.lab.virtdctl("network", "define", "-", stdin=OTHER + "dhcp = false\n" * self.chance.randrange(2))
        self.lab.virtdctl("network", "stop", "other")

    def volumes(self) -> None:
        self.lab.virtdctl("volume", "create", "--format", "qcow2", "pool", "new", "8M")
        self.lab.virtdctl("volume", "clone", "pool", "new", "copy")
        self.lab.virtdctl("volume", "resize", "pool", "copy", "16M")
        self.lab.virtdctl("volume", "delete", "pool", "new", "copy")

    def define(self) -> None:
        self.lab.virtdctl("define", "-", stdin=definition("passing"))
        self.lab.virtdctl("autostart", "passing")
        self.lab.virtdctl("undefine", "passing")

    def restart(self) -> None:
        self.lab.sh("systemctl restart virtd.service")

    def reload(self) -> None:
        self.lab.sh("systemctl reload virtd.service")

    def daemon_reload(self) -> None:
        self.lab.sh("for i in 1 2 3; do systemctl daemon-reload; done")

    def reexec(self) -> None:
        self.lab.sh("systemctl daemon-reexec")

    def upgrade(self) -> None:
        old = self.version != "0.1.0"
        self.version = "0.1.0" if old else "0.1.1"
        self.lab.sh(f"rpm -U {'--oldpackage' if old else ''} /root/virtd-{self.version}.rpm")

    def fsck(self) -> None:
        if found := self.lab.json("fsck")["differences"]:
            raise Failed(f"fsck finds {found}")

    def steps(self) -> list[Callable[[], None]]:
        return [
            self.suspend, self.stop, self.shut_down, self.reboot, self.look, self.contain, self.end_container,
            self.cycle_network, self.volumes, self.define, self.restart, self.reload, self.daemon_reload, self.reexec,
            self.upgrade, self.fsck,
        ]  # fmt: skip


# All labs have the limit of one user, where that isn't above it: what virtd says of it is right.
SHARED = r"gets a pipe of [0-9]+ bytes only .*"
CAP_SYS_RESOURCE = 24


def is_above_limits() -> bool:
    """Whether root here has CAP_SYS_RESOURCE."""
    (mask,) = re.findall(r"^CapBnd:\s+([0-9a-f]+)$", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    return bool(int(mask, 16) >> CAP_SYS_RESOURCE & 1)


def loud(lab: Lab) -> collections.Counter[str]:
    """Warnings and worse about virtd's units, with how often each was said."""
    lines = lab.run("journalctl", "-q", "-b", "-p", "warning", "-o", "json", "-u", "virtd*").stdout.splitlines()
    texts = [str(json.loads(line)["MESSAGE"]) for line in lines]
    passed_over = PID1S_OWN.pattern if is_above_limits() else f"{PID1S_OWN.pattern}|{SHARED}"
    return collections.Counter(re.sub(r"\d+", "N", text) for text in texts if not re.search(passed_over, text))


def verdict(lab: Lab) -> list[str]:
    """What somebody was told of, or would be."""
    found = [f"{count} times in the journal: {text}" for text, count in loud(lab).most_common()]
    status = lab.virtdctl("status", check=False)
    if status.returncode:
        found.append(f"status exits with {status.returncode}: {status.stdout}{status.stderr}")
    fsck = lab.virtdctl("fsck", "--json", check=False)
    if fsck.stdout:
        found += [f"fsck: {one}" for one in json.loads(fsck.stdout)["differences"]]
    else:
        found.append(f"fsck exits with {fsck.returncode}: {fsck.stderr}")
    if failed := lab.sh("systemctl list-units --failed --plain --no-legend 'virtd*'"):
        found.append(f"failed units: {failed}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.proof.tidy", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--suite", default="trixie")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", action="store_true", help="leave the lab for a look")
    args = parser.parse_args()
    lab = Lab(f"tidy-{os.getpid()}")
    say(f"seed {args.seed}, lab {lab.name}")
    count: collections.Counter[str] = collections.Counter()
    failed = ""
    try:
        Lab.up(lab.name, "--suite", args.suite, "--rpm", str(build_rpm("0.1.0")), quiet=True)
        host = Host(lab, args.seed)
        host.set_up()
        until = time.monotonic() + 60 * args.minutes
        while time.monotonic() < until and not failed:
            step = host.chance.choice(host.steps())
            try:
                step()
            except Failed as exc:
                failed = f"{step.__name__}: {exc}"
                say(failed)
                print(lab.sh("journalctl -q -b -o short-precise -n 200 | cut -c1-300", check=False), flush=True)
            count[step.__name__] += 1
        say(", ".join(f"{name} {number}" for name, number in sorted(count.items())))
        if host.version != "0.1.0":
            host.upgrade()
        found = verdict(lab)
        for one in found:
            say(one)
        found += [failed] if failed else []
        say("somebody was told of what isn't wrong" if found else f"nothing to tell after {args.minutes:g} minutes")
        return 1 if found else 0
    finally:
        if not args.keep:
            lab.down()


if __name__ == "__main__":
    sys.exit(main())
