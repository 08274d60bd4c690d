# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers: start to the first output, and stop, beside LXC by itself and libvirt's driver. Runs inside a lab."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.peers import Peer

TOP = "/var/lib/virtd/containers"
FIRST = 0x62000000
PATIENCE = 60.0
# Its programs are the lab's own; what it says first it says into a file as well, which all can be asked for alike.
MAKE = f"""set -e
rm -rf $1 && mkdir -p $1 && cd $1 && mkdir -p etc tmp usr proc sys dev run
for name in bin sbin lib lib64; do ln -sfn usr/$name $name; done
printf '#!/bin/sh\\necho up; echo up >/tmp/up; exec sleep 1000000\\n' >program
chmod 755 . program; chown -hR {FIRST}:{FIRST} .
"""
LXC = f"""lxc.uts.name = bench
lxc.rootfs.path = dir:{{root}}
lxc.mount.auto = proc:mixed sys:mixed cgroup:mixed
lxc.mount.entry = /usr usr none bind,ro 0 0
lxc.idmap = u 0 {FIRST} 65536
lxc.idmap = g 0 {FIRST} 65536
lxc.apparmor.profile = unconfined
lxc.net.0.type = empty
"""
XML = f"""<domain type='lxc'><name>{{name}}</name><memory unit='MiB'>64</memory>
<os><type>exe</type><init>/program</init></os>
<idmap><uid start='0' target='{FIRST}' count='65536'/><gid start='0' target='{FIRST}' count='65536'/></idmap>
<devices><filesystem type='mount'><source dir='{{root}}'/><target dir='/'/></filesystem>
<filesystem type='mount'><source dir='/usr'/><target dir='/usr'/><readonly/></filesystem>
<console type='pty'/></devices></domain>
"""


class Runner(ABC):
    """Who starts and stops containers."""

    name: str
    short: str  # of its container

    @abstractmethod
    def define(self, name: str, root: str) -> None: ...

    @abstractmethod
    def start(self, name: str) -> list[str]: ...

    @abstractmethod
    def stop(self, name: str) -> list[str]: ...

    def forget(self, name: str) -> None:  # noqa: B027 (LXC by itself has nothing to forget)
        """Remove its definition."""


class Virtd(Runner):
    name = "virtd"
    short = "vir"

    def define(self, name: str, root: str) -> None:
        mount = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'
        text = f'name = "{name}"\nrootfs = "{root}"\ncommand = ["/program"]\n{mount}'
        subprocess.run(
            ["virtdctl", "container", "define", "-"], input=text, text=True, check=True, stdout=subprocess.DEVNULL
        )

    def start(self, name: str) -> list[str]:
        return ["virtdctl", "container", "start", name]

    def stop(self, name: str) -> list[str]:
        return ["virtdctl", "container", "stop", name]

    def forget(self, name: str) -> None:
        run(["virtdctl", "container", "undefine", name])


class Alone(Runner):
    name = "LXC alone"
    short = "lxc"

    def define(self, name: str, root: str) -> None:
        os.makedirs(f"/var/lib/lxc/{name}", exist_ok=True)
        with open(f"/var/lib/lxc/{name}/config", "w") as file:
            file.write(LXC.format(root=root))

    def start(self, name: str) -> list[str]:
        return ["lxc-execute", "-d", "-n", name, "--", "/program"]

    def stop(self, name: str) -> list[str]:
        return ["lxc-stop", "-k", "-n", name]


class Libvirt(Runner):
    name = "libvirt"
    short = "lib"

    def define(self, name: str, root: str) -> None:
        path = f"/tmp/{name}.xml"
        with open(path, "w") as file:
            file.write(XML.format(name=name, root=root))
        run(["virsh", "-q", "-c", "lxc:///", "define", path])

    def start(self, name: str) -> list[str]:
        return ["virsh", "-q", "-c", "lxc:///", "start", name]

    def stop(self, name: str) -> list[str]:
        return ["virsh", "-q", "-c", "lxc:///", "destroy", name]

    def forget(self, name: str) -> None:
        run(["virsh", "-q", "-c", "lxc:///", "undefine", name])


def measure(peers: list[Peer], *, quick: bool) -> dict[str, Any]:
    """Seconds from the command until the container's program has said something, and of the command that stops it;
    MiB of the daemon with one container and with many.
    """
    many, rounds = (5, 5) if quick else (20, 20)
    taken: dict[str, dict[str, list[float]]] = {"start": {}, "stop": {}}
    asked: list[float] = []
    missing: dict[str, str] = {}
    runners: list[Runner] = [Virtd(), Alone(), *([Libvirt()] if len(peers) > 1 else [])]
    for runner in list(runners):
        name, root = f"bench-{runner.short}", f"{TOP}/bench-{runner.short}"
        subprocess.run(["sh", "-c", MAKE, "sh", root], check=True)
        try:
            runner.define(name, root)
            _round(runner, name, root)  # what is read for the first time isn't anybody's
        except (subprocess.CalledProcessError, TimeoutError) as exc:
            said = str(getattr(exc, "stderr", "") or exc).strip().splitlines()
            missing[runner.name] = said[-1][:200] if said else str(exc)
            print(f"bench: {runner.name} can't: {missing[runner.name]}", file=sys.stderr)
            runners.remove(runner)
    for _ in range(rounds):
        for runner in runners:
            name = f"bench-{runner.short}"
            started, stopped = _round(runner, name, f"{TOP}/{name}")
            taken["start"].setdefault(runner.name, []).append(started)
            taken["stop"].setdefault(runner.name, []).append(stopped)
    # What a command that does nothing takes: Python's start, a call, an answer.
    for _ in range(rounds):
        begun = time.perf_counter()
        run(["virtdctl", "container", "info", "bench-vir"])
        asked.append(time.perf_counter() - begun)
    for runner in runners:
        with contextlib.suppress(subprocess.CalledProcessError):
            runner.forget(f"bench-{runner.short}")
    medians = {
        verb: {name: {"median": statistics.median(times), "min": min(times)} for name, times in by_runner.items()}
        for verb, by_runner in taken.items()
    }
    client = {"median": statistics.median(asked), "min": min(asked)}
    return {"rounds": rounds, "missing": missing, **medians, "client": client, "memory": _memory(peers[0], many)}


def _round(runner: Runner, name: str, root: str) -> tuple[float, float]:
    """A start until the first output, and a stop."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{root}/tmp/up")
    begun = time.perf_counter()
    run(runner.start(name))
    while not os.path.exists(f"{root}/tmp/up"):
        if time.perf_counter() - begun > PATIENCE:
            raise TimeoutError(f"{name} says nothing")
        time.sleep(0.001)
    started = time.perf_counter() - begun
    begun = time.perf_counter()
    run(runner.stop(name))
    return started, time.perf_counter() - begun


def _memory(virtd: Peer, many: int) -> dict[str, float]:
    """PSS of a daemon that has taken over so many."""
    found: dict[str, float] = {}
    names = [f"bench-many{number:02d}" for number in range(many)]
    for name in names:
        subprocess.run(["sh", "-c", MAKE, "sh", f"{TOP}/{name}"], check=True)
        Virtd().define(name, f"{TOP}/{name}")
    for count, part in (("1", names[:1]), (str(many), names[1:])):
        for name in part:
            run(Virtd().start(name))
        run(["systemctl", "restart", virtd.unit])
        time.sleep(4)
        found[count] = virtd.pss()
    for name in names:
        run(Virtd().stop(name))
        Virtd().forget(name)
    return found


def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
