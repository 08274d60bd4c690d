# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink front end and those who mean it no good, and replies that can't be encoded."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.doubles.whole_host import on_loop, until
from tests.unit.api.test_varlink import ANN, ROOT, serving
from virtd import errors
from virtd.api import clients, varlink
from virtd.host import Caller


@pytest.mark.parametrize("bad", ["disk\udcff", {"\ud800": 1}, 1 << 80, object()])
@on_loop
async def test_a_reply_is_always_an_answer(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        world.host.answers = {"listing": [bad], "start": errors.HostError(f"no {bad}", hint="a\udc80b")}
        with world.client() as client:
            reply = await client.call("org.virtd1.List")
            assert reply is not None
            assert len(reply["parameters"]["objects"]) == 1
            reply = await client.call("org.virtd1.Start", {"name": "a"})
            assert reply is not None
            assert reply["error"] == "org.virtd1.HostError"
            assert reply["parameters"]["hint"] == "a\\x80b"


@on_loop
async def test_a_client_cannot_fill_the_journal(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, monkeypatch, ANN) as world:
        world.host.answers["info"] = ZeroDivisionError("bug")
        with world.client() as client:
            for _ in range(100):
                reply = await client.call("org.virtd1.Info", {"name": "\u0000"})
                assert reply is not None
                assert reply["error"] == "org.virtd1.HostError"
    assert 0 < len(caplog.records) < 10
    caplog.clear()


@pytest.mark.parametrize("method", ["List", "Info", "Slots"])
@on_loop
async def test_a_question_ends_with_its_client(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    async with serving(tmp_path, monkeypatch) as world:
        asked = {"List": "listing", "Info": "info", "Slots": "slots"}[method]

        async def for_ever() -> None:
            await asyncio.Event().wait()

        world.host.answers[asked] = for_ever
        with world.client() as client:
            parameters = {"name": "a"} if method == "Info" else {}
            # The next call is there already, which hides the end from all but a look for it.
            await client.send({"method": f"org.virtd1.{method}", "parameters": parameters}, {"method": "x.y"})
            await until(lambda: world.host.calls)
        await until(lambda: world.host.cancelled == [asked])


@on_loop
async def test_a_large_call_of_one_without_rights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch, ANN) as world:
        with world.client() as client:
            with contextlib.suppress(ConnectionError):
                await client.send({"method": "org.virtd1.Define", "parameters": {"text": "x" * 1_000_000}})
            reply = await client.receive()
            assert reply is not None
            assert reply["error"] == "org.virtd1.AccessDenied"
            assert await client.receive() is None


@on_loop
async def test_a_message_that_never_ends_is_not_waited_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlink, "PATIENCE", 0.2)
    async with serving(tmp_path, monkeypatch, ANN) as world:
        with world.client() as client, world.client() as idle:
            await idle.call("org.virtd1.List")
            await client.send(b'{"method":', end=b"")
            assert await client.receive() is None
            assert await idle.call("org.virtd1.List") == {"parameters": {"objects": {}}}


@on_loop
async def test_who_never_reads_is_hung_up_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlink, "PATIENCE", 0.2)
    async with serving(tmp_path, monkeypatch, ANN) as world:
        world.host.answers["listing"] = ["x" * 1_000_000]
        with world.client() as client:
            await client.send({"method": "org.virtd1.List"})
            await until(lambda: world.host.calls)
            await until(lambda: not world.server.clients.count())


@on_loop
async def test_connections_of_one_user(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "CONNECTIONS", 3)
    async with serving(tmp_path, monkeypatch, ANN) as world:
        with contextlib.ExitStack() as stack:
            first, *_ = (stack.enter_context(world.client()) for _ in range(3))
            await until(lambda: world.server.clients.count(ANN.uid) == 3)
            with world.client() as one_more:
                reply = await one_more.receive()
                assert reply is not None
                assert reply["error"] == "org.virtd1.Busy"
                assert await one_more.receive() is None
            monkeypatch.setattr(clients, "IDLE", 0.0)
            with world.client() as one_more:
                assert await one_more.call("org.virtd1.List") == {"parameters": {"objects": {}}}
                assert await first.receive() is None, "the one that was idle for the longest has made room"


@on_loop
async def test_connections_of_all_users(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ALL_CONNECTIONS", 4)
    users = [ANN] * 4 + [Caller(uid=2000, pid=1, name="ben")] + [ROOT] * 9
    async with serving(tmp_path, monkeypatch, ANN) as world:
        monkeypatch.setattr(varlink, "caller_of", lambda _connection: users.pop(0))
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                last = stack.enter_context(world.client())
                await until(lambda: world.server.clients.count() <= 4)
            assert await last.call("org.virtd1.List") == {"parameters": {"objects": {}}}
            assert world.server.clients.count(2000) == 1
            assert world.server.clients.count(ANN.uid) == 3
            for number in range(9):
                stack.enter_context(world.client())
                await until(lambda left=8 - number: len(users) == left)
            await until(lambda: world.server.clients.count(0) == 9)


@pytest.mark.parametrize(("caller", "times"), [(ANN, 1), (ROOT, 3)])
@on_loop
async def test_what_costs_much_is_found_out_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caller: Caller, times: int
) -> None:
    async with serving(tmp_path, monkeypatch, caller) as world:
        world.host.answers["check_all"] = {"differences": [], "objects": 7}
        for _ in range(3):
            with world.client() as client:
                reply = await client.call("org.virtd1.Check")
                assert reply == {"parameters": {"differences": [], "objects": 7}}
        assert len(world.host.calls) == times
