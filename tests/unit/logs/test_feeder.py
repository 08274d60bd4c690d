# SPDX-License-Identifier: LGPL-2.1-or-later
"""The feeder, on a real terminal and a real pipe."""

from __future__ import annotations

import asyncio
import fcntl
import os
import tty
from typing import TYPE_CHECKING

from virtd.logs.feeder import Feeder

if TYPE_CHECKING:
    from collections.abc import Iterator

import pytest


@pytest.fixture
def ends() -> Iterator[dict[str, int]]:
    """A raw terminal's two ends and a pipe's read end, as a child has them."""
    master, slave = os.openpty()
    tty.setraw(slave)
    read, write = os.pipe()
    os.close(write)
    os.set_blocking(read, False)
    made = {"master": master, "slave": slave, "read": read}
    yield made
    for fd in made.values():
        os.close(fd)


async def until_read(fd: int, wanted: int) -> bytes:
    found = b""
    async with asyncio.timeout(20):
        while len(found) < wanted:
            try:
                found += os.read(fd, 1 << 20)
            except BlockingIOError:
                await asyncio.sleep(0.005)
    return found


def test_what_the_terminal_says_comes_out_of_the_pipe(ends: dict[str, int]) -> None:
    async def run() -> None:
        feeder = Feeder(ends["master"], ends["read"])
        os.write(ends["slave"], b"hello\n")
        assert await until_read(ends["read"], 6) == b"hello\n"
        feeder.close()
        feeder.close()

    asyncio.run(run())


def test_a_full_pipe_loses_nothing(ends: dict[str, int]) -> None:
    """The pipe holds one page: what doesn't fit waits in the terminal, and the writer after it."""
    data = b"".join(b"%07d\n" % number for number in range(20000))

    async def run() -> None:
        fcntl.fcntl(ends["read"], fcntl.F_SETPIPE_SZ, 4096)
        feeder = Feeder(ends["master"], ends["read"])
        writing = asyncio.create_task(asyncio.to_thread(write_all, ends["slave"], data))
        await asyncio.sleep(0.1)
        assert not writing.done()
        assert await until_read(ends["read"], len(data)) == data
        await writing
        feeder.close()

    asyncio.run(run())


def test_what_one_feeder_left_the_next_one_moves(ends: dict[str, int]) -> None:
    async def run() -> None:
        first = Feeder(ends["master"], ends["read"])
        os.write(ends["slave"], b"one\n")
        assert await until_read(ends["read"], 4) == b"one\n"
        first.close()
        os.write(ends["slave"], b"two\n")
        second = Feeder(ends["master"], ends["read"])
        await second.drain(empty)
        assert os.read(ends["read"], 100) == b"two\n"
        second.close()

    asyncio.run(run())


def test_the_last_words_are_drained(ends: dict[str, int]) -> None:
    """The terminal's other end is closed, and the pipe too small for what is left in it."""
    data = b"x" * 9000

    async def run() -> None:
        found = b""
        fcntl.fcntl(ends["read"], fcntl.F_SETPIPE_SZ, 4096)

        async def taken() -> None:
            nonlocal found
            found += os.read(ends["read"], 1 << 20)

        os.set_blocking(ends["slave"], False)
        written = os.write(ends["slave"], data)
        feeder = Feeder(ends["master"], ends["read"])
        os.close(ends["slave"])
        ends["slave"] = os.open(os.devnull, os.O_RDONLY)
        await feeder.drain(taken)
        await feeder.drain(taken)
        feeder.close()
        found += os.read(ends["read"], 1 << 20)
        assert found == data[:written]

    asyncio.run(run())


async def empty() -> None:
    pass


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
