# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virtd.fdstore and its tests' fake PID 1 take for granted, tried on real ones."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.live.probe import UNIT, DaemonError, Probe, probe_in_lab
from virtd.fdstore import Difference, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

# The rules differ between these two; VIRTD_SUITE asks another one (forky) instead.
SUITES = [os.environ["VIRTD_SUITE"]] if "VIRTD_SUITE" in os.environ else ["trixie", "bookworm"]


@pytest.fixture(scope="module", params=SUITES)
def booted(request: pytest.FixtureRequest) -> Iterator[Probe]:
    with probe_in_lab("fdfacts", request.param) as probe:
        yield probe


@pytest.fixture
def probe(booted: Probe) -> Probe:
    booted.unit()
    assert booted.count() == 0
    return booted


@pytest.fixture
def modern(probe: Probe) -> Probe:
    """A systemd that can say what is in a store and keep it over a stop."""
    if probe.old:
        pytest.skip("systemd 254 or later")
    return probe


def test_last_words_come_back_only_with_fdpoll_0(probe: Probe) -> None:
    probe.does(
        """
for name in ("a/kept", "a/dropped"):
    reader, writer = os.pipe()
    os.write(writer, b"last words")
    if name == "a/kept":
        store.put(name, reader)
    else:
        raw(f"FDSTORE=1\\nFDNAME={name}", [reader])
    os.close(writer)
    os.close(reader)
store.barrier()
"""
    )
    probe.restart()
    assert list(probe.slots()) == ["a/kept"]
    assert probe.does("result = os.read(store.get('a/kept'), 100).decode()") == "last words"


def test_names_come_back_as_they_were(probe: Probe) -> None:
    names = [
        "qemu/web-1_x.y/console.log",
        "a/" + "b" * 253,
        "a b/~!@#$%^&*()=;'\" ",
        " /x",
        "a/b/c/d/e",
        "q/%n/$HOME",
    ]
    probe.does(f"for name in {names!r}: store.put(name, file())")
    probe.restart()
    assert sorted(probe.slots()) == sorted(names)


def test_a_name_that_the_store_refuses_would_be_lost(modern: Probe) -> None:
    for bad in ("a:b/c", "é/x", "a/" + "b" * 254, "a/\t"):
        modern.does(f"raw('FDSTORE=1\\nFDPOLL=0\\nFDNAME=' + {bad!r}, [file()]); store.barrier()")
    assert [entry.name for entry in modern.entries()] == ["stored"] * 4


def test_order_means_nothing_and_every_reload_turns_it(probe: Probe) -> None:
    probe.does("for n in range(20): store.put(f'a/{n}', file())")
    before = probe.slots()
    orders = []
    for _ in range(2):
        probe.systemctl("daemon-reload")
        probe.restart()
        orders.append(probe.does("result = [s.name for s in sorted(store.slots().values(), key=lambda s: s.fd)]"))
        assert probe.slots() == before
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_verify_agrees_with_pid1(modern: Probe) -> None:
    modern.does("for n in range(5): store.put(f'a/{n}', file())")
    modern.does("s = socket.socket(); store.put('a/sock', s.fileno()); store.put('a/pipe', os.pipe()[0])")
    modern.does("store.put('a/null', os.open('/dev/null', os.O_RDWR)); store.put('a/f', os.open('/etc/passwd', 0))")
    modern.does("store.put('a/pid', os.pidfd_open(os.getpid())); store.put('a/0', file()); store.drop('a/1')")
    assert not modern.difference()
    assert len(modern.entries()) == 9
    modern.restart()
    assert not modern.difference()
    modern.does("raw('FDSTOREREMOVE=1\\nFDNAME=a/2', []); raw('FDSTORE=1\\nFDNAME=b/new', [file()])")
    modern.does("raw('FDSTOREREMOVE=1\\nFDNAME=a/3', []); raw('FDSTORE=1\\nFDNAME=a/3', [file()])")
    modern.does("raw('FDSTORE=1\\nFDNAME=a/4', [file()])")
    assert modern.difference() == Difference(missing=("a/2",), unknown=("b/new",), mismatched=("a/3", "a/4"))


def test_a_barrier_is_no_proof(probe: Probe) -> None:
    probe.unit(FileDescriptorStoreMax=2)
    result = probe.does("for n in range(3): raw(f'FDSTORE=1\\nFDNAME=a/{n}', [file()])\nresult = store.barrier()")
    assert result is True
    assert probe.count() == 2


def test_one_open_file_keeps_its_first_name(probe: Probe) -> None:
    probe.does(
        "fd = file(); raw('FDSTORE=1\\nFDNAME=a/1', [fd]); raw('FDSTORE=1\\nFDNAME=a/2', [fd]); store.barrier()"
    )
    assert probe.count() == 1
    probe.restart()
    assert list(probe.slots()) == ["a/1"]


def test_removing_a_name_removes_all_of_it(probe: Probe) -> None:
    probe.does("for n in range(3): raw('FDSTORE=1\\nFDNAME=a/1', [file()])\nstore.barrier()")
    assert probe.count() == 3
    probe.restart()
    assert probe.does("result = [s.fd for s in store.duplicates()['a/1']]") == [3, 4, 5]
    kept = probe.does("s = store.duplicates()['a/1'][1]; result = list(store.resolve('a/1', s.dev, s.ino)[2:])")
    probe.does("store.barrier()")
    assert probe.count() == 1
    probe.restart()
    assert probe.slots() == {"a/1": kept}


def test_the_environment_says_how_many(probe: Probe) -> None:
    probe.unit(FileDescriptorStoreMax=17)
    assert probe.does("result = environ.get('FDSTORE')") == (None if probe.old else "17")
    assert probe.does("result = store.budget().store_max") == (1000 if probe.old else 17)
    probe.unit(FileDescriptorStoreMax=0, NotifyAccess="main")
    assert probe.does("result = environ.get('FDSTORE')") is None


def test_children_see_nothing_of_it(probe: Probe) -> None:
    probe.does("store.put('a/b', file())")
    probe.restart()
    seen = probe.does("import subprocess; result = subprocess.run(['env'], stdout=-1, text=True).stdout")
    assert "PATH=" in seen
    for key in ("LISTEN_", "NOTIFY_SOCKET", "FDSTORE"):
        assert key not in seen
    assert probe.does("result = sorted(key for key in environ if key.startswith('LISTEN_'))")[:3] == [
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
    ]


@pytest.mark.parametrize("way", ["restart", "kill", "reload", "reexec", "reexec-kill", "crash"])
def test_ways_that_keep_the_store(probe: Probe, way: str) -> None:
    probe.does("for n in range(3): store.put(f'a/{n}', file())")
    before = probe.slots()
    if "reload" in way:
        probe.systemctl("daemon-reload")
    if "reexec" in way:
        probe.systemctl("daemon-reexec")
    if "kill" in way:
        probe.systemctl("kill", "-s", "KILL", UNIT)
        probe.systemctl("start", UNIT)
    if "crash" in way:
        with pytest.raises(json.JSONDecodeError):
            probe.does("os._exit(3)")
        probe.systemctl("start", UNIT)
    probe.restart()
    assert probe.slots() == before


@pytest.mark.parametrize("way", ["stop", "reexec-kill-stop", "reload-stop"])
def test_a_stop_keeps_it_since_systemd_254(probe: Probe, way: str) -> None:
    probe.does("for n in range(3): store.put(f'a/{n}', file())")
    before = probe.slots()
    if "reload" in way:
        probe.systemctl("daemon-reload")
    if "reexec" in way:
        probe.systemctl("daemon-reexec")
    if "kill" in way:
        probe.systemctl("kill", "-s", "KILL", UNIT)
        probe.systemctl("start", UNIT)
    probe.systemctl("stop", UNIT)
    if not probe.old:
        assert probe.lab.show(UNIT, "SubState")["SubState"] == "dead-resources-pinned"
    probe.systemctl("start", UNIT)
    assert probe.slots() == ({} if probe.old else before)


def fails_to_start(probe: Probe) -> str:
    """The exit status of a restart that must not work."""
    probe.lab.write(f"/etc/systemd/system/{UNIT}.d/zz.conf", "[Service]\nRestart=no\n")
    try:
        probe.systemctl("daemon-reload")
        probe.systemctl("restart", UNIT, check=False)
        assert probe.lab.show(UNIT, "ActiveState")["ActiveState"] == "failed"
        return probe.lab.show(UNIT, "ExecMainStatus")["ExecMainStatus"]
    finally:
        probe.run("rm", f"/etc/systemd/system/{UNIT}.d/zz.conf")
        probe.systemctl("daemon-reload")


def test_the_limit_on_open_files_is_where_the_budget_has_it(probe: Probe) -> None:
    limit = 64
    probe.unit(LimitNOFILE=limit)
    # All that could be passed, which leaves none for the daemon: that is what the headroom is for.
    assert probe.does("result = store.budget()[:3]") == [0, limit - 3, "LimitNOFILE"]
    headroom = 30
    fill = (
        "for n in range({}):\n fd = file(); raw(f'FDSTORE=1\\nFDNAME=a/{{n}}', [fd]); os.close(fd)\nstore.barrier()"
    )
    probe.does(fill.format(limit - 3 - headroom))
    probe.restart()
    assert len(probe.slots()) == limit - 3 - headroom
    probe.does(fill.format(headroom))
    # Far past it, systemd itself can't lay them out any more.
    probe.does(
        "for n in range(70):\n fd = file(); raw(f'FDSTORE=1\\nFDNAME=b/{n}', [fd]); os.close(fd)\nstore.barrier()"
    )
    assert probe.count() > limit
    assert fails_to_start(probe) == "202"


def test_the_names_may_fill_the_kernels_limit_and_no_more(probe: Probe) -> None:
    # 511 names of 255 bytes with their colons, LISTEN_FDNAMES= and one more name: 131,071 bytes to the last.
    probe.does("for n in range(511):\n fd = file(); store.put(f'a/{n:0253d}', fd); os.close(fd)")
    rest = Store.from_environment({}, inherited={}).budget().names_bytes_max - 15 - 511 * 256
    with pytest.raises(DaemonError, match=r"StoreFull.*LISTEN_FDNAMES"):
        probe.does(f"store.put('b/' + 'x' * {rest - 1}, file())")
    assert probe.does(f"store.put('b/' + 'x' * {rest - 2}, file()); result = store.budget()[:3]") == [
        512,
        512,
        "LISTEN_FDNAMES",
    ]
    probe.restart()
    assert len(probe.slots()) == 512
    assert probe.does("result = len(environ['LISTEN_FDNAMES']) + 15") == 131_071
    probe.does(f"store.drop('b/' + 'x' * {rest - 2}); raw('FDSTORE=1\\nFDNAME=b/' + 'x' * {rest - 1}, [file()])")
    assert fails_to_start(probe) == "203"


def test_a_stopped_unit_that_nothing_refers_to_is_forgotten(modern: Probe) -> None:
    """Which is why virtd has a socket unit, and the README says to enable the service."""
    modern.does("store.put('a/b', file())")
    modern.systemctl("disable", UNIT)
    try:
        modern.systemctl("stop", UNIT)
        # systemctl show would load it again.
        units = modern.systemctl("list-units", "--all", "--plain", "--no-legend", UNIT)
        assert bool(units.strip()) == (modern.lab.version() >= 261)
        modern.systemctl("start", UNIT)
        assert list(modern.slots()) == (["a/b"] if modern.lab.version() >= 261 else [])
    finally:
        modern.systemctl("enable", UNIT)
