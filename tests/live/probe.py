# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service in a lab that executes the Python it is sent, with a `store` of virtd.fdstore at hand."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from tests.live.bare_lab import LIBRARY, BareLab, bare_lab
from virtd.fdstore import Difference, StoredEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT = "probe.service"

PROBE = """
import fcntl, json, os, resource, socket, time
environ = dict(os.environ)
from virtd.fdstore import *
from virtd.fdstore.notify import connect

begun = time.perf_counter()
store = Store.from_environment(fallback_max=1000, headroom=0, direct=None)
took_over = time.perf_counter() - begun
raw = connect(environ["NOTIFY_SOCKET"])

def file():
    return os.memfd_create("probe")

server = socket.socket(socket.AF_UNIX)
try:
    os.unlink("/run/probe/ctl")
except FileNotFoundError:
    pass
server.bind("/run/probe/ctl")
server.listen()
store.notify("READY=1")
while True:
    connection, _ = server.accept()
    code = connection.makefile().read()
    result = error = None
    try:
        exec(code, globals())
    except Exception as raised:
        error = repr(raised)
    connection.sendall(json.dumps([result, error]).encode())
    connection.close()
"""

ASK = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect("/run/probe/ctl")
connection.sendall(sys.stdin.buffer.read())
connection.shutdown(socket.SHUT_WR)
sys.stdout.write(connection.makefile().read())
"""

SERVICE = f"""
[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/usr/bin/python3 /opt/probe.py
Environment=PYTHONPATH={LIBRARY}
Restart=on-failure
RuntimeDirectory=probe
RuntimeDirectoryPreserve=yes
FileDescriptorStoreMax=1000
FileDescriptorStorePreserve=yes
LimitNOFILE=4096
[Install]
WantedBy=multi-user.target
"""


class DaemonError(Exception):
    """The repr of what was raised in the daemon."""


class Probe:
    """The service from outside."""

    def __init__(self, lab: BareLab) -> None:
        self.lab = lab
        self.run = lab.run
        self.systemctl = lab.systemctl
        self.old = lab.version() < 254

    def does(self, code: str) -> Any:
        """Execute in the service; returns the `result` that it set."""
        result, error = json.loads(self.run("python3", "-c", ASK, stdin=code.encode()))
        if error:
            raise DaemonError(error)
        return result

    def slots(self) -> dict[str, list[int]]:
        """What the process thinks it has, by name: dev, ino."""
        found: dict[str, list[int]] = self.does("result = {n: [s.dev, s.ino] for n, s in store.slots().items()}")
        return found

    def entries(self) -> list[StoredEntry]:
        """What PID 1 says it has; before systemd 254 only a restart tells."""
        return [StoredEntry.from_dump(entry) for entry in self.lab.dump(UNIT)]

    def difference(self) -> Difference:
        """What Store.verify() makes of it in the daemon."""
        assert self.does("result = store.barrier()") is True
        entries = json.dumps(self.entries())
        return Difference(*map(tuple, self.does(f"result = store.verify(map(tuple, {entries}))")))

    def count(self) -> int:
        return int(self.lab.show(UNIT, "NFileDescriptorStore")["NFileDescriptorStore"])

    def restart(self) -> None:
        self.systemctl("restart", UNIT)

    def unit(self, **settings: object) -> None:
        """Start anew, with an empty store and these settings."""
        self.systemctl("stop", UNIT)
        self.systemctl("reset-failed", UNIT, check=False)
        if not self.old:
            self.systemctl("clean", "--what=fdstore", UNIT, check=False)
        self.lab.write(
            f"/etc/systemd/system/{UNIT}.d/test.conf",
            "[Service]\n" + "".join(f"{key}={value}\n" for key, value in settings.items()),
        )
        self.systemctl("daemon-reload")
        self.systemctl("start", UNIT)


@contextlib.contextmanager
def probe_in_lab(purpose: str, suite: str) -> Iterator[Probe]:
    """The service in a lab of its own, started and enabled: systemd 257 forgets a stopped unit that nothing wants."""
    with bare_lab(purpose, suite) as lab:
        lab.write("/opt/probe.py", PROBE)
        lab.write(f"/etc/systemd/system/{UNIT}", SERVICE)
        lab.systemctl("daemon-reload")
        lab.systemctl("enable", "--now", UNIT)
        yield Probe(lab)
