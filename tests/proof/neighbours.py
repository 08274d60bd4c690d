# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network of ours on a host that has docker and a network of libvirt's, all of them real: `make neighbours`.

Debian's packages are installed into a lab, which takes some minutes. tests/live/test_networks.py makes do with their
tables. VIRTD_LAB=NAME uses a lab that has all of it already.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from tests.debian import install
from tests.harness import Lab, build_rpm
from tests.live import networks
from tests.live.networks import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = "docker.io iptables libvirt-daemon-system libvirt-daemon-driver-network libvirt-clients"
MAC = "52:54:00:79:00:01"
FORWARD = '[[forward]]\nport = 8080\nto = "10.77.6.50"\n'
# Where docker itself makes the host forward, and only there, it drops whatever else the host would forward.
NOTHING_FORWARDED = "sysctl -qw net.ipv4.ip_forward=0"


def say(text: str) -> None:
    print(f"neighbours: {text}", flush=True)


def theirs(lab: Lab) -> list[dict[str, Any]]:
    """Every table but ours as the kernel has it, handles included; not how many packets have come by."""

    def still(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key == "counter" else still(item) for key, item in value.items()}
        return [still(item) for item in value] if isinstance(value, list) else value

    found = []
    for item in json.loads(lab.sh("nft -j list ruleset"))["nftables"]:
        for kind, about in item.items():
            name = about.get("table", about.get("name") if kind == "table" else "")
            if name and not name.startswith("virtd-"):
                found.append(still(item))
    return found


def reaches(lab: Lab, *where: str) -> bool:
    """Whether somebody there reaches what is outside the host."""
    return lab.run(*where, "ping", "-c", "1", "-W", "3", OUTSIDE, check=False).returncode == 0


def guest_reaches(lab: Lab) -> bool:
    return networks.run(lab, "web1", f"ping -c 1 -W 3 {OUTSIDE}")[0] == 0


def problems(lab: Lab) -> list[dict[str, str]]:
    found: list[dict[str, str]] = networks.info(lab, "nat")["problems"]
    return found


def ours_leaves_theirs(lab: Lab) -> None:
    before = theirs(lab)
    assert any(item.get("chain", {}).get("name") == "DOCKER-USER" for item in before)
    assert any("virbr0" in json.dumps(item) for item in before)
    text = networks.network("nat", 6)

    def change() -> None:
        lab.virtdctl("network", "define", "-", stdin=text + FORWARD)
        lab.sh("systemctl reload virtd.service")

    def gone() -> None:
        lab.sh("nft delete table inet virtd-nat")
        lab.wait("the rules", lambda: networks.rules(lab, "nat"), 30)

    steps: dict[str, Callable[[], object]] = {
        "define and start": lambda: networks.define(lab, text),
        "reload": change,
        "rules deleted and back": gone,
        "restart of virtd": lambda: lab.sh("systemctl restart virtd.service"),
        "stop": lambda: lab.virtdctl("network", "stop", "nat"),
        "start": lambda: lab.virtdctl("network", "start", "nat"),
    }
    for what, step in steps.items():
        step()
        assert theirs(lab) == before, what
        say(f"{what}: {len(before)} objects of docker's and libvirt's are as they were")


def guests_get_out(lab: Lab) -> None:
    networks.guest(lab, "web1", "nat", MAC)
    lab.wait_ready("web1", timeout=120)
    networks.lease(lab, "web1")
    (problem,) = lab.wait("the problem", lambda: problems(lab), 30)
    assert not guest_reaches(lab)
    say(f"docker drops it, and virtdctl says so: {problem['text']}")
    lab.sh(problem["hint"].rstrip("."))
    assert guest_reaches(lab)
    lab.wait("the end of the problem", lambda: not problems(lab), 30)
    say("with the hint done as it stands, the guest gets out, and the problem is over")


def theirs_go_on(lab: Lab) -> None:
    """Theirs get out as well, and what they do doesn't touch ours."""
    with networks.neighbour(lab, "v1", "virbr0", "192.168.122.50/24", "192.168.122.1") as libvirts:
        # A port of libvirt's bridge forwards after some seconds only, as the spanning tree has it.
        lab.wait("libvirt's way out", lambda: reaches(lab, *libvirts.split()), 60)
        with networks.neighbour(lab, "d1", "docker0", "172.17.0.50/16", "172.17.0.1") as dockers:
            lab.wait("docker's way out", lambda: reaches(lab, *dockers.split()), 60)
            say("so do libvirt's and docker's")
        before = networks.rules(lab, "nat")
        for command in (
            "systemctl restart docker.service",
            "virsh -q net-destroy default; virsh -q net-start default",
        ):
            lab.sh(command)
            assert networks.rules(lab, "nat") == before, command
            assert guest_reaches(lab), command
            say(f"{command}: our rules are the same ones, and the guest gets out")
    lab.sh("nft flush ruleset")
    lab.wait("the rules", lambda: networks.rules(lab, "nat"), 30)
    lab.wait("the guest", lambda: guest_reaches(lab), 30)
    say("nft flush ruleset: ours come back; theirs are theirs to mend")


def look(lab: Lab) -> None:
    lab.sh(f"{NOTHING_FORWARDED}; systemctl start docker.service")
    lab.sh("systemctl start virtlogd.socket libvirtd.socket; virsh -q net-start default")
    with networks.outside(lab):
        ours_leaves_theirs(lab)
        guests_get_out(lab)
        theirs_go_on(lab)
    say("all of it holds")


def main() -> int:
    if name := os.environ.get("VIRTD_LAB"):
        look(Lab(name))
        return 0
    lab = Lab(f"neighbours-{os.getpid()}")
    try:
        Lab.up(lab.name, "--rpm", str(build_rpm("0.1.0")), quiet=True)
        if problem := install(lab, *PACKAGES.split()):
            say(f"can't be shown here: {problem}")
            return 1
        lab.sh("systemctl daemon-reload")
        look(lab)
    finally:
        lab.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
