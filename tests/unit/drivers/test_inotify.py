# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has how many inotify instances, and what is said when there are no more."""

from __future__ import annotations

import ctypes
import os

import pytest

from virtd.drivers import inotify
from virtd.drivers.network import serverlaunch
from virtd.drivers.network.prerequisites import Account


def test_counting_and_trying() -> None:
    uid = os.geteuid()
    fds = [ctypes.CDLL(None).inotify_init1(os.O_CLOEXEC) for _ in range(3)]
    try:
        # Others of this user may come and go meanwhile.
        mine = [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
        assert sum(os.readlink(f"/proc/self/fd/{fd}") == inotify.LINK for fd in mine if int(fd) in fds) == 3
        assert inotify.taken(uid) >= 3
        opened = len(os.listdir("/proc/self/fd"))
        assert inotify.left(1) in (0, 1)
        assert len(os.listdir("/proc/self/fd")) == opened
    finally:
        for fd in fds:
            os.close(fd)


def test_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        given = 0

        def inotify_init1(self, _flags: int) -> int:
            self.given += 1
            return os.open(os.devnull, os.O_RDONLY) if self.given < 3 else -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_a, **_k: Exhausted())
    assert inotify.left(8) == 2


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inotify, "taken", lambda uid: 128 if uid == 7 else 0)
    monkeypatch.setattr(inotify, "limit", lambda: 128)
    account = Account("virtd-dnsmasq", 7, 7)
    found = serverlaunch._explained("failed to create inotify: Too many open files", account)
    assert found is not None
    assert "processes of virtd-dnsmasq have 128 inotify instances" in found[0]
    assert "sysctl -w fs.inotify.max_user_instances=1024" in found[1]
    assert serverlaunch._explained("bad option at line 3 of /run/virtd/network/lab/dnsmasq.conf", account) is None
