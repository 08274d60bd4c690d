# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks: start and stop by command, beside virsh's net-start, and rules applied again. Runs inside a lab."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer

XML = (
    "<network><name>{name}</name><forward mode='nat'/><bridge name='{name}'/><ip address='10.{second}.{third}.1' "
    "netmask='255.255.255.0'><dhcp><range start='10.{second}.{third}.2' end='10.{second}.{third}.254'/></dhcp></ip>"
    "</network>"
)
TOML = 'name = "{name}"\nbridge = "{name}"\n[ipv4]\naddress = "10.{second}.{third}.1/24"\n'
PATIENCE = 30.0


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds of each start and stop by its command, and, with all of virtd's active, of applying rules again."""
    many = 10 if quick else 50
    taken: dict[str, dict[str, list[float]]] = {"start": {}, "stop": {}}
    names = {peer.name: [f"{peer.name[:3]}{number:03d}" for number in range(many)] for peer in peers}
    for second, peer in enumerate(peers, 100):
        for third, name in enumerate(names[peer.name]):
            _define(peer, TOML if peer.name == "virtd" else XML, name=name, second=second, third=third)
    try:
        for index in range(many):
            for peer in peers:
                taken["start"].setdefault(peer.name, []).append(_timed(_start(peer, names[peer.name][index])))
        again = _again(names["virtd"])
        for index in range(many):
            for peer in peers:
                taken["stop"].setdefault(peer.name, []).append(_timed(_stop(peer, names[peer.name][index])))
    finally:
        for peer in peers:
            for name in names[peer.name]:
                with contextlib.suppress(subprocess.CalledProcessError):
                    command = (
                        ["virtdctl", "network", "undefine"] if peer.name == "virtd" else ["virsh", "net-undefine"]
                    )
                    _run(*command, name)
    medians = {
        verb: {name: {"median": statistics.median(times), "max": max(times)} for name, times in by_peer.items()}
        for verb, by_peer in taken.items()
    }
    return {"many": many, **medians, "again": again}


def _again(names: list[str]) -> dict[str, float]:
    """All tables gone until all are there again; and a reload that finds them as they were."""
    begun = time.perf_counter()
    _run("nft", "flush", "ruleset")
    flushed = time.perf_counter()
    wanted = {f"table inet virtd-{name}" for name in names}
    while not wanted <= set(_run("nft", "list", "tables").splitlines()):
        if time.perf_counter() - begun > PATIENCE:
            raise TimeoutError("the rules don't come back")
        time.sleep(0.01)
    return {"flushed": time.perf_counter() - flushed, "reload": _timed(["virtdctl", "reload"])}


def _define(peer: Peer, text: str, **values: Any) -> None:
    text = text.format(**values)
    if peer.name == "virtd":
        subprocess.run(
            ["virtdctl", "network", "define", "-"], input=text, text=True, check=True, stdout=subprocess.DEVNULL
        )
        return
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(text)
        file.flush()
        _run("virsh", "-q", "net-define", file.name)


def _start(peer: Peer, name: str) -> list[str]:
    return ["virtdctl", "network", "start", name] if peer.name == "virtd" else ["virsh", "-q", "net-start", name]


def _stop(peer: Peer, name: str) -> list[str]:
    return ["virtdctl", "network", "stop", name] if peer.name == "virtd" else ["virsh", "-q", "net-destroy", name]


def _timed(argv: list[str]) -> float:
    begun = time.perf_counter()
    _run(*argv)
    return time.perf_counter() - begun


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
