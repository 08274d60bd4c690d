# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting guests: one after another, and many at once, beside a QEMU that nobody manages. Runs inside a lab."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.bench.peers import MEDIUM, MEMORY_MIB, name_of

if TYPE_CHECKING:
    from tests.bench.peers import Peer


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds: each of ten starts by its command, and all of `at_once` started by as many commands at once."""
    many = 10 if quick else 50
    rounds = 1 if quick else 2
    one: dict[str, list[float]] = {}
    together: dict[str, list[float]] = {}
    for peer in peers:
        peer.have(0)
    for _ in range(rounds):
        for number in range(10):
            for peer in peers:
                peer.define(name_of(number))
                begun = time.perf_counter()
                peer.run("start", name_of(number))
                one.setdefault(peer.name, []).append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with BareQemu():
                one.setdefault("QEMU alone", []).append(time.perf_counter() - begun)
        for peer in peers:
            peer.have(0)
    for _ in range(rounds):
        for peer in peers:
            names = [name_of(number) for number in range(many)]
            for name in names:
                peer.define(name)
            begun = time.perf_counter()
            with ThreadPoolExecutor(many) as pool:
                list(pool.map(lambda name, peer=peer: peer.run("start", name), names))
            together.setdefault(peer.name, []).append(time.perf_counter() - begun)
            peer.have(0)
    return {
        "rounds": rounds,
        "one": {name: {"median": statistics.median(values), "min": min(values)} for name, values in one.items()},
        "at_once": many,
        "together": {
            name: {"median": statistics.median(values), "min": min(values)} for name, values in together.items()
        },
    }


class BareQemu:
    """QEMU by itself, until it answers its monitor."""

    def __enter__(self) -> BareQemu:
        self._directory = tempfile.TemporaryDirectory()
        path = os.path.join(self._directory.name, "qmp")
        # fmt: off
        self._process = subprocess.Popen([
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", str(MEMORY_MIB), "-nodefaults",
            "-display", "none", "-cdrom", MEDIUM, "-qmp", f"unix:{path},server=on,wait=off", "-serial", "null",
        ])
        # fmt: on
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                try:
                    link.connect(path)
                except OSError:
                    time.sleep(0.001)
                    continue
                link.recv(1 << 12)
                link.sendall(b'{"execute": "qmp_capabilities"}\n')
                link.recv(1 << 12)
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()
