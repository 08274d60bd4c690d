# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl console: a domain's serial console, which continues while virtd is restarted.

Three things run side by side. Keys go into the guest's stdin pipe, whose write end the daemon has handed out, and
output is read from the console log at the current place, neither of them through the daemon. Two connections ask the
daemon only who may write and when there is more to read; if they break, they are made anew and repeat their
questions.
"""

from __future__ import annotations

import os
import select
import sys
import time

from virtd.cli.client import HINT, PATIENCE, QUIET, Session
from virtd.cli.exits import FAILURE, OK
from virtd.cli.follow import Cursor, write_all
from virtd.cli.link import RETRY, Link
from virtd.cli.options import duration, line_count
from virtd.cli.output import clean, complain, how_it_ended
from virtd.cli.terminal import RawTerminal, Terminated
from virtd.errors import AccessDenied, Busy, Disconnected, InvalidState, NotFound, VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from virtd.cli.client import Parameters, Reply
    from virtd.cli.options import Parser

ESCAPE = "^]"
PIECE = 4096  # PIPE_BUF: a pipe that poll(2) calls writable takes as much without blocking
TYPED_AHEAD = 1 << 20  # bytes kept for a guest that doesn't read; more pasted text is refused with a bell
PIPED_AHEAD = 1 << 16  # the same for a piped standard input; the rest waits in the pipe
LAST_WORDS = 5.0  # seconds that the daemon may take, after the guest's end, to move its last output to the log


class Console:
    """One console session. `run()` returns virtdctl's exit status."""

    def __init__(self, args: argparse.Namespace, session: Session, noun: str = "domain", prefix: str = "") -> None:
        self._noun = noun
        self._virtdctl = "virtdctl" if noun == "domain" else f"virtdctl {noun}"
        self._prefix = prefix  # of the methods' names, such as "Container."
        self._name: str = args.name
        self._session = session
        self._force: bool = args.force
        self._linger: float | None = args.timeout
        self._terminal = RawTerminal(0)
        self._escape: bytes | None = args.escape if self._terminal.is_terminal else None
        lines = args.lines if args.lines is not None else 1 if os.isatty(1) else 0
        self._cursor = Cursor(args.name, "console", lines, self._say)
        self._unread = False  # the file may hold more than was printed
        self._news = False  # the latest answer of Follow led to something new
        self._follow = Link(session, self._where, more=False)
        self._control: Link | None = None if args.read_only else Link(session, self._claim, more=True)
        self._token: str | None = None
        self._pipe = -1
        self._typed = bytearray()
        # Without the right to write, a terminal is read only for the escape character, and anything else isn't read
        # at all.
        self._reading = self._terminal.is_terminal or not args.read_only
        self._until: float | None = None  # when to leave, once input has ended
        self._last_words: float | None = None  # when to leave at the latest, once the guest has ended
        self._noticed = False
        self._status: int | None = None
        self._farewell = ""

    # Questions to the daemon.

    def _where(self, again: bool) -> tuple[str, Parameters]:  # noqa: FBT001 (Link calls it so)
        # The place to begin, or after a restart whether there is new output, is answered at once.
        return f"{self._prefix}Follow", self._cursor.parameters(wait=self._cursor.file is not None and not again)

    def _claim(self, _again: bool) -> tuple[str, Parameters]:  # noqa: FBT001
        # With the token it isn't a new claim, so force isn't needed, and would only displace a later writer.
        return f"{self._prefix}OpenConsole", {
            "name": self._name,
            "force": self._force and self._token is None,
            "token": self._token,
        }

    # The session.

    def run(self) -> int:
        try:
            self._open()
            with self._terminal:
                if self._terminal.is_terminal:
                    escape = _show(self._escape) if self._escape else "off"
                    self._say(f"Connected to {self._noun} {self._name}. Escape character is {escape}.", alone=True)
                if not self._reading:
                    self._input_ended()
                while self._status is None:
                    self._step()
        finally:
            for link in filter(None, (self._control, self._follow)):
                link.close()
            self._cursor.close()
            self._drop_pipe()
        if self._farewell:
            self._say(self._farewell)
        # The output could not be shown.
        return FAILURE if not self._status and self._cursor.refused else self._status or OK

    def _say(self, text: str, *, alone: bool = False) -> None:
        """Print a message of virtdctl itself on stderr, so that it isn't mixed into the output that a script reads.

        On a terminal the guest's output may precede it on the same line, unless it is `alone`.
        """
        end = self._terminal.line_end()
        begin = end if self._terminal.is_terminal and not alone else ""
        write_all(2, f"{begin}{clean(text)}{end}".encode(errors="replace"))

    def _open(self) -> None:
        """Get the right to write, then the place to read from, before reading any input."""
        if self._control is not None:
            try:
                self._control.open()
                self._await(lambda: self._pipe >= 0)
            except Busy as error:
                if not self._terminal.is_terminal:
                    raise  # the input couldn't be sent
                error.hint = error.hint or "--force takes it over"
                complain(error, f"write to the console of {self._name}")
                print("Showing its output only.", file=sys.stderr)
                self._control.close()
                self._control = None
        self._follow.open()
        self._await(lambda: self._cursor.file is not None)
        if self._control is None and self._cursor.state in ("stopped", "crashed"):
            raise InvalidState(
                f"{self._name} isn't running",
                hint=f"{self._virtdctl} start {self._name}, or {self._virtdctl} log {self._name} for what it wrote",
            )

    def _await(self, settled: Callable[[], bool]) -> None:
        """Wait for the first answer, before anything else."""
        deadline = time.monotonic() + (self._session.patience or PATIENCE)
        while not settled():
            now = time.monotonic()
            if now > deadline:
                raise Disconnected("virtd doesn't answer", hint=HINT)
            self._wait_for_daemon(now, 0.25, select.poll())

    def _step(self) -> None:
        """Wait for an event, and handle it."""
        now = time.monotonic()
        self._leave_in_time(now)
        poller = select.poll()
        if self._wants_input():
            poller.register(0, select.POLLIN)
        if self._typed and self._pipe >= 0:
            poller.register(self._pipe, select.POLLOUT)
        poller.register(1, 0)  # reports that the reader of the output has closed it
        timers = [end - now for end in (self._until, self._last_words) if end is not None]
        ready = self._wait_for_daemon(now, 0.0 if self._unread else min([1.0, *timers]), poller)
        if ready.get(1, 0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            raise BrokenPipeError
        if ready.get(0, 0):
            self._read_input()
        if self._pipe >= 0 and ready.get(self._pipe, 0):
            self._write_input()
        if self._unread:
            self._print()

    def _wait_for_daemon(self, now: float, timeout: float, poller: select.poll) -> dict[int, int]:
        """Poll, also for the connections, and handle the daemon's replies; returns the events of the other
        descriptors."""
        links: dict[int, Link] = {}
        for link in (self._control, None if self._unread else self._follow):
            if link is not None and (fd := link.poll_fd(now)) >= 0:
                poller.register(fd, select.POLLIN)
                links[fd] = link
        lost = [link.lost_at for link in (self._control, self._follow) if link is not None and link.lost_at]
        if lost:
            timeout = min(timeout, RETRY)
            self._absence(now - min(lost))
        else:
            self._noticed = False
        ready = dict(poller.poll(max(0.0, timeout) * 1000))
        for fd, link in links.items():
            if fd in ready and (reply := self._receive(link)) is not None:
                if link is self._follow:
                    self._followed(reply)
                else:
                    self._controlled(reply)
        return ready

    def _absence(self, seconds: float) -> None:
        if self._session.patience is not None and seconds > self._session.patience:
            from virtd.text import span

            raise Disconnected(
                f"virtd went away and didn't come back within {span(self._session.patience)}", hint=HINT
            )
        if seconds > QUIET and not self._noticed:
            self._noticed = True
            self._say("virtdctl: virtd went away, waiting for it to come back...")

    # Replies of the daemon.

    def _receive(self, link: Link) -> Reply | None:
        try:
            return link.receive()
        except (InvalidState, NotFound):
            if self._cursor.file is None:
                raise
            # The guest ended, or was even undefined, while the daemon was away.
            self._guest_ended()
            if link is self._follow:
                # Nobody will report the end of the output any more, but the rest of the file can be read.
                self._unread = self._cursor.ended = True
                self._news = False
        except (Busy, AccessDenied) as error:
            if self._token is None:
                raise
            self._status = FAILURE
            self._farewell = f"Lost the console of {self._name}: {error.message}"
        return None

    def _controlled(self, reply: Reply) -> None:
        parameters = reply.parameters
        if reply.fds:
            self._drop_pipe()
            self._pipe = reply.fds.pop(0)
            self._terminal.resize(self._pipe)
            self._token = str(parameters.get("token"))
        reply.close()
        event = parameters.get("event")
        if event == "ended":
            self._guest_ended()
        elif event is not None:
            by = f" by {parameters['by']}" if parameters.get("by") else ""
            self._status = FAILURE
            self._farewell = f"The console of {self._name} was taken over{by}."

    def _followed(self, reply: Reply) -> None:
        self._news = self._cursor.accept(reply)
        self._unread = True

    def _guest_ended(self) -> None:
        """Stop input; output continues until the log is complete, which Follow reports."""
        if self._control is not None:
            self._control.close()
            self._control = None
        self._drop_pipe()
        self._typed.clear()
        self._last_words = time.monotonic() + LAST_WORDS

    # Bytes.

    def _wants_input(self) -> bool:
        if not self._reading:
            return False
        # A terminal is always read, otherwise the escape character would be stuck behind input that the guest doesn't
        # read.
        return self._terminal.is_terminal or (self._pipe >= 0 and len(self._typed) < PIPED_AHEAD)

    def _read_input(self) -> None:
        try:
            data = os.read(0, PIPED_AHEAD)
        except OSError:
            data = b""  # the terminal was hung up
        if self._escape is not None and self._escape in data:
            data = data[: data.index(self._escape)]
            self._status = OK
            self._farewell = f"Disconnected from {self._name}."
        elif not data:
            self._input_ended()
        if self._control is None:
            return
        if len(self._typed) + len(data) > TYPED_AHEAD + PIPED_AHEAD:
            write_all(2, b"\a")
            return
        self._typed += data
        if self._status is not None and self._typed:
            self._write_input()  # input before the escape character, as far as the guest reads it

    def _input_ended(self) -> None:
        self._reading = False
        if self._terminal.is_terminal:
            self._status = OK
        elif self._linger is not None and self._until is None:
            self._until = time.monotonic() + self._linger
        self._write_input()

    def _write_input(self) -> None:
        if self._pipe < 0:
            return
        poller = select.poll()
        poller.register(self._pipe, select.POLLOUT)
        while self._typed and poller.poll(0):
            try:
                written = os.write(self._pipe, self._typed[:PIECE])
            except BlockingIOError:
                return
            except BrokenPipeError:
                # The guest has ended, which the daemon is about to report.
                self._drop_pipe()
                self._typed.clear()
                return
            del self._typed[:written]
        if not self._typed and not self._reading and self._control is not None:
            # All input has been sent: let another client write.
            self._control.close()
            self._control = None
            self._drop_pipe()

    def _drop_pipe(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _print(self) -> None:
        """Print one piece at a time, so that keys and the escape character are handled during a long output."""
        data = self._cursor.read()
        if data:
            write_all(1, data)
            self._news = True
            if self._last_words is not None:
                self._last_words = time.monotonic() + LAST_WORDS
            return
        self._unread = False
        if self._cursor.ended and not self._news:
            self._finish()
        else:
            self._follow.ask()

    # Leaving.

    def _leave_in_time(self, now: float) -> None:
        if self._last_words is not None and now >= self._last_words:
            # The daemon never reported the end of the output: the domain was started again meanwhile, or no longer
            # exists.
            self._finish()
        elif self._until is not None and now >= self._until and not self._unread:
            self._status = OK

    def _finish(self) -> None:
        self._status = OK
        self._farewell = f"{self._name} ended."
        try:
            exit_ = (
                Session(self._session.address, LAST_WORDS)
                .call(f"{self._prefix}Info", {"name": self._name})["object"]
                .get("exit")
            )
        except VirtdError:
            return
        if exit_:
            self._farewell = f"{self._name}: {how_it_ended(exit_)}."


def attaching(noun: str = "domain", prefix: str = "") -> Callable[[argparse.Namespace, Session], int]:
    """The command that attaches to the console of a `noun`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        try:
            return Console(args, session, noun, prefix).run()
        except Terminated as signal_:
            return 128 + signal_.number

    return run


def _show(escape: bytes) -> str:
    code = escape[0]
    return f"^{chr(code + 64)}" if code < 32 else chr(code)


def _escape(text: str) -> bytes | None:
    """`^]`, a single character, or `none`."""
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and 64 <= ord(text[1].upper()) < 96:
        return bytes([ord(text[1].upper()) - 64])
    if len(text) == 1 and ord(text) < 128:
        return text.encode()
    import argparse

    raise argparse.ArgumentTypeError(f"'{text}' is neither one character, nor one after ^, nor 'none'")


def options(parser: Parser, noun: str = "domain") -> None:
    parser.name(noun)
    parser.add_argument("--force", action="store_true", help="take the console over from its present writer")
    parser.add_argument("--read-only", action="store_true", help="only watch; several people may do so at once")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N|all",
        type=line_count,
        help="begin with the last N lines (default: one on a terminal, the current prompt, otherwise none)",
    )
    parser.add_argument(
        "--escape",
        metavar="CHAR",
        type=_escape,
        default=ESCAPE,
        help=f"the character to type to leave (default: {ESCAPE}), or none",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=duration,
        help="leave that long after the end of standard input if that isn't a terminal, or, with --read-only, after "
        "the start; by default output continues until the guest ends",
    )


OPTIONS: dict[str, Callable[[Parser], None]] = {"console": options}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {"console": attaching()}
