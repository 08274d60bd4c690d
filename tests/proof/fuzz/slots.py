# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comes back from PID 1's store: names in $LISTEN_FDNAMES and messages in boxes, of another version perhaps."""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from typing import TYPE_CHECKING

from virtd.fdstore import Store, StoreError, boxes
from virtd.fdstore.names import check

if TYPE_CHECKING:
    from collections.abc import Sequence

SEEDS = (
    b"\0qemu/web1/stdin:qemu/web1/stdout:varlink:fdstore/box/1.3:fdstore/box/1.4",
    b"\1virtd.fdstore 1\nqemu/web1/stdin\nqemu/web1/stdout",
    b"\2virtd.fdstore 2\nqemu/web1/stdin",
)
WORDS = (b"fdstore/box/", b"qemu/", b"virtd.fdstore 1\n", b"/", b":", b"stored", b"1.1", "qemu/ä".encode())


def target(data: bytes) -> None:
    if not data:
        return
    before = len(os.listdir("/proc/self/fd"))
    inherited: dict[int, str] = {}
    text = data[1:]
    if data[0] % 3 == 0:
        for name in text.decode("ascii", errors="replace").split(":")[:64]:
            inherited[os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)] = name
    else:
        inherited[_box(text, descriptors=data[0] % 3 * text.count(b"\n"))] = "fdstore/box/7.2"
    store = Store(inherited, _tell, store_max=4096)
    try:
        for name in store.names():
            store.kept_as(name)
            store.get(name)
            with contextlib.suppress(StoreError):
                check(name)
                store.drop(name)
        store.budget()
        store.duplicates()
        store.verify([("a", 1, 2)])
        for name in store.names():
            store.expel(name)
    finally:
        store.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors that nobody closes"


def _tell(_message: str, _fds: Sequence[int] = ()) -> None:
    pass


def _box(text: bytes, *, descriptors: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, open("/dev/null", "rb") as null:
        many = array("i", [null.fileno()] * min(descriptors, boxes.CAPACITY))
        ours.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)] if many else [])
        return theirs.detach()
