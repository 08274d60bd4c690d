# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtd and libvirt behind one interface, for benchmarks that run both inside a lab.

Guests are the same: 16 MiB, an empty CD-ROM, the `pc` machine, sitting in SeaBIOS after it found nothing to boot.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from typing import Any

MEDIUM = "/var/lib/virtd/bench.iso"
MEMORY_MIB = 16
PATIENCE = 60.0


def name_of(number: int) -> str:
    return f"bench{number:03d}"


class Peer(ABC):
    """One daemon. `running` uses a fresh connection each time; it raises Away while the daemon can't answer."""

    name: str
    unit: str
    processes: tuple[str, ...]  # the units whose memory counts

    class Away(Exception):
        """The daemon went away before it answered."""

    @abstractmethod
    def define(self, name: str) -> None: ...

    @abstractmethod
    def undefine(self, name: str) -> None: ...

    @abstractmethod
    def running(self) -> set[str]: ...

    @abstractmethod
    def command(self, verb: str, *names: str) -> list[list[str]]:
        """The commands that a person would type to do `verb` ("list", "start", "stop") to each of `names`."""

    def run(self, verb: str, *names: str) -> None:
        for argv in self.command(verb, *names):
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def have(self, count: int) -> None:
        """Exactly `count` guests defined and running."""
        wanted = {name_of(number) for number in range(count)}
        present = self.running()
        for name in sorted(present - wanted):
            self.run("stop", name)
            self.undefine(name)
        for name in sorted(wanted - present):
            self.define(name)
            self.run("start", name)

    def main_pid(self) -> int:
        return int(_systemctl("show", "-P", "MainPID", self.unit))

    def restart(self, count: int) -> float:
        """Seconds from `systemctl restart` to a complete listing by a fresh connection."""
        _systemctl("reset-failed", self.unit)
        begun = time.perf_counter()
        subprocess.run(["systemctl", "restart", self.unit], check=True)
        self._until(count)
        return time.perf_counter() - begun

    def kill(self, count: int) -> float:
        """The same from SIGKILL."""
        pid = self.main_pid()
        _systemctl("reset-failed", self.unit)  # libvirtd's unit gives up after the fifth end in ten seconds
        begun = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        self._until(count)
        return time.perf_counter() - begun

    def _until(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(Peer.Away):
                if len(self.running()) == count:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} doesn't list {count} running guests within {PATIENCE:g} s")
            time.sleep(0.001)

    def pss(self) -> float:
        """MiB of the daemon's processes, pages that are shared with others counted in part (PSS)."""
        total = 0
        for unit in self.processes:
            with open(f"/proc/{_systemctl('show', '-P', 'MainPID', unit)}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        return total / 1024


class Virtd(Peer):
    """Over the Varlink socket, as virtdctl does it."""

    name = "virtd"
    unit = "virtd.service"
    processes = ("virtd.service",)

    def __init__(self) -> None:
        with open(MEDIUM, "wb") as file:
            file.truncate(1 << 20)
        os.chmod(MEDIUM, 0o644)

    def call(self, method: str, **parameters: Any) -> Any:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.connect("/run/virtd/virtd.sock")
                call = {"method": f"org.virtd1.{method}", "parameters": parameters}
                link.sendall(json.dumps(call).encode() + b"\0")
                answer = b""
                while not answer.endswith(b"\0"):
                    if not (piece := link.recv(1 << 16)):
                        raise Peer.Away
                    answer += piece
        except OSError as exc:
            raise Peer.Away from exc
        reply = json.loads(answer[:-1])
        if "error" in reply:
            raise RuntimeError(str(reply))
        return reply["parameters"]

    def define(self, name: str) -> None:
        text = (
            f'name = "{name}"\nmemory = "{MEMORY_MIB}M"\nmachine = "pc"\nrng = false\n[[cdrom]]\npath = "{MEDIUM}"\n'
        )
        self.call("Define", text=text, source="bench")

    def undefine(self, name: str) -> None:
        self.call("Undefine", name=name)

    def running(self) -> set[str]:
        return {item["name"] for item in self.call("List")["objects"] if item["state"] == "running"}

    def command(self, verb: str, *names: str) -> list[list[str]]:
        return [["virtdctl", verb, *names]]


class Libvirt(Peer):
    """Over libvirt's own Python binding; guests' consoles are logged by virtlogd, as virtd logs them."""

    name = "libvirt"
    unit = "libvirtd.service"
    processes = ("libvirtd.service", "virtlogd.service")

    def __init__(self) -> None:
        import libvirt  # type: ignore[import-not-found,unused-ignore]  # only in the lab

        self._libvirt = libvirt
        libvirt.registerErrorHandler(lambda *_: None, None)
        subprocess.run(["systemctl", "start", self.unit], check=True)

    @contextlib.contextmanager
    def _connection(self) -> Any:
        try:
            connection = self._libvirt.open("qemu:///system")
            try:
                yield connection
            finally:
                connection.close()
        except self._libvirt.libvirtError as exc:
            raise Peer.Away(str(exc)) from exc

    def define(self, name: str) -> None:
        log = f"/var/log/libvirt/qemu/{name}-serial.log"
        with self._connection() as connection:
            connection.defineXML(
                f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>{MEMORY_MIB}</memory><vcpu>1</vcpu>"
                "<os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features><devices>"
                f"<disk type='file' device='cdrom'><source file='{MEDIUM}'/><target dev='hda'/><readonly/></disk>"
                f"<serial type='pty'><log file='{log}' append='on'/></serial>"
                "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
            )

    def undefine(self, name: str) -> None:
        with self._connection() as connection:
            connection.lookupByName(name).undefine()

    def running(self) -> set[str]:
        with self._connection() as connection:
            found = connection.listAllDomains(self._libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING)
            return {domain.name() for domain in found}

    def command(self, verb: str, *names: str) -> list[list[str]]:
        verb = {"stop": "destroy"}.get(verb, verb)
        return [["virsh", "-q", verb, name] for name in names] if names else [["virsh", verb]]


def peers(names: list[str]) -> list[Peer]:
    kinds: dict[str, type[Peer]] = {"virtd": Virtd, "libvirt": Libvirt}
    return [kinds[name]() for name in names]


def _systemctl(*arguments: str) -> str:
    return subprocess.run(["systemctl", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
