# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small process that behaves towards virtd as QEMU does: monitors, words on stderr, serial console, exit statuses.

It takes virtd's own command line. The kernel's command line (-append) steers it, word by word:

    print=N            N numbered lines on the console at once
    fail=STATUS        complain on stderr and exit before the monitor is there
    silent             take connections to the monitor and never say a word
    untold             say nothing on stderr of what ends it
    deaf               ignore the power button
    newest=VERSION     what "q35" and "pc" stand for, "10.0" unless given
    oldest             know no machine type by its version
    slow-exit=SECONDS  be that long about an end by `quit` or the power button

A line on its console is obeyed: `echo WORD`, `burst N` (N lines, and then it powers off), `poweroff`, `reset`,
`panic`, `flood N` (N events), `die SIGNAL`, `complain TEXT` (on stderr).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

Message = dict[str, Any]

GREETING: Message = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}
}
ALIASES = {"q35": "pc-q35-{}", "pc": "pc-i440fx-{}"}
# ShutdownCause of QEMU's qapi/run-state.json
REASONS = (
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
    "guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load",
)  # fmt: skip


class Monitor:
    """One QMP socket, with one client at a time."""

    def __init__(self, machine: Machine, path: str) -> None:
        self.machine = machine
        self.listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.listener.bind(path)
        self.listener.listen(1)
        self.client: socket.socket | None = None
        self.buffer = b""
        self.ready = False
        machine.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def accept(self) -> None:
        self.machine.selector.unregister(self.listener)
        self.client, _ = self.listener.accept()
        self.buffer, self.ready = b"", False
        self.machine.selector.register(self.client, selectors.EVENT_READ, self.read)
        if "silent" not in self.machine.words:
            self.send(GREETING)

    def send(self, message: Message) -> None:
        if self.client is not None:
            with contextlib.suppress(OSError):
                self.client.sendall(json.dumps(message).encode() + b"\r\n")

    def read(self) -> None:
        assert self.client is not None
        try:
            chunk = self.client.recv(65536)
        except OSError:
            chunk = b""
        if not chunk:
            self.machine.selector.unregister(self.client)
            self.client.close()
            self.client = None
            self.machine.selector.register(self.listener, selectors.EVENT_READ, self.accept)
            return
        if "silent" in self.machine.words:
            return
        self.buffer += chunk
        # Commands are JSON objects one after the other, with nothing between them that could be relied on.
        while text := self.buffer.decode().lstrip():
            try:
                command, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                return
            self.buffer = text[end:].encode()
            if command["execute"] == "qmp_capabilities":
                self.ready = True
                reply: Message = {"return": {}}
            else:
                reply = self.machine.execute(command["execute"], command.get("arguments") or {})
            self.send(reply | ({"id": command["id"]} if "id" in command else {}))
            self.machine.follow_up()


class Machine:
    """The guest and the program around it."""

    def __init__(self, arguments: list[str]) -> None:
        self.selector = selectors.DefaultSelector()
        self.actions: dict[str, str] = {}
        self.machine = ""
        self.words: dict[str, str] = {}
        self.status = "running"
        self.still_full = False
        self.monitors: list[Monitor] = []
        self.ending: int | None = None
        self.stdin = b""
        self.traced: list[str] = []
        self.tpm: socket.socket | None = None  # which notices its end
        paths = []
        for option, value in itertools.pairwise(arguments):
            fields = dict(field.partition("=")[::2] for field in value.replace(",,", "\0").split(","))
            fields = {key: text.replace("\0", ",") for key, text in fields.items()}
            if option == "-machine" and not value.startswith("pflash"):
                self.machine = value.partition(",")[0]
            elif option == "-action":
                self.actions = fields
            elif option == "-append":
                self.words = dict(word.partition("=")[::2] for word in value.split())
            elif option == "-chardev" and fields.get("server") == "on":
                paths.append(fields["path"])
            elif option == "-chardev" and value.startswith("socket,"):
                self.tpm = socket.socket(socket.AF_UNIX)
                self.tpm.connect(fields["path"])
                self.tpm.sendall(b"on ")
            elif option == "-trace":
                self.traced.append(value.rstrip("*"))
        if "oldest" in self.words and self.machine not in ALIASES:
            self.complain(f'unsupported machine type: "{self.machine}"')
            sys.exit(1)
        if "fail" in self.words:
            self.complain("cannot set up guest memory 'pc.ram': Cannot allocate memory")
            sys.exit(int(self.words["fail"]))
        self.monitors = [Monitor(self, path) for path in paths]
        if not os.path.samestat(os.fstat(0), os.stat(os.devnull)):  # epoll(7) takes no /dev/null
            self.selector.register(0, selectors.EVENT_READ, self.read_console)

    def run(self) -> None:
        self.console("".join(f"line {number}\n" for number in range(int(self.words.get("print") or 0))))
        while True:
            for key, _ in self.selector.select():
                key.data()

    def complain(self, text: str) -> None:
        os.write(2, f"qemu-system-x86_64: {text}\n".encode())

    def console(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(1, data) :]

    def trace(self, request: str, rest: str = "") -> None:
        """As the trace backend "log" does; `untold` on the command line: as one without it."""
        if (name := f"qemu_system_{request}_request") in self.traced and "untold" not in self.words:
            os.write(2, f"{name} {rest}\n".encode())

    def event(self, name: str, **data: Any) -> None:
        message = {"event": name, "data": data, "timestamp": {"seconds": int(time.time()), "microseconds": 0}}
        if name == "POWERDOWN":
            self.trace("powerdown")
        elif name == "SHUTDOWN":
            self.trace("shutdown", f"reason={REASONS.index(data['reason'])}")
        for monitor in self.monitors:
            if monitor.ready:
                monitor.send(message)

    # The guest

    def read_console(self) -> None:
        chunk = os.read(0, 65536)
        if not chunk:
            self.selector.unregister(0)
            return
        self.stdin += chunk
        while b"\n" in self.stdin:
            line, _, self.stdin = self.stdin.partition(b"\n")
            verb, _, rest = line.decode().strip().partition(" ")
            match verb:
                case "echo":
                    self.console(f"{rest}\n")
                case "burst":
                    self.console("".join(f"line {number}\n" for number in range(int(rest))))
                    self.off()
                case "complain":
                    self.complain(rest)
                case "poweroff":
                    self.off()
                case "reset":
                    self.event("RESET", guest=True, reason="guest-reset")
                case "panic":
                    self.panic()
                case "full":
                    self.full(rest)
                case "stuck":
                    self.status = "internal-error"
                    self.event("STOP")
                case "flood":
                    for _ in range(int(rest)):
                        self.event("GUEST_CRASHLOADED", action="run")
                case "die":
                    os.kill(os.getpid(), signal.Signals[rest])
            self.follow_up()

    def off(self) -> None:
        """The guest powers off."""
        self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        if self.actions["shutdown"] == "pause":
            self.status = "shutdown"
            self.event("STOP")
        else:
            self.ending = 0

    def full(self, when: str) -> None:
        """Its disk is; `when` "again": it stays so, "silent": nobody hears of it."""
        self.status, self.still_full = "io-error", when == "again"
        if when != "silent":
            about = {"device": "", "node-name": "disk0", "operation": "write", "action": "stop", "nospace": True}
            self.event("BLOCK_IO_ERROR", reason="No space left on device", **about)
            self.event("STOP")

    def panic(self) -> None:
        action = self.actions["panic"]
        self.event("GUEST_PANICKED", action="pause" if action == "pause" else "poweroff")
        if action == "pause":
            self.status = "guest-panicked"
            self.event("STOP")
        else:
            self.event("SHUTDOWN", guest=True, reason="guest-panic")
            self.ending = 1

    def execute(self, command: str, arguments: Message) -> Message:
        match command:
            case "query-status":
                return {"return": {"status": self.status, "running": self.status == "running"}}
            case "stop":
                self.status = "paused"
                self.event("STOP")
            case "cont":
                if self.status in ("shutdown", "guest-panicked", "internal-error"):
                    return _error("Resetting the Virtual Machine is required")
                again = self.status == "io-error" and self.still_full
                self.status = "running"
                self.event("RESUME")
                if again:
                    self.full("again")
            case "qom-get" if arguments["property"] == "type":
                newest = self.words.get("newest") or "10.0"
                return {"return": f"{ALIASES.get(self.machine, self.machine).format(newest)}-machine"}
            case "query-cpu-model-expansion":
                return {"return": {"model": {"name": "base", "props": {"family": 6, "sse2": True, "la57": False}}}}
            case "query-block":
                disks = [f"/machine/peripheral/virtio-disk{index}/virtio-backend" for index in (1, 0)]
                blocks = zip(disks, ("ok", "nospace"), strict=True)
                return {"return": [{"qdev": qdev, "io-status": status} for qdev, status in blocks]}
            case "system_powerdown":
                self.event("POWERDOWN")
                if "deaf" not in self.words:
                    self.off()
            case "system_reset":
                self.event("RESET", guest=False, reason="host-qmp-system-reset")
                if self.status in ("shutdown", "guest-panicked"):
                    self.status = "paused"
            case "set-action":
                self.actions |= arguments
            case "quit":
                self.event("SHUTDOWN", guest=False, reason="host-qmp-quit")
                self.ending = 0
            case _:
                return _error(f"The command {command} has not been found", "CommandNotFound")
        return {"return": {}}

    def follow_up(self) -> None:
        """End, if that is what has come of it."""
        if self.ending is not None:
            time.sleep(float(self.words.get("slow-exit") or 0))
            os._exit(self.ending)

    def terminated(self, number: int, _frame: object) -> None:
        self.complain(f"terminating on signal {number} from pid 4711 (kill)")
        self.event("SHUTDOWN", guest=False, reason="host-signal")
        os._exit(0)


def _error(text: str, kind: str = "GenericError") -> Message:
    return {"error": {"class": kind, "desc": text}}


if __name__ == "__main__":
    machine = Machine(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, machine.terminated)
    machine.run()
