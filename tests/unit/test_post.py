# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the package's scriptlets do to the system, with a systemctl that only takes notes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "packaging" / "post"

# Answers from files in $HOST; anything else succeeds in silence.
SYSTEMCTL = """#!/bin/sh
echo "$@" >>"$HOST/calls"
case "$1" in
is-active) [ -e "$HOST/active" ] ;;
list-units) cat "$HOST/guests" ;;
reload|restart) [ ! -e "$HOST/broken" ] ;;
esac
"""


@dataclass
class Host:
    """A directory that stands for a host, and the script run on it."""

    path: Path

    def run(self, *args: str) -> str:
        ran = subprocess.run(
            [SCRIPT, *args],
            env={
                "PATH": f"{self.path}/bin",
                "HOST": str(self.path),
                "VIRTD_CODE_ID": f"{self.path}/code-id",
                "VIRTD_RUN": f"{self.path}/run",
                "VIRTD_BOOTED": f"{self.path}/booted",
                "VIRTD_SITELIB": f"{self.path}/lib",
                "VIRTD_UNITDIR": str(SCRIPT.parents[1] / "units"),
                "VIRTD_COMPILE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stdout
        assert "not found" not in ran.stdout
        return ran.stdout

    def calls(self) -> list[str]:
        notes = self.path / "calls"
        return notes.read_text().splitlines() if notes.exists() else []

    def runs_daemon(self, code_id: str | None) -> None:
        (self.path / "active").touch()
        if code_id is not None:
            (self.path / "run/daemon.json").write_text(f'{{"pid": 1, "code_id": "{code_id}", "version": "0.1.0"}}\n')

    def has_guests(self, *names: str) -> None:
        lines = [f"virtd-qemu-{name}.service loaded active running\n" for name in names]
        (self.path / "guests").write_text("".join(lines))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for directory in ("bin", "booted", "lib/virtd/drivers/qemu", "run/qemu/web1"):
        (tmp_path / directory).mkdir(parents=True)
    for tool in ("cat", "cp", "find", "install", "python3", "rm", "rmdir", "sed", "wc"):
        found = shutil.which(tool, path="/usr/bin:/bin")
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    for tool in ("systemctl", "systemd-sysusers", "systemd-tmpfiles", "journalctl"):
        program = tmp_path / "bin" / tool
        program.write_text(SYSTEMCTL if tool == "systemctl" else f'#!/bin/sh\necho {tool} "$@" >>"$HOST/calls"\n')
        program.chmod(0o755)
    (tmp_path / "code-id").write_text("0123abc\n")
    shutil.copy(SCRIPT.parents[1] / "virtd/drivers/qemu/powerdown.py", tmp_path / "lib/virtd/drivers/qemu")
    host = Host(tmp_path)
    host.has_guests()
    return host


def test_other_code_restarts(host: Host) -> None:
    host.runs_daemon("fff000")
    host.run("settled")
    assert host.calls()[-1] == "restart virtd.service"


def test_same_code_reloads(host: Host) -> None:
    host.runs_daemon("0123abc")
    host.run("settled")
    assert host.calls()[-1] == "reload virtd.service"
    assert "restart virtd.service" not in host.calls()


def test_unknown_code_restarts(host: Host) -> None:
    host.runs_daemon(None)
    host.run("settled")
    assert host.calls()[-1] == "restart virtd.service"


def test_a_stopped_daemon_stays_stopped(host: Host) -> None:
    host.run("settled")
    assert host.calls() == ["is-active --quiet virtd.service"]


def test_a_reload_that_fails_fails_nothing_else(host: Host) -> None:
    host.runs_daemon("0123abc")
    (host.path / "broken").touch()
    host.run("settled")
    assert host.calls()[-1] == "reload virtd.service"


def test_the_first_installation_follows_the_presets(host: Host) -> None:
    host.run("installed", "1")
    assert host.calls() == [
        "systemd-sysusers virtd.conf",
        "systemd-tmpfiles --create virtd.conf",
        "journalctl --update-catalog",
        "daemon-reload",
        "preset virtd.service virtd.socket",
    ]


def test_an_upgrade_leaves_what_is_enabled(host: Host) -> None:
    host.run("installed", "2")
    assert not [call for call in host.calls() if call.startswith(("preset", "enable", "start", "restart"))]


@pytest.mark.parametrize("step", [("installed", "1"), ("settled",), ("erasing",)])
def test_without_systemd_only_files_are_touched(host: Host, step: tuple[str, ...]) -> None:
    (host.path / "booted").rmdir()
    host.runs_daemon("fff000")
    host.run(*step)
    allowed = ("preset", "--quiet --no-reload disable", "systemd-", "journalctl")
    assert not [call for call in host.calls() if not call.startswith(allowed)]


def test_byte_code_is_checked_by_content(host: Host) -> None:
    module = host.path / "lib/virtd/one.py"
    module.write_text("x = 1\n")
    stale = host.path / "lib/virtd/gone/__pycache__/two.cpython-311.pyc"
    stale.parent.mkdir(parents=True)
    stale.touch()
    host.run("installed", "2")
    [compiled] = (host.path / "lib/virtd/__pycache__").glob("one.*.pyc")
    assert compiled.read_bytes()[4:8] == b"\x03\0\0\0", "PEP 552: hash-based, checked"
    assert not (host.path / "lib/virtd/gone").exists()


def test_erasing_without_guests_stops_all(host: Host) -> None:
    host.runs_daemon("0123abc")
    host.run("erasing")
    assert host.calls() == [
        "list-units --plain --no-legend --state=running virtd-*-*.service",
        "stop virtd.socket",
        "stop virtd.service",
        "--quiet --no-reload disable virtd.service virtd.socket",
    ]
    assert not list((host.path / "booted").iterdir())


def test_erasing_with_guests_keeps_their_descriptors(host: Host) -> None:
    host.runs_daemon("0123abc")
    host.has_guests("web1", "web2")
    said = host.run("erasing")
    assert "2 guest(s) keep running" in said
    assert not [call for call in host.calls() if call.startswith("stop")]
    assert host.calls()[-3:-1] == ["daemon-reload", "restart virtd.service"]
    keeper = (host.path / "booted/virtd.service").read_text()
    shipped = (SCRIPT.parents[1] / "units/virtd.service").read_text()
    for line in ("FileDescriptorStoreMax=4096", "FileDescriptorStorePreserve=yes", "LimitNOFILE=524288"):
        assert line in keeper
        assert line in shipped, "the keeper must hold as many descriptors as virtd did"
    assert (host.path / "booted/virtd.socket").exists()
    # What the guests' ExecStop= falls back on has to run without the package.
    helper = subprocess.run(
        [sys.executable, "-IS", host.path / "run/qemu/web1/guest-stop.py", "no.sock", "1"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert "no.sock: [Errno 2]" in helper.stderr


def test_installing_again_takes_over_from_the_keeper(host: Host) -> None:
    host.runs_daemon("0123abc")
    host.has_guests("web1")
    host.run("erasing")
    host.run("installed", "1")
    assert not list((host.path / "booted").iterdir())
    host.run("settled")
    assert host.calls()[-1] == "restart virtd.service", "the keeper is no daemon that could be reloaded"
