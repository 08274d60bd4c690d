# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the package's scriptlets do to the system, with a systemctl that only takes notes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "packaging" / "post"

# Answers from files in $HOST; anything else succeeds in silence.
SYSTEMCTL = """#!/bin/sh
echo "$@" >>"$HOST/calls"
case "$1" in
is-active) [ -e "$HOST/active" ] ;;
list-units) cat "$HOST/guests" ;;
show) if [ "$3" = ExecStop ]; then cat "$HOST/stops" 2>/dev/null; else cat "$HOST/pid"; fi ;;
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
                "VIRTD_PROC": f"{self.path}/proc",
                "VIRTD_SITELIB": f"{self.path}/lib",
                "VIRTD_UNITDIR": f"{self.path}/units",
                "VIRTD_COMPILE": "1",
                "VIRTD_FIREWALLD": f"{self.path}/firewalld",
                "VIRTD_LIB": f"{self.path}/lib",
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
        (self.path / "pid").write_text("17\n")
        (self.path / "proc/17").mkdir(parents=True)
        (self.path / "proc/17/stat").write_text(f"17 (virtd :-) x) S {' '.join(map(str, range(4, 60)))}\n")
        if code_id is not None:
            self.says(code_id)

    def says(self, code_id: str, pid: int = 17, start: str = '"start": 22, ') -> None:
        content = f'{{"version": "0.1.0", "pid": {pid}, {start}"code_id": "{code_id}"}}\n'
        (self.path / "run/daemon.json").write_text(content)

    def has_guests(self, *names: str) -> None:
        lines = [f"virtd-qemu-{name}.service loaded active running\n" for name in names]
        (self.path / "guests").write_text("".join(lines))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for directory in ("bin", "booted", "lib/virtd/drivers/qemu", "run/qemu/web1"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copytree(SCRIPT.parents[1] / "units", tmp_path / "units")
    for tool in ("cat", "cp", "find", "grep", "install", "mkdir", "rm", "rmdir", "sed", "sha256sum", "wc"):
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


def test_a_file_of_an_older_daemon_is_not_believed(host: Host) -> None:
    """/run was full when the daemon that runs was started."""
    host.runs_daemon(None)
    for pid, start in ((16, '"start": 22, '), (17, '"start": 21, '), (17, '"start": 2, ')):
        host.says("0123abc", pid, start)
        host.run("settled")
        assert host.calls()[-1] == "restart virtd.service", (pid, start)
    host.says("0123abc", start="")  # of a version that didn't write it
    host.run("settled")
    assert host.calls()[-1] == "reload virtd.service"


@pytest.mark.parametrize(("version", "there"), [("252 (252.39-1)", True), ("254 (v254)", False), ("", False)])
def test_what_an_old_systemd_cannot_do_itself(host: Host, version: str, *, there: bool) -> None:
    program = host.path / "bin/systemd-analyze"
    program.write_text(f"#!/bin/sh\necho 'systemd {version}'\necho +PAM\n")
    program.chmod(0o755)
    file = host.path / "units/virtd.service.d/50-hold-back.conf"
    if not there:
        file.parent.mkdir()
        file.touch()
    host.run("installed", "2")
    assert file.exists() == there
    if there:
        assert 'ExecStopPost=+-/bin/sh -c \'[ "$SERVICE_RESULT" = success ]' in file.read_text()
        host.run("erasing")
        assert not file.parent.exists()


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
    """It is made by the distribution's Python, which runs the daemon, whatever comes first in PATH."""
    other = host.path / "bin/python3"
    other.write_text('#!/bin/sh\necho another python3 >>"$HOST/calls"\n')
    other.chmod(0o755)
    module = host.path / "lib/virtd/one.py"
    module.write_text("x = 1\n")
    stale = host.path / "lib/virtd/gone/__pycache__/two.cpython-311.pyc"
    stale.parent.mkdir(parents=True)
    stale.touch()
    host.run("installed", "2")
    [compiled] = (host.path / "lib/virtd/__pycache__").glob("one.*.pyc")
    assert compiled.read_bytes()[4:8] == b"\x03\0\0\0", "PEP 552: hash-based, checked"
    assert not (host.path / "lib/virtd/gone").exists()
    assert "another python3" not in host.calls()


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
    # Only root's own way to a daemon that isn't there.
    assert [call for call in host.calls() if call.startswith("stop")] == ["stop virtd-root.socket"]
    assert host.calls()[-3:-1] == ["daemon-reload", "restart virtd.service"]
    keeper = (host.path / "booted/virtd.service").read_text()
    shipped = (SCRIPT.parents[1] / "units/virtd.service").read_text()
    for line in ("FileDescriptorStoreMax=4096", "FileDescriptorStorePreserve=yes", "LimitNOFILE=524288"):
        assert line in keeper
        assert line in shipped, "the keeper must hold as many descriptors as virtd did"
    assert (host.path / "booted/virtd.socket").exists()
    # What the guests' ExecStop= falls back on has to run without the package.
    helper = subprocess.run(
        [sys.executable, "-IS", host.path / "run/guest-stop.py", "no.sock", "1"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert "no.sock: [Errno 2]" in helper.stderr
    # Nothing is written where guests may.
    assert not list((host.path / "run/qemu/web1").iterdir())


def test_erasing_serves_guests_of_older_versions(host: Host) -> None:
    """Their ExecStop= looks in their own directory; what the guest has put there is replaced and not followed."""
    host.runs_daemon("0123abc")
    host.has_guests("web1")
    own = host.path / "run/qemu/web1"
    precious = host.path / "precious"
    precious.touch()
    (own / "guest-stop.py").symlink_to(precious)
    (host.path / "stops").write_text(f"argv[]=/bin/sh -c exec python3 -IS {own}/guest-stop.py x 1")
    host.run("erasing")
    assert precious.read_text() == ""
    assert (own / "guest-stop.py").read_text() == (host.path / "run/guest-stop.py").read_text()


def test_firewalld_reads_again_only_what_has_changed(host: Host) -> None:
    program = host.path / "bin/firewall-cmd"
    program.write_text('#!/bin/sh\necho firewall-cmd "$@" >>"$HOST/calls"\n')
    program.chmod(0o755)
    zone = host.path / "firewalld/zones/virtd.xml"
    zone.parent.mkdir(parents=True)
    reloads = []
    for text in ("one", "one", "two"):
        zone.write_text(text)
        host.run("installed", "2")
        reloads.append(host.calls().count("firewall-cmd --quiet --reload"))
    assert reloads == [1, 1, 2]


def test_installing_again_takes_over_from_the_keeper(host: Host) -> None:
    host.runs_daemon("0123abc")
    host.has_guests("web1")
    host.run("erasing")
    host.run("installed", "1")
    assert not list((host.path / "booted").iterdir())
    host.run("settled")
    assert host.calls()[-1] == "restart virtd.service", "the keeper is no daemon that could be reloaded"
