# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's half of the Varlink interface `org.virtd1`: one connection, and calls that outlive the daemon.

A message is a JSON object followed by a NUL byte (https://varlink.org/Wire-Protocol); file descriptors come with a
reply as SCM_RIGHTS. The daemon's socket belongs to systemd and stays open while the daemon is away, so that a call
made meanwhile waits in the backlog. A call that the old daemon had taken and not answered breaks, and is sent again
to the new one when that can't do harm.

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
PATIENCE = 30.0  # seconds that a daemon which went away may take to come back, unless --daemon-timeout says otherwise
QUIET = 2.0  # seconds of its absence that aren't worth a word
RETRY = 0.05  # seconds between two attempts to connect
BROKEN = 4  # times that one daemon may break one call off, before that is no restart but its answer
MAX_FDS = 16  # a reply carries one; the rest is room for a newer daemon
HINT = "systemctl status virtd"
KNOCK = "org.varlink.service.GetInfo"


class Reply:
    """One reply: its parameters, the descriptors that came with it, the receiver's now, and whether more follow."""

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
    """A connected socket. Raises OSError as the kernel says it; what that means to a person, the callers know."""

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
        """Send one call, by its whole name or what comes after "org.virtd1."."""
        whole = method if method.startswith("org.") else INTERFACE + method
        message: Parameters = {"method": whole, "parameters": parameters}
        if more:
            message["more"] = True
        try:
            # As it is, not with escapes: those would let through what isn't UTF-8, which no daemon takes.
            data = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\0"
        except UnicodeEncodeError as exc:
            bad = str(exc.object)[exc.start : exc.end].encode("utf-8", "backslashreplace").decode()
            raise VirtdError(f"What is asked for isn't UTF-8: it has {bad} in it") from exc
        self._socket.settimeout(PATIENCE)
        self._socket.sendall(data)

    def receive(self, timeout: float | None) -> Reply | None:
        """The next reply, or None when none came in `timeout` seconds (0: look only, None: no limit).

        Raises the VirtdError that the daemon sent, and ConnectionError when the daemon closed the connection.
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
        # The kernel never joins bytes that come after descriptors to those before, so that all that have arrived so
        # far belong to this message.
        reply, self._fds = Reply({}, self._fds, continues=False), []
        return _decode(message, reply)


def _connected(address: str, wait: float) -> socket.socket:
    """Raises BlockingIOError when the backlog has been full for `wait` seconds."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if wait:
            # Not settimeout(): who doesn't block is told at once of a full backlog, and has to try their luck. Who
            # does stands in line (unix(7); a struct timeval for SO_SNDTIMEO).
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
        raise VirtdError("virtd's answer is no Varlink message", hint=HINT) from exc
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
    """What a failed connect means to a person."""
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
    """Whether virtd's control group has a process in it."""
    try:
        with open(os.path.join(cgroups, "virtd.service", "cgroup.procs"), "rb") as file:
            return bool(file.read())
    except OSError:
        return False


class Session:
    """Where the daemon is, and how long virtdctl waits for it. `patience` None: as long as it takes.

    `wakes` says whether a call that broke may start a daemon that was stopped, as any connection to systemd's socket
    does.
    """

    def __init__(
        self, address: str = ADDRESS, patience: float | None = PATIENCE, *, wakes: bool = True, cgroups: str = ""
    ) -> None:
        self.address = address
        self.patience = patience
        self.wakes = wakes
        self._cgroups = cgroups or (CGROUPS if address == ADDRESS else "")

    def instance(self) -> str:
        """Which daemon there is: each writes this file anew before it answers anybody. Nothing if that isn't seen."""
        try:
            found = os.stat(os.path.join(os.path.dirname(self.address), "daemon.json"))
        except OSError:
            return ""
        return f"{found.st_ino}:{found.st_mtime_ns}"

    def must_wait(self) -> bool:
        """Whether the daemon was stopped, and only a command may start it: a viewer that wants to go on must not.

        Whether there is a process in its control group tells this without asking anybody. Where there are no such
        groups as systemd makes them, nothing can be told, and the answer is no.
        """
        if self.wakes or not os.path.isdir(self._cgroups):
            return False
        return not _has_process(self._cgroups)

    def notice(self) -> None:
        """Say, once for each absence, why nothing happens."""
        print("virtdctl: virtd went away, waiting for it to come back...", file=sys.stderr, flush=True)

    def call(self, method: str, parameters: Parameters | None = None) -> Parameters:
        """A reading call that carries no descriptors: its reply's parameters."""
        call = Call(self, method, constant(parameters or {}), limit=self.patience)
        with call:
            return call.result().parameters


def constant(parameters: Parameters) -> Callable[[int], Parameters]:
    """For calls that ask for the same however often."""
    return lambda _attempt: parameters


class Call:
    """One call on a connection of its own, sent when it is made, so that several run at once.

    `parameters(attempt)` is asked for each attempt: 0 for the first, 1 and more after the daemon went away, so that a
    call with a time limit asks for what is left of it. `repeat=False` is for what must not happen twice: it then ends
    with Disconnected. `limit` is how many seconds the daemon may take to answer, None for no limit. With `more` there
    are many replies, each of which `result` waits for.
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
            pass  # it broke at once: result() finds out the same way and decides
        except VirtdError as error:
            self._failed = error  # told when this call's turn comes, in the order of the command line

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
        """Wait for the reply. Raises what the daemon sent, Disconnected, or TimedOut when it never answers."""
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
            self._broken = 0  # of a call with many replies: it wasn't in vain
            return reply

    def _send(self) -> None:
        assert self._connection is not None
        try:
            self._connection.send(self._method, self._parameters(self.attempt), more=self._more)
        except TimeoutError as exc:
            raise TimedOut("virtd doesn't read what it is sent", hint=HINT) from exc

    def _connect(self) -> Connection:
        """The first connection: a daemon that was never there isn't waited for."""
        while True:
            try:
                return Connection(self._session.address)
            except BlockingIOError:
                # The backlog is full: clients queue for a daemon that is being started.
                if self._deadline is not None and time.monotonic() > self._deadline:
                    raise TimedOut("virtd doesn't take connections", hint=HINT) from None
                time.sleep(RETRY)
            except OSError as exc:
                raise unreachable(self._session.address, exc) from exc

    def _again(self) -> None:
        """Wait for the daemon to be back and send the call to it.

        A connection tells nothing, for it is systemd that holds the socket: only an answer does. So the new daemon is
        asked for something small first, and the wait for the call itself begins when that came.
        """
        self.close()
        if not self._repeat:
            raise Disconnected(
                "virtd went away before it answered; this may have been done or not",
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
            self.close()  # gone once more: result() finds no connection and comes here again

    def _count(self, lost: float) -> None:
        """Tell a restart from a daemon that breaks this call off each time, by its being the same one still."""
        instance = self._session.instance()
        if instance != self._instance:
            self._instance, self._broken = instance, 0
            return
        self._broken += 1
        if instance and self._broken >= BROKEN:
            raise VirtdError(
                f"virtd breaks the connection off whenever it is asked for {self._method}",
                hint="It wasn't restarted. See: journalctl -u virtd.service",
            )
        if self._broken == 1:
            self._broken_since = lost
        patience = self._session.patience
        if patience is not None and time.monotonic() - self._broken_since > patience:
            raise Disconnected("virtd went away again and again before it answered", hint=HINT)
        time.sleep(min(1.0, RETRY * 2**self._broken))

    def _knock(self) -> bool:
        """Take one short step towards an answer of the new daemon; whether it came."""
        try:
            if self._connection is None:
                if self._session.must_wait():
                    time.sleep(RETRY)
                    return False
                self._connection = Connection(self._session.address, QUIET / 8)
                self._connection.send(KNOCK, {})
            return self._connection.receive(QUIET / 8) is not None
        except VirtdError:
            return True  # it doesn't know the question, but it is there
        except PermissionError as exc:
            raise unreachable(self._session.address, exc) from exc
        except OSError:
            self.close()
            time.sleep(RETRY)
            return False
