# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many slots fit, at the exact edges of each limit."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from tests.doubles.fake_pid1 import FakePid1, put_new
from virtd.fdstore import Limit, Store, StoreFull
from virtd.fdstore.budget import NAMES_BYTES, names_bytes

if TYPE_CHECKING:
    pass


def limited(
    pid1: FakePid1,
    *,
    store_max: int | None = None,
    headroom: int = 0,
    files: int | None = None,
    direct: int | None = 128,
) -> Store:
    """A store under these limits; `files` stands for the soft limit that the unit would set."""
    environ = pid1.environment()
    if store_max is not None:
        environ["FDSTORE"] = str(store_max)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        return Store.from_environment(environ, headroom=headroom, direct=direct)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_store_fills_to_its_last_place_and_no_further(pid1: FakePid1) -> None:
    pid1.store_max = 3
    store = limited(pid1)
    store.room_for(["a/1", "a/2", "a/3"])
    with pytest.raises(StoreFull, match=r"no room for 4 descriptors.*FileDescriptorStoreMax allows 3"):
        store.room_for(["a/1", "a/2", "a/3", "a/4"])
    for n in range(3):
        put_new(store, f"a/{n}")
    assert store.budget()[:3] == (3, 3, Limit.STORE)
    assert store.budget().left == 0
    with pytest.raises(StoreFull, match=r"^no room for a/3 in the FD store: 3 slots are used") as caught:
        put_new(store, "a/3")
    assert caught.value.limited_by == "FileDescriptorStoreMax"
    assert "FileDescriptorStoreMax=" in caught.value.hint
    assert len(pid1.names()) == 3
    assert pid1.warnings == [], "something was sent that PID 1 wouldn't keep"
    store.room_for(["a/1", "a/2"])  # which are there already
    store.drop("a/0")
    put_new(store, "a/3")
    store.close()


def test_the_limit_on_open_files_counts_sockets_and_headroom(pid1: FakePid1) -> None:
    # Descriptors start at 3: of 20, ten for the daemon itself, seven are left.
    store = limited(pid1, files=20, headroom=10)
    store.room_for(f"a/{n}" for n in range(7))
    with pytest.raises(StoreFull) as caught:
        store.room_for(f"a/{n}" for n in range(8))
    assert caught.value.limited_by is Limit.FILES
    assert "LimitNOFILE=" in caught.value.hint
    assert store.budget()[:3] == (0, 7, Limit.FILES)
    store.close()

    inherited = {os.memfd_create("s"): "x.socket", os.memfd_create("t"): "y.socket"}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
    try:
        store = Store.from_environment(pid1.environment(), inherited=inherited, headroom=10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.budget().max == 5
    store.close()


def test_the_daemon_may_raise_its_own_limit_without_moving_the_budget(pid1: FakePid1) -> None:
    store = limited(pid1, files=50, headroom=0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 50
    assert store.budget().max == 47
    store.close()


def names_of_total(total: int, length: int = 200) -> list[str]:
    """Distinct names that make LISTEN_FDNAMES= exactly `total` bytes long."""
    names = [f"a/{n:0{length - 2}d}" for n in range((total - 15) // (length + 1) - 1)]
    rest = total - names_bytes(names) - 1
    names += (
        [f"b/{'x' * (rest // 2 - 3)}", f"c/{'x' * (rest - rest // 2 - 2)}"]
        if rest > 255
        else [f"b/{'x' * (rest - 2)}"]
    )
    assert names_bytes(names) == total
    return names


def test_the_names_fill_what_the_kernel_takes_and_no_byte_more(pid1: FakePid1) -> None:
    store = limited(pid1, store_max=100_000, files=None, direct=None)
    store.room_for(names_of_total(131_071))
    with pytest.raises(StoreFull) as caught:
        store.room_for(names_of_total(131_072))
    assert caught.value.limited_by is Limit.NAMES
    assert "shorter" in caught.value.hint
    store.close()


@pytest.mark.parametrize(("total", "starts"), [(NAMES_BYTES, True), (NAMES_BYTES + 1, False)])
def test_that_is_what_the_kernel_takes(total: int, starts: bool) -> None:
    variable = ":".join(names_of_total(total))
    assert len("LISTEN_FDNAMES=") + len(variable) == total

    def start() -> None:
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {"LISTEN_FDNAMES": variable}), 0)

    if starts:
        start()
    else:
        with pytest.raises(OSError, match="Argument list too long"):
            start()


def test_names_of_sockets_count(pid1: FakePid1) -> None:
    name = "s" * 200
    store = Store.from_environment(
        pid1.environment() | {"FDSTORE": "100000"}, inherited={os.memfd_create("s"): name}, headroom=0, direct=None
    )
    assert store.budget().names_bytes == 15 + 200
    store.room_for(names_of_total(131_071 - 201))
    with pytest.raises(StoreFull):
        store.room_for(names_of_total(131_071 - 200))
    store.close()


def test_the_estimate_follows_the_length_of_the_names(pid1: FakePid1) -> None:
    store = limited(pid1, store_max=100_000, direct=None)
    put_new(store, "a/" + "b" * 253)
    # The one that is there and its colon take 256; so will each of the others.
    assert store.budget()[:3] == (1, (NAMES_BYTES - 15 + 1) // 256, Limit.NAMES)
    store.close()


def test_without_fdstore_the_unit_has_none_unless_told(pid1: FakePid1) -> None:
    environ = {"NOTIFY_SOCKET": pid1.path}
    store = Store.from_environment(dict(environ))
    with pytest.raises(StoreFull, match=r"^no room for a/b: the unit has no FD store$") as caught:
        put_new(store, "a/b")
    assert "fallback_max=" in caught.value.hint
    store.close()
    store = Store.from_environment(dict(environ), fallback_max=2)
    put_new(store, "a/b")
    assert store.budget().max == 2
    store.close()
    # What systemd says counts for more.
    store = Store.from_environment(environ | {"FDSTORE": "7"}, fallback_max=2)
    assert store.budget().max == 7
    store.close()
