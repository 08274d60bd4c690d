# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink front end over a real socket, in front of a host that only remembers what it was asked."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.whole_host import on_loop, until
from virtd import __version__, errors
from virtd.api import idl, interfaces, varlink
from virtd.host import Caller, Host, WithDescriptors
from virtd.host.access import Access
from virtd.host.domains import Domains
from virtd.replies import Reply
from virtd.replies.guests import Opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ANN = Caller(uid=1000, pid=4711, name="ann")
ROOT = Caller(uid=0, pid=4711, name="root")


class Said(Reply, frozen=True):
    """Of whatever is asked."""

    text: str = ""
    file: str = ""
    offset: int = 0


class FakeHost:
    """Answers any method by `answers[method]`: a value, an exception to raise, or a coroutine function."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.cancelled: list[str] = []
        self.access = Access()
        self.console_events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.console_closed = asyncio.Event()

    def __getattr__(self, method: str) -> Any:
        # Only what the real one has, so that a handler for a method that is gone fails here.
        assert hasattr(Host, method) or hasattr(Domains, method), method

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((method, args, kwargs))
            answer = self.answers.get(method, {})
            if isinstance(answer, BaseException):
                raise answer
            try:
                return await answer() if callable(answer) else answer
            except asyncio.CancelledError:
                self.cancelled.append(method)
                raise

        return call

    @property
    def domains(self) -> FakeHost:
        return self

    events = domains

    async def subscribe(self, since: int | None) -> AsyncIterator[dict[str, Any]]:
        self.calls.append(("subscribe", (since,), {}))
        try:
            yield {"sequence": since}
            await asyncio.Event().wait()
        finally:
            self.cancelled.append("subscribe")

    async def open_console(self, **kwargs: Any) -> AsyncIterator[dict[str, Any] | WithDescriptors]:
        self.calls.append(("open_console", (), kwargs))
        if (answer := self.answers.get("open_console")) is not None:
            raise answer
        read, write = os.pipe()
        self.console_input = read
        try:
            yield WithDescriptors(Opened(token="t", name=kwargs["name"]), [write])
            while True:
                event = await self.console_events.get()
                yield event
                if "event" in event:
                    return
        finally:
            os.close(read)
            self.console_closed.set()


class Client:
    """One connection, spoken by hand."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        self.socket.connect(path)
        self.buffer = b""
        self.fds: list[int] = []

    async def send(self, *messages: Any, end: bytes = b"\0") -> None:
        data = b"".join((m if isinstance(m, bytes) else json.dumps(m).encode()) + end for m in messages)
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self) -> dict[str, Any] | None:
        """The next reply; None when the server has hung up."""
        while b"\0" not in self.buffer:
            try:
                chunk, control, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                readable = asyncio.Event()
                asyncio.get_running_loop().add_reader(self.socket, readable.set)
                await asyncio.wait_for(readable.wait(), 20)
                asyncio.get_running_loop().remove_reader(self.socket)
                continue
            except ConnectionResetError:
                return None
            if not chunk:
                assert not self.buffer
                return None
            for _level, _kind, payload in control:
                numbers = array.array("i")
                numbers.frombytes(payload)
                self.fds += numbers
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        return reply

    async def call(self, method: str, parameters: Any = None, **more: Any) -> dict[str, Any] | None:
        await self.send({"method": method} | ({} if parameters is None else {"parameters": parameters}) | more)
        return await self.receive()

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class World:
    """A server and its host."""

    def __init__(self, path: str, host: FakeHost, server: varlink.Server) -> None:
        self.path = path
        self.host = host
        self.server = server

    @contextlib.contextmanager
    def client(self) -> Any:
        client = Client(self.path)
        try:
            yield client
        finally:
            client.close()


@contextlib.asynccontextmanager
async def serving(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caller: Caller = ROOT) -> AsyncIterator[World]:
    monkeypatch.setattr(varlink, "caller_of", lambda _connection: caller)
    path = str(tmp_path / "v.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(5)
        host = FakeHost()
        server = varlink.Server(host, listener)  # type: ignore[arg-type]
        server.start()
        try:
            yield World(path, host, server)
        finally:
            await server.close()


# The interface's text


@pytest.mark.parametrize("interface", interfaces.MODULES)
def test_every_method_has_a_handler_and_the_other_way_round(interface: str) -> None:
    table = interfaces.methods(interface)
    assert set(idl.methods(interface)) == set(table)
    assert all((method.answer is None) != (method.stream is None) for method in table.values())


def test_the_interfaces_errors_are_the_trees() -> None:
    told = dict(re.findall(r"^error (\w+)\((.*)\)$", idl.text("org.virtd1"), re.MULTILINE))
    assert set(told) == set(errors.KINDS)
    for kind, text in told.items():
        assert [item.partition(":")[0] for item in text.split(", ")] == [
            "message",
            "hint",
            *errors.KINDS[kind].details,
        ]


@pytest.mark.parametrize("interface", interfaces.MODULES)
def test_every_method_of_the_interface_is_described_completely(interface: str) -> None:
    """Each line that begins a method was understood, and so was every type in it."""
    assert f"\ninterface {interface}\n" in f"\n{idl.text(interface)}"
    methods = idl.methods(interface)
    assert len(re.findall(r"^method ", idl.text(interface), re.MULTILINE)) == len(methods)
    kinds = {parameter.kind for parameters in methods.values() for parameter in parameters}
    assert kinds <= {"string", "bool", "int", "float", "object"}


@pytest.mark.parametrize(
    ("method", "parameters", "wrong"),
    [
        ("Start", {"name": "a"}, None),
        ("Start", {}, "name"),
        ("Start", {"name": None}, "name"),
        ("Start", {"name": 7}, "name"),
        ("Start", {"name": "a", "force": True}, "force"),
        ("Kill", {"name": "a", "signal": 9}, None),
        ("Kill", {"name": "a", "signal": "9"}, "signal"),
        ("Kill", {"name": "a", "signal": True}, "signal"),
        ("Kill", {"name": "a", "signal": 9.5}, "signal"),
        ("Shutdown", {"name": "a", "timeout": 1}, None),
        ("Shutdown", {"name": "a", "timeout": 1.5}, None),
        ("Shutdown", {"name": "a", "timeout": None}, None),
        ("Shutdown", {"name": "a", "timeout": True}, "timeout"),
        ("Shutdown", {"name": "a", "timeout": "soon"}, "timeout"),
        ("Wait", {"name": "a", "states": ["running"]}, None),
        ("Wait", {"name": "a", "states": []}, None),
        ("Wait", {"name": "a", "states": "running"}, "states"),
        ("Wait", {"name": "a", "states": ["running", 1]}, "states"),
        ("Autostart", {"name": "a", "enable": 1}, "enable"),
        ("Follow", {"name": "a", "log": "console", "offset": "0"}, "offset"),
        ("Define", {"text": "x"}, "source"),
        ("List", {}, None),
        ("List", {"name": "a"}, "name"),
    ],
)
def test_parameters(method: str, parameters: dict[str, Any], wrong: str | None) -> None:
    assert idl.problem("org.virtd1", method, parameters) == wrong


# The wire


@on_loop
async def test_calls_in_one_packet_are_answered_in_order(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        world.host.answers = {"start": {"name": "a"}, "stop": errors.NotFound("none"), "listing": [{"name": "é"}]}
        with world.client() as client:
            await client.send(
                {"method": "org.virtd1.Start", "parameters": {"name": "a"}},
                {"method": "org.virtd1.Stop", "parameters": {"name": "b"}},
                {"method": "org.virtd1.List"},
            )
            assert await client.receive() == {"parameters": {"name": "a"}}
            assert await client.receive() == {
                "error": "org.virtd1.NotFound", "parameters": {"message": "none", "hint": ""},
            }  # fmt: skip
            assert await client.receive() == {"parameters": {"objects": [{"name": "é"}]}}
        assert [call[0] for call in world.host.calls] == ["start", "stop", "listing"]
        assert world.host.calls[0] == ("start", ("a",), {"by": ROOT})


@on_loop
async def test_a_call_in_many_packets(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            for byte in b'{"method":"org.varlink.service.GetInfo"}\0':
                await client.send(bytes([byte]), end=b"")
                await asyncio.sleep(0)
            reply = await client.receive()
            assert reply is not None
            assert reply["parameters"]["version"] == __version__


@on_loop
async def test_a_message_without_an_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlink, "LIMIT", 100_000)
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            with contextlib.suppress(ConnectionError):
                await client.send(b"x" * 1_000_000, end=b"")
            reply = await client.receive()
            assert reply is not None
            assert reply["error"] == "org.virtd1.HostError"
            assert await client.receive() is None
        # Only that client was thrown out.
        with world.client() as client:
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"garbage", b"\xff", b"[]", b"7", b"null", b"{}", b'{"method": 7}', b'{"method": null}',
        b'{"method": "org.virtd1.List", "parameters": []}', b'{"method": "org.virtd1.List", "parameters": "x"}',
        b"[" * 100_000,
    ],
)  # fmt: skip
@on_loop
async def test_garbage_ends_the_connection_and_nothing_else(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as other, world.client() as client:
            await client.send(garbage)
            reply = await client.receive()
            # `"parameters": []` is an empty object to some languages.
            assert reply is None or garbage.endswith(b"[]}")
            assert await other.call("org.virtd1.List") == {"parameters": {"objects": {}}}


@pytest.mark.parametrize(
    ("method", "parameters", "error", "details"),
    [
        ("org.virtd1.Start", {"name": 7}, "InvalidParameter", {"parameter": "name"}),
        ("org.virtd1.Start", {}, "InvalidParameter", {"parameter": "name"}),
        ("org.virtd1.Start", {"name": "a", "x": 1}, "InvalidParameter", {"parameter": "x"}),
        ("org.virtd1.OpenConsole", {"name": []}, "InvalidParameter", {"parameter": "name"}),
        ("org.virtd1.Start", {"": 1, "name": 7}, "InvalidParameter", {"parameter": ""}),
        ("org.virtd1.Fly", {}, "MethodNotFound", {"method": "org.virtd1.Fly"}),
        ("org.virtd1._allow", {}, "MethodNotFound", {"method": "org.virtd1._allow"}),
        ("org.virtd2.Start", {}, "InterfaceNotFound", {"interface": "org.virtd2"}),
        ("Start", {}, "InterfaceNotFound", {"interface": ""}),
        ("org.varlink.service.Fly", {}, "MethodNotFound", {"method": "org.varlink.service.Fly"}),
        ("org.varlink.service.GetInterfaceDescription", {"interface": "x"}, "InterfaceNotFound", {"interface": "x"}),
        ("org.virtd1.OpenConsole", {"name": "a"}, "ExpectedMore", {}),
    ],
)
@on_loop
async def test_a_call_that_is_none(
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    error: str,
    details: dict[str, Any],
) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            expected = {"error": f"org.varlink.service.{error}", "parameters": details}
            assert await client.call(method, parameters) == expected
            # The connection is still good.
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}
        assert [call[0] for call in world.host.calls] == ["listing"]


@on_loop
async def test_about_itself(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch, ANN) as world:
        with world.client() as client:
            reply = await client.call("org.varlink.service.GetInfo")
            assert reply is not None
            assert set(reply["parameters"]) == {"vendor", "product", "version", "url", "interfaces"}
            for interface in reply["parameters"]["interfaces"]:
                reply = await client.call("org.varlink.service.GetInterfaceDescription", {"interface": interface})
                assert reply is not None
                text = reply["parameters"]["description"]
                assert re.search(rf"^interface {re.escape(interface)}$", text, re.MULTILINE)


@on_loop
async def test_oneway_gets_no_answer(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            await client.send({"method": "org.virtd1.Start", "parameters": {"name": "a"}, "oneway": True})
            await client.send({"method": "org.virtd1.Fly", "oneway": True})
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}
        assert [call[0] for call in world.host.calls] == ["start", "listing"]


@on_loop
async def test_every_error_of_the_tree_crosses_the_wire(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(errors.StartFailed):
        """A driver's own kind of a known error."""

    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            for error in (
                errors.InvalidDefinition("f", "k", "e", hint="h"),
                errors.Busy("b", hint="h"),
                errors.VirtdError("v"),
                Special("s"),
            ):
                world.host.answers["start"] = error
                reply = await client.call("org.virtd1.Start", {"name": "a"})
                assert reply is not None
                again = errors.from_wire(reply["error"].rpartition(".")[2], reply["parameters"])
                assert isinstance(error, type(again))
                assert again.fields() == error.fields()


@pytest.mark.parametrize(
    "bug", [ValueError("odd"), OSError(30, "Read-only file system"), KeyError("x"), TimeoutError()]
)
@on_loop
async def test_what_nobody_thought_of_is_an_error_and_no_hang_up(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, bug: Exception
) -> None:
    """A client takes a connection that breaks for a restart, and repeats its call."""
    async with serving(tmp_path, monkeypatch) as world:
        world.host.answers["start"] = bug
        with world.client() as client:
            reply = await client.call("org.virtd1.Start", {"name": "a"})
            assert reply is not None
            assert reply["error"] == "org.virtd1.HostError"
            assert reply["parameters"]["message"].startswith("Start failed")
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}


@on_loop
async def test_only_root_may_change_things(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample: dict[str, Any] = {"string": "a", "int": 1, "bool": True, "float": 1.0}
    everybody = {"Status", "List", "Info", "Dump", "Wait", "Check", "Slots", "Subscribe"}
    async with serving(tmp_path, monkeypatch, ANN) as world:
        for method, declared in idl.methods("org.virtd1").items():
            with world.client() as client:
                parameters = {p.name: [sample[p.kind]] if p.many else sample[p.kind] for p in declared}
                more = method in ("OpenConsole", "Subscribe")
                reply = await client.call(f"org.virtd1.{method}", parameters, more=more)
                assert reply is not None
                denied = reply.get("error") == "org.virtd1.AccessDenied"
                assert denied == (method not in everybody), method
                if denied:
                    assert reply["parameters"]["message"] == f"ann may not call {method}"
        assert {call[0] for call in world.host.calls} == {
            "status", "listing", "info", "dump", "wait", "check_all", "slots", "subscribe",
        }  # fmt: skip


def test_who_calls_is_what_the_kernel_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = varlink.caller_of(ours)
    assert (caller.uid, caller.pid) == (os.getuid(), os.getpid())
    assert caller.name


# Descriptors, hanging up and streams


@on_loop
async def test_descriptors_are_passed_and_closed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        read, write = os.pipe()
        os.set_inheritable(write, False)

        async def follow() -> WithDescriptors:
            return WithDescriptors(Said(file="1:2"), [write])

        world.host.answers["follow"] = follow
        with world.client() as client:
            reply = await client.call("org.virtd1.Follow", {"name": "a", "log": "console"})
            assert reply == {"parameters": {"text": "", "file": "1:2", "offset": 0}}
            assert len(client.fds) == 1
            os.write(client.fds[0], b"through")
            assert os.read(read, 100) == b"through"
            # Ours is closed: with the client's, the last writer goes.
            os.close(client.fds.pop())
            assert os.read(read, 100) == b""
        assert world.host.calls == [("follow", ("a", "console", None, None, None), {"wait": False})]
        os.close(read)


@on_loop
async def test_descriptors_of_a_oneway_call_are_closed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        read, write = os.pipe()

        async def follow() -> WithDescriptors:
            return WithDescriptors(Said(), [write])

        world.host.answers["follow"] = follow
        with world.client() as client:
            parameters = {"name": "a", "log": "console"}
            await client.send({"method": "org.virtd1.Follow", "parameters": parameters, "oneway": True})
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}
            assert client.fds == []
        assert os.read(read, 100) == b""
        os.close(read)


@on_loop
async def test_a_large_reply_with_a_descriptor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the socket takes at once, to a client that doesn't read yet."""
    async with serving(tmp_path, monkeypatch) as world:

        async def follow() -> WithDescriptors:
            return WithDescriptors(Said(text="x" * 3_000_000), [os.open("/dev/null", os.O_RDONLY)])

        world.host.answers["follow"] = follow
        with world.client() as client:
            await client.send({"method": "org.virtd1.Follow", "parameters": {"name": "a", "log": "console"}})
            await asyncio.sleep(0.05)
            reply = await client.receive()
            assert reply is not None
            assert len(reply["parameters"]["text"]) == 3_000_000
            assert len(client.fds) == 1


@pytest.mark.parametrize(
    "method",
    [name for name, method in interfaces.methods("org.virtd1").items() if method.waiting and not method.stream],
)
@on_loop
async def test_who_hangs_up_is_not_waited_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    parameters = {
        "Wait": {"name": "a", "states": ["running"]},
        "Follow": {"name": "a", "log": "console", "wait": True},
    }
    async with serving(tmp_path, monkeypatch) as world:

        async def never() -> None:
            await asyncio.Event().wait()

        world.host.answers[method.lower()] = never
        with world.client() as client:
            await client.send({"method": f"org.virtd1.{method}", "parameters": parameters[method]})
            await until(lambda: world.host.calls)
            assert world.host.cancelled == []
        await until(lambda: world.host.cancelled == [method.lower()])
        await until(lambda: not world.server.clients.count(0))


@on_loop
async def test_a_subscriber_that_hangs_up_is_forgotten(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            reply = await client.call("org.virtd1.Subscribe", {"since": 7}, more=True)
            assert reply == {"parameters": {"sequence": 7}, "continues": True}
            assert world.host.cancelled == []
        await until(lambda: world.host.cancelled == ["subscribe"])
        await until(lambda: not world.server.clients.count(0))


@on_loop
async def test_a_change_goes_on_without_its_client(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        go_on, done = asyncio.Event(), asyncio.Event()

        async def shutdown() -> dict[str, Any]:
            await go_on.wait()
            done.set()
            return {}

        world.host.answers["shutdown"] = shutdown
        with world.client() as client:
            await client.send({"method": "org.virtd1.Shutdown", "parameters": {"name": "a"}})
            await until(lambda: world.host.calls)
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait_for(done.wait(), 20)
        await until(lambda: not world.server.clients.count(0))


@on_loop
async def test_a_waiting_client_may_send_its_next_call(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        go_on = asyncio.Event()

        async def wait() -> dict[str, Any]:
            await go_on.wait()
            return {"name": "a"}

        world.host.answers["wait"] = wait
        with world.client() as client:
            await client.send({"method": "org.virtd1.Wait", "parameters": {"name": "a", "states": []}})
            await until(lambda: world.host.calls)
            before = time.process_time()
            await client.send({"method": "org.virtd1.List"})
            await asyncio.sleep(0.3)
            # The message that nobody reads yet keeps nobody busy.
            assert time.process_time() - before < 0.2
            go_on.set()
            assert await client.receive() == {"parameters": {"object": {"name": "a"}}}
            assert await client.receive() == {"parameters": {"objects": {}}}


@on_loop
async def test_a_console(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            parameters = {"name": "a", "force": True, "token": None}
            reply = await client.call("org.virtd1.OpenConsole", parameters, more=True)
            assert reply == {"parameters": {"token": "t", "name": "a"}, "continues": True}
            os.write(client.fds[0], b"typed")
            assert os.read(world.host.console_input, 100) == b"typed"
            assert world.host.calls == [("open_console", (), {"name": "a", "force": True, "by": ROOT})]
            await world.host.console_events.put({"name": "a", "event": "ended", "by": None})
            assert await client.receive() == {
                "parameters": {"name": "a", "event": "ended", "by": None}, "continues": False,
            }  # fmt: skip
            # Afterwards it is a connection like any other.
            assert await client.call("org.virtd1.List") == {"parameters": {"objects": {}}}


@on_loop
async def test_hanging_up_gives_the_console_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as client:
            await client.call("org.virtd1.OpenConsole", {"name": "a"}, more=True)
            assert not world.host.console_closed.is_set()
        await asyncio.wait_for(world.host.console_closed.wait(), 20)
        await until(lambda: not world.server.clients.count(0))


@on_loop
async def test_a_console_that_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        world.host.answers["open_console"] = errors.Busy("in use")
        with world.client() as client:
            reply = await client.call("org.virtd1.OpenConsole", {"name": "a"}, more=True)
            assert reply is not None
            assert reply["error"] == "org.virtd1.Busy"
            assert "continues" not in reply


@on_loop
async def test_closing_the_server_ends_every_connection(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with world.client() as idle, world.client() as console:
            await idle.call("org.virtd1.List")
            await console.call("org.virtd1.OpenConsole", {"name": "a"}, more=True)
            await world.server.close()
            assert await idle.receive() is None
            assert await console.receive() is None
            assert world.host.console_closed.is_set()


@on_loop
async def test_a_hundred_clients(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(100):
                clients.append(stack.enter_context(world.client()))
                await asyncio.sleep(0)
            replies = await asyncio.gather(*(client.call("org.virtd1.List") for client in clients))
            assert replies == [{"parameters": {"objects": {}}}] * 100
