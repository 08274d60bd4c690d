# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's half of the Varlink interface `org.virtd1`: one connection, and calls that outlive the daemon.

A message is a JSON object followed by a NUL byte (https://varlink.org/Wire-Protocol); file descriptors come with a
reply as SCM_RIGHTS. The daemon's socket belongs to systemd and stays open while the daemon is away, so that a call
made meanwhile waits in the backlog. A call that the old daemon had accepted and not answered breaks off, and is sent
again to the new one if that can't do harm.

Every import here is paid for at each start of virtdctl, hence no dataclasses, typing or asyncio.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

from virtd.errors import AccessDenied, Disconnected, TimedOut, VirtdError, from_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Parameters = dict[str, Any]

ADDRESS = "/run/virtd/virtd.sock"
ROOT_ADDRESS = "/run/virtd/root.sock"  # where nobody else can stand in root's way
CGROUPS = "/sys/fs/cgroup/system.slice"  # virtd.service's is in it while virtd runs
INTERFACE = "org.virtd1."
PATIENCE = 30.0  # seconds to wait for a daemon that went away, unless --daemon-timeout says otherwise
QUIET = 2.0  # seconds of its absence that aren't reported
RETRY = 0.05  # seconds between two attempts to connect
BROKEN = 4  # times that the same daemon may break off a call before that counts as a failure and not as a restart
MAX_FDS = 16  # a reply carries one; the rest is room for a newer daemon
HINT = "systemctl status virtd"
KNOCK = "org.varlink.service.GetInfo"


class Reply:
    """One reply: its parameters, its descriptors, which the receiver owns, and whether more replies follow."""

    __slots__ = ("continues", "fds", "parameters")

    def __init__(self, parameters: Parameters, fds: list[int], *, continues: bool) -> None:
        self.parameters = parameters
        self.fds = fds
        self.continues = continues

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Connection:
    """A connected socket. Raises the kernel's OSError, which callers translate for people."""

    def __init__(self, address: str, wait: float = PATIENCE) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        if address == ADDRESS and os.geteuid() == 0:
            try:
                self._socket = _connected(ROOT_ADDRESS, wait)
                return
            except (FileNotFoundError, ConnectionRefusedError, PermissionError):
                pass  # an older daemon's host, or a root that is somebody else outside its namespace
        self._socket = _connected(address, wait)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def send(self, method: str, parameters: Parameters, *, more: bool = False) -> None:
        """Send one call, by its full name or the part after "org.virtd1."."""
        whole = method if method.startswith("org.") else INTERFACE + method
        message: Parameters = {"method": whole, "parameters": parameters}
        if more:
            message["more"] = True
        try:
            # Without escapes: those would let through text that isn't UTF-8, which no daemon accepts.
            data = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\0"
        except UnicodeEncodeError as exc:
            bad = str(exc.object)[exc.start : exc.end].encode("utf-8", "backslashreplace").decode()
            raise VirtdError(f"The request isn't UTF-8: it contains {bad}") from exc
        self._socket.settimeout(PATIENCE)
        self._socket.sendall(data)

    def receive(self, timeout: float | None) -> Reply | None:
        """The next reply, or None if none arrives within `timeout` seconds (0: only look, None: no limit).

        Raises the VirtdError that the daemon sent, and ConnectionError if the daemon closed the connection.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\0", searched)) < 0:
            searched = len(self._buffer)
            self._socket.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
            try:
                data, ancillary, _flags, _address = self._socket.recvmsg(
                    65536, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except (TimeoutError, BlockingIOError):
                return None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    whole = len(payload) - len(payload) % 4
                    self._fds += [int.from_bytes(payload[at : at + 4], sys.byteorder) for at in range(0, whole, 4)]
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._buffer += data
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        # The kernel never joins bytes after descriptors to those before them, so all bytes received so far belong to
        # this message.
        reply, self._fds = Reply({}, self._fds, continues=False), []
        return _decode(message, reply)


def _connected(address: str, wait: float) -> socket.socket:
    """Connect; raises BlockingIOError if the backlog has been full for `wait` seconds."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if wait:
            # Not settimeout(): if the backlog is full, a non-blocking connect fails at once and has to be retried,
            # whereas a blocking one queues up (unix(7); a struct timeval for SO_SNDTIMEO).
            size = 8 if sys.maxsize > 1 << 32 else 4
            parts = (int(wait), int(wait % 1 * 1_000_000))
            link.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, b"".join(part.to_bytes(size, sys.byteorder) for part in parts)
            )
        else:
            link.setblocking(False)
        link.connect(address)
    except BaseException:
        link.close()
        raise
    return link


def _decode(message: bytes, reply: Reply) -> Reply:
    try:
        fields = json.loads(message)
        reply.parameters = fields.get("parameters") or {}
        reply.continues = bool(fields.get("continues"))
        error = fields.get("error")
    except (ValueError, AttributeError) as exc:
        reply.close()
        raise VirtdError("virtd's answer isn't a Varlink message", hint=HINT) from exc
    if error is None:
        return reply
    reply.close()
    raise _error(str(error), reply.parameters)


def _error(name: str, parameters: Parameters) -> VirtdError:
    """The exception for an error reply; those of Varlink itself mean a daemon of another version."""
    interface, _, kind = name.rpartition(".")
    if interface + "." == INTERFACE:
        return from_wire(kind, {key: str(value) for key, value in parameters.items()})
    hint = "virtdctl and virtd may be of different versions: compare virtdctl --version and virtdctl status"
    if kind in ("MethodNotFound", "InterfaceNotFound", "MethodNotImplemented"):
        what = parameters.get("method") or parameters.get("interface") or "this command"
        return VirtdError(f"The running virtd doesn't know {what}", hint=hint)
    if kind == "InvalidParameter":
        return VirtdError(f"The running virtd doesn't accept the parameter {parameters.get('parameter')}", hint=hint)
    if kind == "PermissionDenied":
        return AccessDenied("Access denied")
    return VirtdError(f"virtd answered {name}", hint=hint)


def unreachable(address: str, exc: OSError) -> VirtdError:
    """The error for a failed connect, for people."""
    if isinstance(exc, PermissionError):
        return AccessDenied(f"No access to {address}")
    if isinstance(exc, FileNotFoundError) and address == ADDRESS and _has_process(CGROUPS):
        lost = address if os.path.isdir(os.path.dirname(address)) else os.path.dirname(address)
        return Disconnected(
            f"virtd runs, but can't be reached: somebody has removed {lost}",
            hint="No guest notices this: "
            "systemctl stop virtd.socket virtd-root.socket; systemctl restart virtd.service",
        )
    if isinstance(exc, (FileNotFoundError, ConnectionRefusedError)):
        return Disconnected("virtd isn't running", hint=HINT)
    return Disconnected(f"Can't connect to {address}: {exc.strerror or exc}", hint=HINT)


def _has_process(cgroups: str) -> bool:
    """Whether virtd's control group contains a process."""
    try:
        with open(os.path.join(cgroups, "virtd.service", "cgroup.procs"), "rb") as file:
            return bool(file.read())
    except OSError:
        return False


class Session:
    """The daemon's address, and how long virtdctl waits for it. `patience` None: without limit.

    `wakes` says whether repeating an interrupted call may start a stopped daemon, as any connection to systemd's
    socket does.
    """

    def __init__(
        self, address: str = ADDRESS, patience: float | None = PATIENCE, *, wakes: bool = True, cgroups: str = ""
    ) -> None:
        self.address = address
        self.patience = patience
        self.wakes = wakes
        self._cgroups = cgroups or (CGROUPS if address == ADDRESS else "")

    def instance(self) -> str:
        """The identity of the running daemon, from a file that each rewrites before it answers anybody. Empty if it
        isn't visible."""
        try:
            found = os.stat(os.path.join(os.path.dirname(self.address), "daemon.json"))
        except OSError:
            return ""
        return f"{found.st_ino}:{found.st_mtime_ns}"

    def must_wait(self) -> bool:
        """Whether the daemon was stopped and must not be started by this call: only a command may, not a viewer that
        continues.

        A process in its control group shows this without asking anybody. Without systemd's control groups it can't be
        known, and the answer is no.
        """
        if self.wakes or not os.path.isdir(self._cgroups):
            return False
        return not _has_process(self._cgroups)

    def notice(self) -> None:
        """Say, once for each absence, why nothing happens."""
        print("virtdctl: virtd went away, waiting for it to come back...", file=sys.stderr, flush=True)

    def call(self, method: str, parameters: Parameters | None = None) -> Parameters:
        """A read-only call without descriptors; returns the reply's parameters."""
        call = Call(self, method, constant(parameters or {}), limit=self.patience)
        with call:
            return call.result().parameters


def constant(parameters: Parameters) -> Callable[[int], Parameters]:
    """Parameters that are the same for every attempt."""
    return lambda _attempt: parameters


class Call:
    """One call on a connection of its own, sent on construction, so that several can run at once.

    `parameters(attempt)` is called for each attempt: 0 for the first, more after the daemon went away, so that a call
    with a time limit can pass the remaining time. `repeat=False` is for calls that must not be made twice: they then
    end with Disconnected. `limit` is how many seconds the daemon may take to answer, None for no limit. With `more`
    there are many replies, each of which `result` waits for.
    """

    def __init__(
        self,
        session: Session,
        method: str,
        parameters: Callable[[int], Parameters],
        *,
        limit: float | None = None,
        repeat: bool = True,
        more: bool = False,
    ) -> None:
        self._session = session
        self._more = more
        self._method = method
        self._parameters = parameters
        self._repeat = repeat
        self._deadline = None if limit is None else time.monotonic() + limit
        self._limit = limit
        self._connection: Connection | None = None
        self._failed: VirtdError | None = None
        self._instance = session.instance()
        self._broken = 0
        self._broken_since = 0.0
        self.attempt = 0
        try:
            self._connection = self._connect()
            self._send()
        except ConnectionError:
            pass  # it broke off at once: result() will notice that and decide
        except VirtdError as error:
            self._failed = error  # reported when this call's turn comes, in the order of the command line

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def repeated(self) -> bool:
        """Whether the daemon went away in between, so that an earlier attempt may have done the work already."""
        return self.attempt > 0

    def result(self) -> Reply:
        """Wait for the reply. Raises the daemon's error, Disconnected, or TimedOut if it never answers."""
        if self._failed is not None:
            raise self._failed
        while True:
            try:
                if self._connection is None:
                    raise ConnectionResetError
                remaining = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                reply = self._connection.receive(remaining)
            except ConnectionError:
                self._again()
                continue
            if reply is None:
                from virtd.text import span

                raise TimedOut(f"virtd didn't answer within {span(self._limit or 0)}", hint=HINT)
            self._broken = 0  # a call with many replies has made progress
            return reply

    def _send(self) -> None:
        assert self._connection is not None
        try:
            self._connection.send(self._method, self._parameters(self.attempt), more=self._more)
        except TimeoutError as exc:
            raise TimedOut("virtd doesn't read the request", hint=HINT) from exc

    def _connect(self) -> Connection:
        """Connect for the first time: this doesn't wait for a daemon that wasn't there."""
        while True:
            try:
                return Connection(self._session.address)
            except BlockingIOError:
                # The backlog is full: clients queue for a daemon that is being started.
                if self._deadline is not None and time.monotonic() > self._deadline:
                    raise TimedOut("virtd doesn't accept connections", hint=HINT) from None
                time.sleep(RETRY)
            except OSError as exc:
                raise unreachable(self._session.address, exc) from exc

    def _again(self) -> None:
        """Wait for the daemon to come back, and send it the call.

        A connection proves nothing, because systemd holds the socket: only an answer does. So first a small question
        is sent to the new daemon, and the wait for the call itself begins when that is answered.
        """
        self.close()
        if not self._repeat:
            raise Disconnected(
                "virtd went away before it answered; it isn't known whether this was done",
                hint="virtdctl info NAME shows it",
            )
        patience = self._session.patience
        lost = time.monotonic()
        noticed = False
        if not self._session.wakes:
            time.sleep(RETRY)  # a daemon that exits closes its connections just before it leaves its control group
        while not self._knock():
            away = time.monotonic() - lost
            if patience is not None and away > patience:
                from virtd.text import span

                raise Disconnected(f"virtd went away and didn't come back within {span(patience)}", hint=HINT)
            if away > QUIET and not noticed:
                noticed = True
                self._session.notice()
        self._count(lost)
        self.attempt += 1
        if self._deadline is not None:
            self._deadline = max(self._deadline, time.monotonic() + (patience or PATIENCE))
        try:
            self._send()
        except ConnectionError:
            self.close()  # it went away again: result() finds no connection and calls this again

    def _count(self, lost: float) -> None:
        """Distinguish a restart from a daemon that breaks off this call each time, by checking whether it is still
        the same one."""
        instance = self._session.instance()
        if instance != self._instance:
            self._instance, self._broken = instance, 0
            return
        self._broken += 1
        if instance and self._broken >= BROKEN:
            raise VirtdError(
                f"virtd closes the connection whenever it is asked for {self._method}",
                hint="It wasn't restarted. See: journalctl -u virtd.service",
            )
        if self._broken == 1:
            self._broken_since = lost
        patience = self._session.patience
        if patience is not None and time.monotonic() - self._broken_since > patience:
            raise Disconnected("virtd went away again and again before it answered", hint=HINT)
        time.sleep(min(1.0, RETRY * 2**self._broken))

    def _knock(self) -> bool:
        """Take one short step towards an answer of the new daemon; returns whether it has answered."""
        try:
            if self._connection is None:
                if self._session.must_wait():
                    time.sleep(RETRY)
                    return False
                self._connection = Connection(self._session.address, QUIET / 8)
                self._connection.send(KNOCK, {})
            return self._connection.receive(QUIET / 8) is not None
        except VirtdError:
            return True  # it doesn't know the question, but it has answered
        except PermissionError as exc:
            raise unreachable(self._session.address, exc) from exc
        except OSError:
            self.close()
            time.sleep(RETRY)
            return False
