# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon to test virtdctl with: real sockets and descriptors, `org.virtd1` by its interface file, nothing behind.

It can go away as the real one does: connections break, while the listening socket, which is systemd's, stays open.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

from virtd.api import idl, interfaces
from virtd.errors import Busy, InvalidState, NotFound, VirtdError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Handler = Callable[["Call"], Any]

TICK = 0.01


class Gone(Exception):
    """The daemon dies instead of answering."""


class Call:
    """One call as a handler sees it."""

    def __init__(self, daemon: FakeDaemon, connection: socket.socket, parameters: dict[str, Any]) -> None:
        self.daemon = daemon
        self.connection = connection
        self.parameters = parameters

    def reply(self, parameters: dict[str, Any], *, fds: tuple[int, ...] = (), continues: bool = False) -> None:
        message: dict[str, Any] = {"parameters": parameters}
        if continues:
            message["continues"] = True
        socket.send_fds(self.connection, [json.dumps(message).encode() + b"\0"], list(fds))

    def until(self, true: Callable[[], bool]) -> bool:
        """Wait for something; False when client or daemon went away first."""
        while not true():
            readable = select.select([self.connection], [], [], TICK)[0]
            if self.daemon.closing or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                return False
        return True


class Guest:
    """A domain's log files and stdin pipe. `rotate` and `write` do what the pump does."""

    def __init__(self, directory: Path, name: str = "web1") -> None:
        self.name = name
        self.state = "running"
        self.missed = 0  # of each file that follows another
        self.refused = ""
        self.files = [directory / f"{name}.console.log"]
        self.files[0].touch()
        self._rotating = threading.Lock()
        self.stdin, self.stdin_end = os.pipe()
        self.writer: str | None = None
        self.taken_by: str | None = None

    def write(self, data: bytes) -> None:
        with self.files[-1].open("ab") as file:
            file.write(data)

    def rotate(self) -> None:
        old = self.files[-1]
        with self._rotating:
            self.files[-1] = old.rename(old.with_name(f"{old.name}.{len(self.files)}"))
            old.touch()
            self.files.append(old)

    def close(self) -> None:
        for fd in (self.stdin, self.stdin_end):
            os.close(fd)

    def identity(self, path: Path) -> str:
        status = path.stat()
        return f"{status.st_dev}:{status.st_ino}"

    def place(self, file: str) -> tuple[Path, Path | None]:
        """Where the file is now, and the one after it."""
        with self._rotating:
            index = [self.identity(path) for path in self.files].index(file)
            return self.files[index], self.files[index + 1] if index + 1 < len(self.files) else None

    def follow(self, call: Call) -> None:
        asked = call.parameters
        if asked["file"] is None:
            lines = asked["lines"]
            path = self.files[0] if lines == -1 else self.files[-1]
            data = path.read_bytes()
            offset = len(data)
            if lines == -1:
                offset = 0
            elif lines:
                offset = len(b"".join(data.splitlines(keepends=True)[:-lines]))
            self._answer(call, path, offset, asked)
            return

        def news() -> bool:
            path, newer = self.place(asked["file"])
            more = path.stat().st_size > asked["offset"] or newer is not None
            return more or not asked["wait"] or self.state == "stopped"

        if not call.until(news):
            raise Gone
        path, newer = self.place(asked["file"])
        if newer is not None and path.stat().st_size <= asked["offset"]:
            self._answer(call, newer, 0, asked)
        else:
            self._answer(call, path, asked["offset"], asked)

    def _answer(self, call: Call, path: Path, offset: int, asked: dict[str, Any]) -> None:
        read = path == self.files[-1] and path.stat().st_size <= offset
        parameters = {
            "file": self.identity(path),
            "offset": offset,
            "more": path.stat().st_size > offset,
            "ended": self.state == "stopped" and read,
            "state": self.state,
            "missed": self.missed if asked["file"] not in (None, self.identity(path)) else 0,
            "refused": self.refused,
        }
        if parameters["file"] == asked["file"]:
            call.reply(parameters)
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            call.reply(parameters, fds=(fd,))
        finally:
            os.close(fd)

    def open_console(self, call: Call) -> None:
        if self.state == "stopped":
            raise InvalidState(f"{self.name} is stopped", hint=f"virtdctl start {self.name}")
        token = call.parameters["token"]
        if self.writer is not None and token != self.writer and not call.parameters["force"]:
            raise Busy(f"root (PID 4711) has the console of {self.name}", hint="--force takes it over")
        mine = self.writer = token or f"token{len(call.daemon.calls)}"
        self.taken_by = None
        call.reply({"token": mine, "name": self.name}, fds=(self.stdin_end,), continues=True)
        if call.until(lambda: self.state == "stopped" or self.taken_by is not None):
            event = {"event": "ended"} if self.state == "stopped" else {"event": "taken-over", "by": self.taken_by}
            call.reply(event)
        elif not call.daemon.closing:
            self.writer = None


class FakeDaemon:
    """Answers by `answers[method]`: parameters, an exception to raise, or a function that gets the Call."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.dies_on: list[str] = []  # methods that it takes and then dies of, once for each entry
        self.closing = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread: threading.Thread | None = None
        self._stop, self._stopped = os.pipe()
        self.start()

    def guest(self, guest: Guest) -> None:
        def known(handler: Handler) -> Handler:
            def handle(call: Call) -> None:
                if call.parameters["name"] != guest.name:
                    raise NotFound(f"There is no domain {call.parameters['name']}")
                handler(call)

            return handle

        self.answers["Follow"] = known(guest.follow)
        self.answers["OpenConsole"] = known(guest.open_console)

    def start(self) -> None:
        self.closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be away: what was accepted breaks, what comes now waits in the backlog."""
        self.closing = True
        os.write(self._stopped, b"x")
        assert self._thread is not None
        self._thread.join()
        os.read(self._stop, 1)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        self._listener.close()
        os.close(self._stop)
        os.close(self._stopped)

    def asked(self, method: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.calls if name == method]

    def _serve(self) -> None:
        threads: list[threading.Thread] = []
        while not self.closing:
            if self._listener.fileno() in select.select([self._listener.fileno(), self._stop], [], [])[0]:
                connection = self._listener.accept()[0]
                threads.append(threading.Thread(target=self._connection, args=(connection,), daemon=True))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _connection(self, connection: socket.socket) -> None:
        buffer = b""
        with connection, contextlib.suppress(Gone, OSError):
            while not self.closing:
                if not select.select([connection], [], [], TICK)[0]:
                    continue
                data = connection.recv(65536)
                if not data:
                    return
                buffer += data
                while b"\0" in buffer:
                    message, buffer = buffer.split(b"\0", 1)
                    self._answer(connection, json.loads(message))

    def _answer(self, connection: socket.socket, message: dict[str, Any]) -> None:
        interface, method = message["method"].rsplit(".", 1)
        parameters = message["parameters"]
        call = Call(self, connection, parameters)
        if interface == "org.varlink.service":
            call.reply({"product": "virtd"})
            return
        assert interface in interfaces.MODULES
        if noun := interface.removeprefix("org.virtd1").removeprefix("."):
            method = f"{noun}.{method}"  # as virtdctl calls it: answers["Network.List"]
        self.calls.append((method, parameters))
        if method in self.dies_on:
            self.dies_on.remove(method)
            raise Gone
        error: dict[str, Any] | None = None
        if (wrong := idl.problem(interface, method.rpartition(".")[2], parameters)) is not None:
            error = {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": wrong}}
        elif method not in self.answers:
            error = {"error": "org.varlink.service.MethodNotFound", "parameters": {"method": message["method"]}}
        else:
            try:
                answer = self.answers[method]
                if callable(answer):
                    answer = answer(call)
                if isinstance(answer, Exception):
                    raise answer
                if answer is not None:
                    call.reply(answer)
            except VirtdError as exc:
                error = {"error": f"org.virtd1.{type(exc).__name__}", "parameters": exc.fields()}
        if error is not None:
            connection.sendall(json.dumps(error).encode() + b"\0")


DOMAIN = {
    "name": "web1",
    "driver": "qemu",
    "uuid": "5e4b0a5c-4f3b-4b8e-9f10-6f1f0f6c2a11",
    "state": "running",
    "reason": "started",
    "pid": 4711,
    "since": "2026-11-23T02:47:54.000001Z",
    "autostart": False,
    "id": 1,
}
STOPPED = DOMAIN | {"name": "db1", "state": "stopped", "reason": "", "pid": None, "autostart": True, "id": None}
INFO = DOMAIN | {
    "unit": "virtd-qemu-web1.service",
    "slots": ["qemu/web1/stdin", "qemu/web1/stdout"],
    "exit": None,
    "definition_path": "/etc/virtd/qemu/web1.toml",
    "pending": True,
    "memory": 268435456,
    "vcpus": 2,
    "disks": [{"path": "/var/lib/virtd/images/web1.qcow2", "format": "qcow2"}],
    "monitor": "connected",
    "vnc": None,
    "log": "/var/log/virtd/qemu/web1.log",
    "console_log": "/var/log/virtd/qemu/web1.console.log",
}
KILLED = {"code": None, "signal": "SIGKILL", "cause": "killed", "at": "2026-11-23T02:50:00Z", "by": None}
