# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes: made, cloned and uploaded by command, beside virsh and beside the tools that copy. Runs inside a lab.

Each operation is followed by its deletion, which isn't measured. The tools alone are measured twice: as they are, and
with the sync(1) that makes their copy outlive a power cut, as virtd's does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer

TOP = "/srv/bench"
POOL = "bench"
MIB = 1 << 20
LARGE = 4096  # MiB; it is only cloned, and only three times

Command = list[list[str]]  # one after the other


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds of each operation by who does it and, where bytes are moved, how many there are."""
    sizes = (16, 256) if quick else (16, 256, 1024, LARGE)
    runs = 3 if quick else 7
    os.makedirs(f"{TOP}/files")
    for peer in peers:
        os.mkdir(f"{TOP}/{peer.name}", 0o711)
        _prepare(peer)
    try:
        operations: dict[str, tuple[int, dict[str, tuple[Command, Command]]]] = {
            "create raw 10G": (0, {peer.name: _create(peer, "raw") for peer in peers}),
            "create qcow2 10G": (0, {peer.name: _create(peer, "qcow2") for peer in peers}),
        }
        for size in sizes:
            file = f"{TOP}/files/{size}"
            _fill(file, size)
            for peer in peers:
                _run(_upload(peer, f"source{size}", file, size)[0])
            operations[f"clone {size}M"] = (size, {peer.name: _clone(peer, f"source{size}") for peer in peers})
            operations[f"clone {size}M"][1].update(_alone(file))
            if size == LARGE:
                continue
            operations[f"upload {size}M"] = (size, {peer.name: _upload(peer, "new", file, size) for peer in peers})
            operations[f"upload {size}M"][1].update(_alone(file))
        return {
            "runs": runs,
            "operations": {
                title: {"mib": size, "seconds": _measured(who, 3 if size == LARGE else runs)}
                for title, (size, who) in operations.items()
            },
        }
    finally:
        for peer in peers:
            _forget(peer)
        shutil.rmtree(TOP)


def _measured(who: dict[str, tuple[Command, Command]], runs: int) -> dict[str, dict[str, float]]:
    """They take turns; the disk has nothing left to write when each begins."""
    taken: dict[str, list[float]] = {}
    for _ in range(runs):
        for name, (command, after) in who.items():
            os.sync()
            begun = time.perf_counter()
            _run(command)
            taken.setdefault(name, []).append(time.perf_counter() - begun)
            _run(after)
    return {name: {"median": statistics.median(values), "min": min(values)} for name, values in taken.items()}


def _fill(path: str, size: int) -> None:
    with open(path, "wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def _alone(file: str) -> dict[str, tuple[Command, Command]]:
    new = f"{TOP}/files/new"
    cp = ["cp", "--reflink=auto", file, new]
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "raw", file, new]
    after = [["rm", new]]
    return {
        "cp": ([cp], after),
        "cp, sync": ([cp, ["sync", new]], after),
        "qemu-img": ([convert], after),
        "qemu-img, sync": ([convert, ["sync", new]], after),
    }


def _prepare(peer: Peer) -> None:
    if peer.name == "virtd":
        text = f'name = "{POOL}"\npath = "{TOP}/virtd"\n'
        subprocess.run(
            ["virtdctl", "pool", "define", "-"], input=text, text=True, check=True, stdout=subprocess.DEVNULL
        )
        _run([["virtdctl", "pool", "start", POOL]])
        return
    _run(
        [
            ["virsh", "-q", "pool-define-as", POOL, "dir", "--target", f"{TOP}/{peer.name}"],
            ["virsh", "-q", "pool-start", POOL],
        ]
    )


def _forget(peer: Peer) -> None:
    stop, undefine = ("stop", "undefine") if peer.name == "virtd" else ("pool-destroy", "pool-undefine")
    start = ["virtdctl", "pool"] if peer.name == "virtd" else ["virsh", "-q"]
    with contextlib.suppress(subprocess.CalledProcessError):
        _run([[*start, stop, POOL], [*start, undefine, POOL]])


def _volume(name: str, **verbs: Callable[[], Command]) -> Callable[[Peer], tuple[Command, Command]]:
    """What a peer is to do, by its name, and how it deletes the volume afterwards."""

    def of(peer: Peer) -> tuple[Command, Command]:
        if peer.name == "virtd":
            return verbs["virtd"](), [["virtdctl", "volume", "delete", POOL, name]]
        return verbs["libvirt"](), [["virsh", "-q", "vol-delete", name, "--pool", POOL]]

    return of


def _create(peer: Peer, kind: str) -> tuple[Command, Command]:
    return _volume(
        "new",
        virtd=lambda: [["virtdctl", "volume", "create", POOL, "new", "10G", "--format", kind]],
        libvirt=lambda: [["virsh", "-q", "vol-create-as", POOL, "new", "10G", "--format", kind, "--allocation", "0"]],
    )(peer)


def _clone(peer: Peer, source: str) -> tuple[Command, Command]:
    return _volume(
        "new",
        virtd=lambda: [["virtdctl", "volume", "clone", POOL, source, "new"]],
        libvirt=lambda: [["virsh", "-q", "vol-clone", source, "new", "--pool", POOL]],
    )(peer)


def _upload(peer: Peer, name: str, file: str, size: int) -> tuple[Command, Command]:
    return _volume(
        name,
        virtd=lambda: [["virtdctl", "volume", "upload", POOL, name, file]],
        libvirt=lambda: [
            ["virsh", "-q", "vol-create-as", POOL, name, f"{size}M", "--format", "raw", "--allocation", "0"],
            ["virsh", "-q", "vol-upload", name, file, "--pool", POOL],
        ],
    )(peer)


def _run(command: Command) -> None:
    for argv in command:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
