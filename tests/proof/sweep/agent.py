# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's end of tests/live/test_model.py: one JSON command a line on standard input, one answer a line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tests.proof.sweep import scene
from tests.proof.sweep.others import NETWORK, OfNetwork
from tests.proof.sweep.scene import DEFINITIONS, Broken, Gone, Refused, call, until


def do(operation: str, name: str) -> None:
    if operation == "Define":
        if not os.path.exists(scene.image(name)):
            scene.make_image(name)
        call("Define", text=scene.definition(name), source="model")
    else:
        call(operation, name=name)


def do_and_kill(operation: str, name: str, after: float) -> None:
    """The operation, and SIGKILL for the daemon `after` seconds from its beginning."""
    pid = scene.main_pid()

    def work() -> None:
        with contextlib.suppress(Gone, Refused, OSError):
            do(operation, name)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    thread.join()
    until("the next daemon", lambda: scene.main_pid() not in (0, pid))


def die(name: str, *, away: bool) -> None:
    """The guest dies, with the daemon there or stopped."""
    unit = f"virtd-qemu-{name}.service"
    if away:
        scene.systemctl("stop", "virtd.socket", "virtd.service")
    subprocess.run(["systemctl", "kill", "-s", "KILL", unit], check=True)
    if away:
        until("the guest's death", lambda: "failed" in scene.systemctl("is-active", unit))
        scene.systemctl("start", "virtd.socket", "virtd.service")
    until("its end on record", lambda: scene.info(name)["state"] == "crashed")


def meddle(*, away: bool) -> None:
    """Somebody deletes a network's bridge and all rules, with the daemon there or stopped; all of it comes back."""
    net = OfNetwork()
    net.prepare()
    call("Network.Start", name=NETWORK)
    if away:
        scene.systemctl("stop", "virtd.socket", "virtd.service")
    subprocess.run(["ip", "link", "del", f"vd-{NETWORK}"], check=True)
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    if away:
        scene.systemctl("start", "virtd.socket", "virtd.service")

    def agrees() -> bool:
        net.agreement()
        return True

    until("the network as it was", agrees)


def restart() -> None:
    scene.systemctl("restart", "virtd.service")


def look() -> dict[str, Any]:
    """State and PID of every domain, when all of it agrees."""
    until("settled", scene.settled)
    until("agreement", scene.agreement, 20)
    scene.fsck()
    there = {item["name"]: (item["state"], item["pid"] or 0) for item in call("List")["objects"]}
    defined = {entry.removesuffix(".toml") for entry in os.listdir(DEFINITIONS) if not entry.startswith(".")}
    if defined != set(there):
        raise Broken(f"definitions of {sorted(defined)}, listed are {sorted(there)}")
    return there


COMMANDS = {"do": do, "do_and_kill": do_and_kill, "die": die, "meddle": meddle, "restart": restart, "look": look}


def main() -> int:
    for line in sys.stdin:
        word, arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"value": COMMANDS[word](**arguments)}  # type: ignore[operator]
        except Refused as exc:
            answer = {"refused": str(exc)}
        except (Broken, Gone, OSError, LookupError, subprocess.SubprocessError) as exc:
            answer = {"broken": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
