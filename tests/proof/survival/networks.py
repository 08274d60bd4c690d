# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks as a subject: one with a guest whose stream goes out through NAT all the while, one that is robbed."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sys
from typing import Any

from tests.harness import Failed, Lab
from tests.live import networks
from tests.live.networks import OUTSIDE
from tests.proof.survival.table import Finding, Verdict

LAN, FRAIL, GUEST = "lan", "frail", "netter"
MAC = "52:54:00:78:00:01"
SINK = "/root/sink.py"
STATE = "/root/sink.json"
UNIT = "sink.service"

# What the stream runs into: all the time a file says how much of it has come, and the longest time in which nothing
# did since the last SIGUSR1.
_SINK = """
import json, os, signal, socket, sys, time
stall = 0.0
def reset(*_):
    global stall
    stall = 0.0
signal.signal(signal.SIGUSR1, reset)
listener = socket.create_server((sys.argv[1], 5000))
connections = total = lines = wrong = 0
error, rest = "", b""
def tell():
    with open(sys.argv[2] + ".new", "w") as file:
        json.dump({"connections": connections, "bytes": total, "lines": lines, "wrong": wrong, "error": error,
                   "stall": stall}, file)
    os.rename(sys.argv[2] + ".new", sys.argv[2])
tell()
while True:
    connection, _ = listener.accept()
    connections += 1
    last = told = time.monotonic()
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError as exc:
            data, error = b"", str(exc)
        now = time.monotonic()
        stall, last = max(stall, now - last), now
        total += len(data)
        *whole, rest = (rest + data).split(b"\\n")
        for line in whole:
            lines += 1
            wrong += int(line.split()[0]) != lines
        if not data or now - told > 0.2:
            error = error or ("" if data else "the stream ended")
            tell()
            told = now
        if not data:
            break
"""
# A soft reboot ends what isn't told to stay; systemd 252 doesn't know of either.
_STAYS = " -p DefaultDependencies=no -p IgnoreOnIsolate=yes"
_SURVIVES = " -p SurviveFinalKillSignal=yes"


class Networks:
    """The promises: bridge, tap, dnsmasq's PID, lease and rules are the same ones; the stream goes on; what was taken
    from the other network is there again."""

    name = driver = "network"
    plural = "networks"

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.identity: dict[str, str] = {}
        self.address = ""
        self.frail_pid = 0
        self.frail_rules = ""
        self.struck = False
        self.deaf = False  # virtd has lost the slots
        self.lines_then = 0
        self._outside: contextlib.ExitStack | None = None

    def prepare(self) -> None:
        lab = self.lab
        self._outside = contextlib.ExitStack()
        self._outside.enter_context(networks.outside(lab))
        lab.write(SINK, _SINK)
        survives = _SURVIVES if int(lab.sh("systemctl --version").split()[1]) >= 255 else ""
        lab.sh(
            f"rm -f {STATE}; systemd-run -q --unit={UNIT}{_STAYS}{survives}"
            f" ip netns exec outside python3 {SINK} {OUTSIDE} {STATE}"
        )
        lab.wait("the sink", lambda: lab.sh(f"test -e {STATE} && echo 1", check=False), 30)
        networks.define(lab, networks.network(LAN, 21).replace("[ipv4]", '[ipv4]\nlease = "12h"'))
        networks.define(lab, networks.network(FRAIL, 22))
        networks.guest(lab, GUEST, LAN, MAC)
        lab.wait_ready(GUEST, timeout=120)
        self.address = networks.lease(lab, GUEST)
        networks.run(lab, GUEST, networks.stream(OUTSIDE))

    def before(self) -> None:
        lab = self.lab
        lab.wait("frail's dnsmasq", lambda: networks.info(lab, FRAIL)["pid"], 60)
        self.identity = self._identity()
        self.frail_pid = networks.info(lab, FRAIL)["pid"]
        self.frail_rules = _plain(networks.rules(lab, FRAIL))
        self.struck = self.deaf = False
        lab.sh(f"systemctl kill -s USR1 {UNIT}")
        self.lines_then = self._sink()["lines"]
        self._more_lines()

    def strike(self, *, gap: bool) -> None:
        """dnsmasq dies, and the rules with it, under another daemon's eyes or nobody's."""
        self.lab.sh(f"kill -9 {self.frail_pid}; nft delete table inet virtd-{FRAIL}")
        self.struck = True

    def after(self, *, attached: bool) -> list[Finding]:
        lab, found = self.lab, list[Finding]()

        def lost(what: str) -> None:
            found.append(Finding(Verdict.LOST, what))

        state = self._settled(LAN)
        if state["state"] != "active":
            lost(f"the network is {state['state']}: {state['reason']}")
            return found
        now = self._identity()
        for what, then in self.identity.items():
            if now[what] != then:
                lost(f"{what}: {' '.join(now[what].split())[:60]} instead of {' '.join(then.split())[:60]}")
        try:
            self._more_lines()
        except Failed:
            lost("the stream through NAT stands still")
        sink = self._sink()
        if (sink["connections"], sink["wrong"], sink["error"]) != (1, 0, ""):
            lost(f"the stream through NAT: {sink['error'] or str(sink['wrong']) + ' lines wrong'}")
        if not found:
            with contextlib.suppress(Failed):
                if networks.renew(lab, GUEST, LAN, MAC) == self.address:
                    print(f"survival: {sink['bytes']} bytes, longest stall {sink['stall']:.2f} s", file=sys.stderr)
                    return found + self._slots_lost(state) + self._frail()
            lost("the lease can't be renewed")
        return found

    def detach(self) -> None:
        if self._outside is not None:
            self.lab.sh(f"systemctl stop {UNIT}", check=False)
            self._outside.close()
            self._outside = None

    def clear(self) -> list[Finding]:
        self.detach()
        self.lab.undefine_all()
        left = self.lab.sh("ls /sys/class/net | grep -v '^lo$'; nft list tables", check=False)
        return [Finding(Verdict.LOST, f"left over: {' '.join(left.split())}")] if left else []

    # Promises

    def _settled(self, name: str) -> dict[str, Any]:
        """A network, as soon as the daemon tells of it."""

        def look() -> dict[str, Any] | None:
            try:
                return networks.info(self.lab, name)
            except Failed:
                return None

        found: dict[str, Any] = self.lab.wait(f"an answer about {name}", look, 60)
        return found

    def _identity(self) -> dict[str, str]:
        """Interfaces by their numbers, dnsmasq by its PID and invocation, rules by the kernel's handles."""
        lab = self.lab
        leases = lab.json("network", "leases", LAN)
        return {
            "bridge": lab.sh(f"cat /sys/class/net/vd-{LAN}/ifindex /sys/class/net/vd-{LAN}/address", check=False),
            "tap": lab.sh(f"cat /sys/class/net/vt-{GUEST}-0/ifindex", check=False),
            "dnsmasq": lab.sh(f"systemctl show -P MainPID -P InvocationID virtd-network-{LAN}.service"),
            "lease": " ".join(f"{row['mac']} {row['address']} {row['name']}" for row in leases),
            "rules": networks.rules(lab, LAN),
        }

    def _sink(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.lab.sh(f"cat {STATE}"))
        return found

    def _more_lines(self) -> None:
        """Wait until more of the stream has come. Raises Failed."""
        seen = self._sink()["lines"]
        self.lab.wait("more of the stream", lambda: self._sink()["lines"] > seen + 40, 60)

    def _slots_lost(self, state: dict[str, Any]) -> list[Finding]:
        """Without its pipes dnsmasq runs on, and isn't heard any more; that has to be told."""
        if len(state["slots"]) == 5:
            return []
        self.deaf = True
        if not any("Slot" in problem["text"] for problem in state["problems"]):
            return [Finding(Verdict.LOST, f"{len(state['slots'])} slots of 5, and virtdctl doesn't say so")]
        return [Finding(Verdict.DEGRADED, "no dnsmasq log until restarted")]

    def _frail(self) -> list[Finding]:
        """What was taken from the other network."""
        if not self.struck:
            return []

        def wrong() -> list[str]:
            now = self._settled(FRAIL)
            found = [problem["text"] for problem in now["problems"]]
            if self.deaf and now["pid"] is None and any("no room" in text for text in found):
                found = []  # where the slots were lost there may be none for new ones, which has been told
            elif now["pid"] in (None, self.frail_pid):
                found.append(f"dnsmasq is PID {now['pid']}, was {self.frail_pid}")
            rules = _plain(networks.rules(self.lab, FRAIL))
            return found + [
                line for line in difflib.ndiff(self.frail_rules.splitlines(), rules.splitlines()) if line[0] in "+-"
            ]

        try:
            self.lab.wait("the other network", lambda: not wrong(), 90)
        except Failed:
            return [Finding(Verdict.LOST, f"what was taken isn't there again: {'; '.join(wrong())[:200]}")]
        return []


def _plain(rules: str) -> str:
    """Without the handles, which are others for rules that were made again."""
    return re.sub(r" # handle \d+", "", rules)
