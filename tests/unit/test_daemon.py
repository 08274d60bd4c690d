# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's own small things; what it does as a whole is for tests/live."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_pid1 import FakePid1, put_new
from virtd import __version__, errors
from virtd.daemon import announce, load_settings
from virtd.fdstore import Store
from virtd.model.settings import Settings
from virtd.paths import Paths, names
from virtd.systemd.storecheck import dropped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(str(tmp_path))
    os.makedirs(paths.etc)
    return paths


def test_no_settings_are_the_defaults(paths: Paths) -> None:
    assert load_settings(paths) == (Settings(), None)


def test_settings(paths: Paths) -> None:
    Path(paths.settings).write_text('[log]\nmax_size = "1M"\n')
    settings, problem = load_settings(paths)
    assert (settings.log.max_bytes, problem) == (1 << 20, None)


@pytest.mark.parametrize(
    "content", [b"[log", b"[log]\nmax_size = 1", b"\xff", b"x = 1", b'[qemu]\nuser = ""\nuser = ""', b"[" * 5000]
)
def test_bad_settings_are_a_problem_and_no_obstacle(paths: Paths, content: bytes) -> None:
    Path(paths.settings).write_bytes(content)
    settings, problem = load_settings(paths)
    assert settings == Settings()
    assert problem is not None
    assert problem.message.startswith(paths.settings)


def test_settings_that_are_no_file(paths: Paths) -> None:
    os.mkdir(paths.settings)
    settings, problem = load_settings(paths)
    assert settings == Settings()
    assert problem is not None
    assert "can't be read" in problem.message


def test_paths(tmp_path: Path) -> None:
    assert Paths().definition("qemu", "web1") == "/etc/virtd/qemu/web1.toml"
    assert Paths("/x").record("qemu", "web1") == "/x/run/virtd/qemu/web1.json"
    for name in ("b.toml", "a.toml", ".c.toml.new", ".d.toml", "e.toml~", "f.json"):
        (tmp_path / name).touch()
    assert names(str(tmp_path), ".toml") == ["a", "b"]
    assert names(str(tmp_path / "none"), ".toml") == []


def virtd(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from virtd.daemon import main; sys.exit(main())", *arguments]


def test_version() -> None:
    run = subprocess.run(virtd("--version"), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, f"virtd {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["start"], ["--version", "x"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    run = subprocess.run(virtd(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: virtd")


def test_it_serves_without_systemd_and_ends_on_sigterm(paths: Paths, tmp_path: Path) -> None:
    """Run by hand, with no bus and bad settings: it answers, says what is wrong, and ends with status 0 when told."""
    Path(paths.settings).write_text("nonsense")
    environ = {
        "PATH": os.environ["PATH"],
        "VIRTD_ROOT": str(tmp_path),
        "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/no-bus",
    }
    with subprocess.Popen(virtd(), cwd=ROOT, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            status = ask(paths.socket, "org.virtd1.Status", process)["status"]
            assert (status["pid"], status["version"]) == (process.pid, __version__)
            assert status["recovered"]["objects"] == 0
            assert "not run by systemd: nothing is kept across a restart" in status["degraded"]
            assert any(problem["object"] == "settings" for problem in status["problems"])
            assert ask(paths.socket, "org.virtd1.List", process) == {"objects": []}
            with open(f"{paths.run}/daemon.json") as file:
                assert json.load(file)["pid"] == process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def ask(path: str, method: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """One call, waiting for the daemon to be there."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(json.dumps({"method": method}).encode() + b"\0")
                data = b""
                while not data.endswith(b"\0"):
                    data += client.recv(65536)
                answer: dict[str, Any] = json.loads(data[:-1])["parameters"]
                return answer
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def store(pid1: FakePid1) -> Iterator[Store]:
    store = Store.from_environment(pid1.environment())
    for n in range(4):
        put_new(store, f"a/{n}")
    yield store
    store.close()


def looked_at(pid1: FakePid1, store: Store, count: Callable[[], int]) -> tuple[int, int]:
    """What `dropped` finds when that many are told of, by one who reads his messages."""

    async def told() -> int:
        return count()

    async def look() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        loop.add_reader(pid1.fileno(), pid1.read)
        try:
            return await dropped(store, told)
        finally:
            loop.remove_reader(pid1.fileno())

    return asyncio.run(look())


def test_what_systemd_has_dropped_is_given_back(pid1: FakePid1, store: Store) -> None:
    pid1.read()
    gone = pid1.entries.pop(1)
    os.close(gone.fd)
    assert looked_at(pid1, store, lambda: len(pid1.names())) == (0, 4)
    assert pid1.names() == store.names()


def test_what_systemd_has_no_room_for(pid1: FakePid1, store: Store) -> None:
    assert looked_at(pid1, store, lambda: len(pid1.names()) - 1) == (1, 4)


def test_what_ends_meanwhile_was_not_dropped(pid1: FakePid1, store: Store) -> None:
    """As what ended while the daemon was away does, which is put away in these moments."""
    ending = ["a/3", "a/2", "a/1"]

    def count() -> int:
        had = len(pid1.names())
        for name in ending:
            store.drop(name)
        there = had - len(ending)
        ending.clear()
        return there

    put_new(store, "a/5")
    assert looked_at(pid1, store, count) == (0, 2)


def test_no_word_of_an_older_daemon_stays(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """/run is full: the package's scriptlet mustn't go by what the daemon before this one wrote."""
    os.makedirs(paths.run)
    stale = Path(paths.run, "daemon.json")
    stale.write_text('{"pid": 1, "code_id": "0123abc"}')

    def full(path: str, *_args: object, **_more: object) -> None:
        raise errors.HostError(f"Cannot write {path}: No space left on device")

    monkeypatch.setattr("virtd.files.write", full)
    announce(paths)
    assert not stale.exists()


def test_events_that_an_older_virtd_did_not_record_are_missed(paths: Paths) -> None:
    """Whoever subscribes from a number that it knew before is to learn of the gap."""
    os.makedirs(paths.run)
    log = Path(paths.events)
    log.touch()
    announce(paths)  # no virtd is known to have kept it
    assert not log.exists()
    log.touch()
    announce(paths)
    assert log.exists()
    older = Path(paths.run, "daemon.json")
    older.write_text('{"version": "0.1.0", "pid": 1, "code_id": "0123abc"}')
    announce(paths)
    assert not log.exists()
