# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl container exec: a command in a container, with this terminal or these pipes, its exit status and signals.

The daemon hands over the command's terminal or pipes, and bytes then pass only between the command and virtdctl. If
the daemon is restarted meanwhile, the new one is asked for the exit status.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from virtd.cli.client import Call, constant
from virtd.cli.exits import FAILURE
from virtd.cli.link import RETRY, Link
from virtd.cli.terminal import RawTerminal, Terminated
from virtd.errors import VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from types import FrameType

    from virtd.cli.client import Parameters, Reply, Session
    from virtd.cli.options import Parser

PIECE = 65536
LINGER = 0.3  # seconds of silence after which virtdctl doesn't wait for output of background processes
AT_MOST = 1.5  # seconds for which output is read after the command's end, however much there is
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Execution:
    """One command. `run()` returns its exit status."""

    def __init__(self, args: argparse.Namespace, session: Session) -> None:
        self._args = args
        self._session = session
        self._terminal = RawTerminal(0)
        by_default = os.isatty(0) and os.isatty(1) and not args.no_input
        self.with_terminal: bool = args.terminal if args.terminal is not None else by_default
        self._link = Link(session, self._question, more=True)
        self._token: str | None = None
        self._input = -1
        self._outputs: dict[int, int] = {}  # the command's end -> ours
        self._unsent = b""
        self._status: int | None = None
        self._ended_at = 0.0
        self._heard_at = 0.0
        self._signals: list[int] = []

    def _question(self, again: bool) -> tuple[str, Parameters]:  # noqa: FBT001 (Link calls it so)
        if again and self._token is None:
            raise VirtdError("virtd went away, and it isn't known whether the command was started")
        environment = {"TERM": os.environ.get("TERM", "dumb")} if self.with_terminal else {}
        environment |= dict(item.partition("=")[::2] for item in self._args.env)
        return "Container.Execute", {
            "name": self._args.name,
            "command": self._args.command,
            "environment": environment,
            "terminal": self.with_terminal,
            "token": self._token,
        }

    def run(self) -> int:
        try:
            self._link.open()
            while self._token is None:
                self._wait(0.25, select.poll())
            if not self.with_terminal:
                self._pass_signals()
                return self._loop()
            signal.signal(signal.SIGWINCH, lambda *_: self._terminal.resize(self._input))
            self._terminal.resize(self._input)
            with self._terminal:
                return self._loop()
        finally:
            self._link.close()
            for fd in {self._input, *self._outputs} - {-1}:
                os.close(fd)

    def _pass_signals(self) -> None:
        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        for number in PASSED:
            signal.signal(number, note)

    def _loop(self) -> int:
        reading = not self._args.no_input
        if not reading and self._input not in self._outputs:
            os.close(self._input)
            self._input = -1
        while True:
            now = time.monotonic()
            if self._status is not None and (
                not self._outputs or now - self._heard_at > LINGER or now - self._ended_at > AT_MOST or self._signals
            ):
                return self._status
            while self._signals:
                self._send(self._signals.pop(0))
            poller = select.poll()
            if reading and self._input >= 0 and not self._unsent:
                poller.register(0, select.POLLIN)
            if self._unsent and self._input >= 0:
                poller.register(self._input, select.POLLOUT | (select.POLLIN if self._input in self._outputs else 0))
            for fd in self._outputs:
                if fd != self._input or not self._unsent:
                    poller.register(fd, select.POLLIN)
            ready = self._wait(0.1 if self._status is not None else 0.5, poller)
            if ready.get(0) and reading:
                reading = self._read_input()
            if ready.get(self._input, 0) & (select.POLLOUT | select.POLLERR):
                self._write_input()
            for fd in [
                fd for fd in self._outputs if ready.get(fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR)
            ]:
                self._read_output(fd)

    def _read_input(self) -> bool:
        try:
            data = os.read(0, PIECE)
        except OSError:
            data = b""
        if data:
            self._unsent = data
        elif self._input in self._outputs:
            self._unsent = b"\x04"  # the only end of file that a terminal has
        else:
            os.close(self._input)
            self._input = -1
        return bool(data)

    def _write_input(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._input, self._unsent[:4096]) :]
        except BlockingIOError:
            pass
        except OSError:  # the command doesn't read any more
            self._unsent = b""
            if self._input not in self._outputs:
                os.close(self._input)
                self._input = -1

    def _read_output(self, fd: int) -> None:
        try:
            data = os.read(fd, PIECE)
        except BlockingIOError:
            return
        except OSError:  # the terminal was hung up
            data = b""
        if data:
            target = self._outputs[fd]
            while data:
                data = data[os.write(target, data) :]
            self._heard_at = time.monotonic()
            return
        del self._outputs[fd]
        if fd != self._input:
            os.close(fd)

    def _send(self, number: int) -> None:
        parameters: Parameters = {"name": self._args.name, "token": self._token, "signal": number}
        try:
            with Call(self._session, "Container.Signal", constant(parameters), limit=10.0, repeat=False) as call:
                call.result()
        except VirtdError as error:
            print(f"virtdctl: {error.message}", file=sys.stderr)

    def _wait(self, timeout: float, poller: select.poll) -> dict[int, int]:
        """Poll, also for the connection, and handle the daemon's replies; returns the events of the other
        descriptors."""
        fd = self._link.poll_fd(time.monotonic()) if self._status is None else -1
        if fd >= 0:
            poller.register(fd, select.POLLIN)
        elif self._status is None:
            timeout = min(timeout, RETRY)
        ready = dict(poller.poll(timeout * 1000))
        if fd in ready and (reply := self._link.receive()) is not None:
            self._hear(reply)
        return ready

    def _hear(self, reply: Reply) -> None:
        parameters = reply.parameters
        if reply.fds:
            self._token = str(parameters.get("token"))
            fds, reply.fds = reply.fds, []
            self._input = fds[0]
            self._outputs = {fds[0]: 1} if len(fds) == 1 else {fds[1]: 1, fds[2]: 2}
            if len(fds) == 1:
                os.set_blocking(fds[0], False)
        if parameters.get("event") == "ended":
            code, name = parameters.get("code"), parameters.get("signal")
            if code is None:
                code = 128 + int(signal.Signals[str(name)]) if str(name).startswith("SIG") else FAILURE
            self._status = int(code)
            self._ended_at = self._heard_at = time.monotonic()
        reply.close()


def execute(args: argparse.Namespace, session: Session) -> int:
    if not args.command:
        print("virtdctl container exec: which command?", file=sys.stderr)
        return 2
    try:
        return Execution(args, session).run()
    except Terminated as signal_:
        return 128 + signal_.number


def options(parser: Parser) -> None:
    parser.name("container")
    parser.add_argument("command", metavar="COMMAND", nargs="*", help="a program with its arguments, after --")
    parser.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        default=None,
        help="give it a terminal (default: if virtdctl has one)",
    )
    parser.add_argument("-T", "--no-terminal", dest="terminal", action="store_false", help="give it pipes")
    parser.add_argument(
        "-n", "--no-input", action="store_true", help="don't read virtdctl's input; the command has none"
    )
    parser.add_argument(
        "-e",
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an environment variable; can be repeated",
    )
