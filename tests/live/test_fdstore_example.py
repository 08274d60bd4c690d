# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example daemon of virtd.fdstore keeps a TCP connection over every way to end it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.live.bare_lab import LAB, LIBRARY, ROOT, BareLab, bare_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

UNIT = "example.service"

# Sends each line of its stdin over one connection and prints what comes back.
CLIENT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", 7777), timeout=30)
answers = connection.makefile("rb")
for line in sys.stdin.buffer:
    connection.sendall(line)
    sys.stdout.buffer.write(answers.readline() or b"closed\\n")
    sys.stdout.buffer.flush()
"""


class Client:
    """One connection from inside the lab."""

    def __init__(self, lab: BareLab) -> None:
        self.process = subprocess.Popen(
            [str(LAB), "exec", lab.name, "--", "python3", "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def say(self, text: str) -> str:
        self.send(text)
        return self.answer()

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(params=[os.environ.get("VIRTD_SUITE", "trixie")])
def lab(request: pytest.FixtureRequest) -> Iterator[BareLab]:
    with bare_lab("fdexample", request.param) as lab:
        lab.write(f"/etc/systemd/system/{UNIT}", (ROOT / "virtd" / "fdstore" / UNIT).read_text())
        lab.write(f"/etc/systemd/system/{UNIT}.d/test.conf", f"[Service]\nEnvironment=PYTHONPATH={LIBRARY}\n")
        lab.systemctl("daemon-reload")
        # Enabled, because systemd 257 forgets a stopped unit that nothing refers to, and its store with it.
        lab.systemctl("enable", "--now", UNIT)
        yield lab


def pid(lab: BareLab) -> str:
    return lab.show(UNIT, "MainPID")["MainPID"]


def slots(lab: BareLab) -> int:
    return int(lab.show(UNIT, "NFileDescriptorStore")["NFileDescriptorStore"])


def test_a_connection_outlives_its_daemon(lab: BareLab) -> None:
    client = Client(lab)
    other = Client(lab)
    assert client.say("hello") == "1 hello"
    assert other.say("me too") == "2 me too"
    pids = [pid(lab)]

    lab.systemctl("restart", UNIT)
    pids.append(pid(lab))
    assert client.say("after a restart") == "3 after a restart"
    assert lab.show(UNIT, "StatusText")["StatusText"] == "Kept 2 connections"

    lab.systemctl("kill", "-s", "KILL", UNIT)
    # Nobody waits for the new one: what is sent meanwhile waits in the kernel.
    assert client.say("after kill -9") == "4 after kill -9"
    pids.append(pid(lab))

    if lab.version() >= 254:  # before, a stop empties the store
        lab.systemctl("stop", UNIT)
        client.send("while it was stopped")
        lab.systemctl("start", UNIT)
        pids.append(pid(lab))
        assert client.answer() == "5 while it was stopped"
    else:
        assert client.say("not stopped") == "5 not stopped"

    lab.systemctl("daemon-reload")
    lab.systemctl("daemon-reexec")
    lab.systemctl("restart", UNIT)
    pids.append(pid(lab))
    assert other.say("still here") == "6 still here"
    assert len(set(pids)) == len(pids), "it was the same process all the time"

    assert slots(lab) == 4, "the listener, the counter and two connections"
    client.close()
    assert other.say("alone") == "7 alone"
    assert slots(lab) == 3, "the slot of a closed connection stayed"
    other.close()
