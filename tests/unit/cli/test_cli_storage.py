# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl pool and virtdctl volume, as their users see them: what is sent, what is printed, streams, completion."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.fake_daemon import Call, FakeDaemon
from virtd import errors
from virtd.cli import jobs, pool, transfer, volume

ROOT = Path(__file__).resolve().parents[3]
POOL = {
    "name": "default",
    "uuid": "u-1",
    "state": "active",
    "reason": "started by root",
    "since": "2026-11-23T02:47:54Z",
    "type": "directory",
    "path": "/srv/p",
    "capacity": 10 << 30,
    "allocation": 4 << 30,
    "available": 6 << 30,
    "autostart": True,
}
IDLE = {**POOL, "name": "idle", "state": "inactive", "capacity": None, "available": None, "autostart": False}
WEB = {
    "pool": "default",
    "name": "web1",
    "path": "/srv/p/web1",
    "format": "qcow2",
    "capacity": 10 << 30,
    "allocation": 196 << 10,
    "backing": {"pool": "default", "volume": "base"},
    "used_by": ["web1"],
    "job": None,
    "trouble": "",
}
JOB = {
    "job": "job-1",
    "verb": "clone",
    "pool": "default",
    "volume": "copy",
    "state": "running",
    "progress": 41.7,
    "since": None,
    "error": "",
}
DONE = {"pool": "default", "volume": "v", "job": ""}


# What is printed


def test_pools_are_listed(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Pool.List"] = {"objects": [POOL, IDLE]}
    lines = virtdctl("pool", "list").out.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "TYPE", "SIZE", "AVAILABLE", "AUTOSTART", "PATH"]
    assert lines[1].split() == ["default", "active", "directory", "10G", "6G", "yes", "/srv/p"]
    assert lines[2].split() == ["idle", "inactive", "directory", "-", "-", "no", "/srv/p"]
    assert lines[-1] == "2 pools listed."
    assert json.loads(virtdctl("pool", "list", "--json").out) == [POOL, IDLE]
    assert virtdctl("pool", "list", "--no-legend").out.splitlines()[0].startswith("default")


def test_a_pool_is_shown(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Pool.Info"] = {
        "object": POOL
        | {"pending": True, "definition_path": "/etc/x", "problems": [{"text": "lost", "hint": "find it"}]}
    }
    ran = virtdctl("pool", "info", "default")
    for text in ("default - directory pool u-1", "active (started by root)", "Used: 4G", "changed since the start",
                 "Problem: lost", "find it"):  # fmt: skip
        assert text in ran.out, ran.out
    daemon.answers["Pool.Dump"] = {"text": 'name = "default"\n'}
    assert virtdctl("pool", "dump", "default").out == 'name = "default"\n'
    assert json.loads(virtdctl("pool", "dump", "default", "--json").out) == {
        "name": "default",
        "text": 'name = "default"\n',
    }


def test_pools_are_refreshed(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Pool.Refresh"] = {"name": "default", "volumes": 2, "removed": ["job-7"]}
    assert virtdctl("pool", "refresh", "default").out == "Removed job-7, which was unfinished.\n"
    daemon.answers["Pool.Refresh"] = errors.InvalidState("Pool default isn't active", hint="Start it first")
    ran = virtdctl("pool", "refresh", "default")
    assert (ran.status, ran.out) == (1, "")
    assert "isn't active" in ran.err
    assert "Start it first" in ran.err


def test_volumes_are_listed(daemon: FakeDaemon, virtdctl: Any) -> None:
    others = [
        WEB | {"name": "a", "format": None, "backing": None, "used_by": []},
        WEB | {"name": "b", "backing": {"pool": "x", "volume": "y"}, "used_by": [], "job": "job-3"},
        WEB | {"name": "c", "used_by": [], "trouble": "it is marked as corrupt", "capacity": None},
        WEB | {"name": "d", "used_by": []},
    ]
    daemon.answers["Volume.List"] = {"objects": [WEB, *others]}
    rows = virtdctl("volume", "list", "default").out.splitlines()
    assert rows[0].split() == ["NAME", "FORMAT", "SIZE", "USED", "BACKING", "STATE"]
    assert rows[1].split(maxsplit=5) == ["web1", "qcow2", "10G", "196K", "base", "in use by web1"]
    assert [row.split(maxsplit=5)[5] for row in rows[2:6]] == [
        "of unknown format", "busy (job-3)", "unusable: it is marked as corrupt", "ready",
    ]  # fmt: skip
    assert rows[3].split()[4] == "x/y"
    assert rows[4].split()[2] == "-"
    assert daemon.asked("Volume.List") == [{"pool": "default"}]


def test_a_volume_is_shown(daemon: FakeDaemon, virtdctl: Any) -> None:
    chain = [{"pool": "default", "volume": "base", "format": "raw", "path": "/srv/p/base"}]
    shown = WEB | {"chain": chain, "snapshots": 2, "backing_of": ["default/top"], "trouble": "bad\x1b[2J"}
    daemon.answers["Volume.Info"] = {"object": shown}
    ran = virtdctl("volume", "info", "default", "web1")
    for text in ("web1 (pool default)", "Stands on: base (pool default, raw)", "Backs: default/top", "Snapshots: 2",
                 "Used by: web1"):  # fmt: skip
        assert text in ran.out, ran.out
    assert "\x1b" not in ran.out, "what an image says reaches no terminal unclean"
    found = [{"id": "1", "name": "before", "at": 0, "state": 5 << 20}]
    daemon.answers["Volume.Snapshots"] = {"objects": found}
    assert "1970-01-01 00:00:00" in virtdctl("volume", "snapshots", "default", "web1").out
    assert json.loads(virtdctl("volume", "snapshots", "default", "web1", "--json").out) == found


def test_jobs_are_listed(daemon: FakeDaemon, virtdctl: Any) -> None:
    failed = JOB | {"job": "job-2", "state": "failed", "progress": None, "error": "No space left on device"}
    daemon.answers["Volume.Jobs"] = {"objects": [JOB, failed]}
    rows = virtdctl("volume", "jobs").out.splitlines()
    assert rows[1].split() == ["job-1", "running", "42", "%", "clone", "default/copy", "-", "-"]
    assert rows[2].endswith(" No space left on device")
    assert json.loads(virtdctl("volume", "jobs", "--json").out) == [JOB, failed]


# What is sent


@pytest.mark.parametrize(
    ("words", "method", "expected"),
    [
        (["create", "p", "v", "10G"], "Create", {"size": "10G", "format": None, "backing": None}),
        (
            ["create", "p", "v", "--backing", "b", "--backing-pool", "q"],
            "Create",
            {"backing": "b", "backing_pool": "q"},
        ),
        (
            ["create", "p", "v", "1M", "--format", "qcow2", "--preallocation", "full"],
            "Create",
            {"preallocation": "full"},
        ),
        (["clone", "p", "a", "b", "--to-pool", "q"], "Clone", {"source": "a", "name": "b", "to_pool": "q"}),
        (["import", "p", "v", "/x/../y", "--from", "vmdk"], "Import", {"file": "/y", "source_format": "vmdk"}),
        (["import", "p", "v", "--probe"], "Import", {"file": None, "probe": True}),
        (["resize", "p", "v", "1G", "--shrink"], "Resize", {"size": "1G", "shrink": True}),
        (["wipe", "p", "v"], "Wipe", {"name": "v"}),
    ],
)
def test_what_is_asked_for(
    daemon: FakeDaemon, virtdctl: Any, words: list[str], method: str, expected: dict[str, Any]
) -> None:
    daemon.answers[f"Volume.{method}"] = DONE
    ran = virtdctl("volume", *words)
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    (sent,) = daemon.asked(f"Volume.{method}")
    assert sent["pool"] == "p"
    assert len(sent["token"]) == 16
    assert {key: sent.get(key) for key in expected} == expected


def test_a_call_that_broke_off_is_the_same_call(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Volume.Create"] = DONE
    daemon.dies_on.append("Volume.Create")
    assert virtdctl("volume", "create", "p", "v", "1M").status == 0
    first, second = daemon.asked("Volume.Create")
    assert first == second


def test_what_has_gone_meanwhile_was_deleted_by_us(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Volume.Delete"] = errors.NotFound("There is no volume v in pool p")
    assert virtdctl("volume", "delete", "p", "v").status != 0
    daemon.dies_on.append("Volume.Delete")
    assert virtdctl("volume", "delete", "p", "v").status == 0
    daemon.answers["Volume.Delete"] = lambda call: (_ for _ in ()).throw(
        errors.Busy(f"{call.parameters['name']} is busy")
    )
    ran = virtdctl("volume", "delete", "p", "v", "w")
    assert ran.status != 0
    assert "v is busy" in ran.err
    assert "w is busy" in ran.err, "one that can't be deleted keeps no other"


# Jobs


@pytest.mark.parametrize(
    ("state", "error", "status"),
    [("done", "", 0), ("failed", "No space left", 1), ("cancelled", "cancelled by root", 1)],
)
def test_a_job_is_waited_for(
    daemon: FakeDaemon, virtdctl: Any, monkeypatch: pytest.MonkeyPatch, state: str, error: str, status: int
) -> None:
    monkeypatch.setattr(jobs, "QUIET", 0.0)
    told = iter([JOB | {"progress": 5.0}, JOB | {"progress": 7.0}, JOB, JOB | {"state": state, "error": error}])
    daemon.answers["Volume.Clone"] = DONE | {"job": "job-1"}
    daemon.answers["Volume.Await"] = lambda _call: {"object": next(told)}
    ran = virtdctl("volume", "clone", "p", "a", "b")
    assert ran.status == status
    progress = [line for line in ran.err.splitlines() if line.startswith("Cloning a: ")]
    assert progress == ["Cloning a: 5 %", "Cloning a: 41 %"], "a line for each tenth that is reached"
    assert error in ran.err


def test_jobs_are_cancelled(daemon: FakeDaemon, virtdctl: Any) -> None:
    daemon.answers["Volume.Cancel"] = {"job": "job-1", "changed": True}
    assert virtdctl("volume", "cancel", "job-1", "job-2").status == 0
    assert sorted(call["job"] for call in daemon.asked("Volume.Cancel")) == ["job-1", "job-2"]


# Streams


def uploads(daemon: FakeDaemon, target: Path, offset: int = 0) -> None:
    """The daemon takes an upload into a file."""

    def upload(call: Call) -> None:
        fd = os.open(target, os.O_RDWR | os.O_CREAT)
        call.reply(DONE | {"job": "job-1", "offset": offset}, fds=(fd,))
        os.close(fd)

    daemon.answers["Volume.Upload"] = upload
    daemon.answers["Volume.Uploaded"] = DONE


def test_an_upload(daemon: FakeDaemon, virtdctl: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.write(b"begin")
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    uploads(daemon, target)
    assert virtdctl("volume", "upload", "p", "v", str(source)).status == 0
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20, "holes stay holes"
    assert daemon.asked("Volume.Upload")[0]["size"] == 8 << 20
    assert daemon.asked("Volume.Uploaded") == [{"job": "job-1"}]
    # Taken up again, nothing is written that is there already.
    data = source.read_bytes()
    target.write_bytes(b"X" * 100 + data[100 : 1 << 20])
    uploads(daemon, target, offset=1 << 20)
    assert virtdctl("volume", "upload", "--resume", "p", "v", str(source)).status == 0
    assert target.read_bytes() == b"X" * 100 + data[100:]
    ran = virtdctl("volume", "upload", "p", "v", str(tmp_path / "nothing"))
    assert ran.status == 1
    assert "Can't open" in ran.err


def test_an_upload_that_breaks_off_says_how_it_goes_on(daemon: FakeDaemon, virtdctl: Any, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)

    def upload(call: Call) -> None:
        fd = os.open("/dev/full", os.O_WRONLY)
        call.reply(DONE | {"job": "job-9", "offset": 0}, fds=(fd,))
        os.close(fd)

    daemon.answers["Volume.Upload"] = upload
    ran = virtdctl("volume", "upload", "p", "v", str(tmp_path / "source"))
    assert ran.status == 1
    assert "virtdctl volume upload --resume p v" in ran.err
    assert "virtdctl volume cancel job-9" in ran.err
    assert "No space left" in ran.err
    assert daemon.asked("Volume.Uploaded") == []


def test_a_download(daemon: FakeDaemon, virtdctl: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1 << 20))

    def download(call: Call) -> None:
        fd = os.open(source, os.O_RDONLY)
        call.reply({"pool": "p", "volume": "v", "format": "raw"}, fds=(fd,))
        os.close(fd)

    daemon.answers["Volume.Download"] = download
    assert virtdctl("volume", "download", "p", "v", str(target)).status == 0
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o600
    assert "--force" in virtdctl("volume", "download", "p", "v", str(target)).err
    target.write_bytes(b"longer" * (1 << 20))
    assert virtdctl("volume", "download", "--force", "p", "v", str(target)).status == 0
    assert target.read_bytes() == source.read_bytes()
    target.write_bytes(source.read_bytes()[:1000])
    assert virtdctl("volume", "download", "--resume", "p", "v", str(target)).status == 0
    assert target.read_bytes() == source.read_bytes()


def test_pipes(tmp_path: Path) -> None:
    """What was there already is read past; a device or pipe gets every byte."""
    data = os.urandom(100_000)
    (tmp_path / "part").write_bytes(data[:1000])
    reader, writer = os.pipe()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=writer) as source:
        os.close(writer)
        assert source.stdin is not None
        source.stdin.write(data)
        source.stdin.close()
        with open(tmp_path / "part", "r+b") as target:
            transfer.copy(reader, target.fileno(), 1000, "x")
    os.close(reader)
    assert (tmp_path / "part").read_bytes() == data


# Help, man page and completion


def _commands() -> list[tuple[str, str]]:
    return [("pool", verb) for verb in pool.COMMANDS] + [("volume", verb) for verb in volume.COMMANDS]


@pytest.mark.parametrize(("noun", "verb"), _commands())
def test_the_man_page_and_the_completion_know_each_option(virtdctl: Any, noun: str, verb: str) -> None:
    page = (ROOT / "packaging/man/virtdctl.1.rst").read_text()
    shown = virtdctl(noun, verb, "--help").out
    options = {word.strip(",;[]").split("=")[0] for word in shown.split() if word.startswith(("--", "[--"))}
    offered = complete(f"virtdctl {noun} {verb} --")
    assert verb in complete(f"virtdctl {noun} ")
    for option in options:
        assert option in page
        assert option in offered


# virtdctl as completion asks it.
ANSWERS = """
virtdctl() { case "$1 $2 $4" in
    "pool list "*) printf '%s\\n' 'default active directory' 'idle inactive directory' ;;
    "volume list default") printf '%s\\n' 'web1 qcow2' 'base raw' ;;
    "volume jobs "*) printf '%s\\n' 'job-1 running' 'job-2 done' ;;
esac; }
timeout() { shift; "$@"; }
compopt() { :; }
"""


def complete(line: str) -> list[str]:
    """What bash offers at the end of the line."""
    words = line.split(" ")
    script = f"""{ANSWERS}
        . {ROOT}/packaging/virtdctl.bash
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _virtdctl
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script, "bash", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("virtdctl po", ["pool"]),
        ("virtdctl vol", ["volume"]),
        ("virtdctl pool start ", ["idle"]),
        ("virtdctl pool stop ", ["default"]),
        ("virtdctl pool info ", ["default", "idle"]),
        ("virtdctl volume list ", ["default"]),
        ("virtdctl volume info default ", ["web1", "base"]),
        ("virtdctl volume delete default web1 b", ["base"]),
        ("virtdctl volume create default new --format ", ["raw", "qcow2"]),
        ("virtdctl volume create default new --backing ", ["web1", "base"]),
        ("virtdctl volume create default --backing web1 ", []),
        ("virtdctl volume clone default web1 new --to-pool ", ["default"]),
        ("virtdctl volume import default new --from v", ["vmdk", "vdi", "vhdx", "vpc"]),
        ("virtdctl volume cancel ", ["job-1"]),
        ("virtdctl volume wait job-1 ", []),
        ("virtdctl volume upload default new /etc/os-rel", ["/etc/os-release"]),
    ],
)
def test_completion(line: str, offered: list[str]) -> None:
    assert complete(line) == offered
