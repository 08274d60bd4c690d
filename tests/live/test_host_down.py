# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests when the host goes down: power-off, reboot, soft reboot, of a whole lab, with the daemon alive and dead."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import LAB, Lab, check
from tests.live import networks
from tests.live.conftest import SUITE
from tests.live.test_storage import define, volume
from tests.live.test_storage_domains import LOOP
from tests.live.tools import PID1S_OWN
from tests.proof.survival import containers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

# Warnings of systemd that say nothing of a guest's end: 262 looks for a controller that the lab hasn't got, and
# with PrivatePIDs= (257) PID 1 may hear of a process from its parent before that has ended and left it to PID 1.

# A network's service, or a pool's: what guests stand on. As it stops it writes down which guests are still there.
GROUND = """[Unit]
Description=What a guest stands on
Before=virtd-guests-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecStop=sh -c 'pgrep qemu >/var/tmp/guests; echo stopped >>/var/tmp/ground; cp /run/virtd/daemon.json /var/tmp'
[Install]
WantedBy=multi-user.target
"""
PREPARE = """
mkdir -p /var/log/journal && systemctl restart systemd-journald.service
truncate -s 1M /var/lib/virtd/images/deaf3.raw /var/lib/virtd/images/deaf6.raw
systemctl daemon-reload && systemctl enable --now ground.service
"""


@pytest.fixture
def lab(packages: dict[str, Path]) -> Iterator[Lab]:
    """A lab of the test's own, with three guests: one shuts down when it is asked, two don't, and have limits."""
    lab = Lab(f"down-{os.getpid()}")
    try:
        Lab.up(lab.name, "--suite", SUITE, "--rpm", str(packages["0.1.0"]), quiet=True)
        lab.write("/etc/systemd/system/ground.service", GROUND)
        lab.sh(PREPARE)
        device = lab.sh(LOOP.format(kind="ext4", size=16, quiet="-q")).strip()
        define(lab, f'name = "disks"\ntype = "filesystem"\npath = "/srv/disks"\nsource = "{device}"\n')
        lab.virtdctl("pool", "start", "disks")
        lab.sh(f"losetup -d {device}")  # once it is unmounted
        volume(lab, "create", "disks", "disk", "1M")
        disk = '[[disk]]\npool = "disks"\nvolume = "disk"\n'
        lab.define("polite", cmdline="virtd.rate=50", more=f"{disk}[tpm]\n", start=True)
        # Nobody is in these but a BIOS without anything to boot, which doesn't know of a power button.
        for name, limit in (("deaf3", 3), ("deaf6", 6)):
            disk = f'[[disk]]\npath = "/var/lib/virtd/images/{name}.raw"\n'
            lab.virtdctl(
                "define", "-", stdin=f'name = "{name}"\nmemory = "32M"\nhost_shutdown_timeout = {limit}\n{disk}'
            )
            lab.virtdctl("start", name)
        lab.wait_lines("polite", 20)
        yield lab
    finally:
        lab.down()


def root(lab: Lab) -> Path:
    return Path(subprocess.run([LAB, "path", lab.name], check=True, capture_output=True, text=True).stdout.strip())


def gone(lab: Lab) -> bool:
    listed = json.loads(subprocess.run([LAB, "list", "--json"], check=True, capture_output=True, text=True).stdout)
    return any(row["name"] == lab.name and row["state"] == "dead" for row in listed)


def journal(lab: Lab, *matches: str) -> list[dict[str, Any]]:
    """What the lab's journal has on disk, read from outside, oldest first."""
    command = ["journalctl", "-q", "-o", "json", f"--directory={root(lab)}/var/log/journal", *matches]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in said.splitlines()]


def guests_ended_well(lab: Lab) -> None:
    """All were asked at the same time; each had its own limit; what they stand on went after the last of them."""
    times: dict[str, dict[str, int]] = {}
    for name in ("polite", "deaf3", "deaf6"):
        found = times[name] = {}
        for entry in journal(lab, "_PID=1", f"UNIT=virtd-qemu-{name}.service"):
            found[str(entry["MESSAGE"]).split()[0]] = int(entry["__MONOTONIC_TIMESTAMP"])
        assert "Stopped" in found, f"{name} wasn't stopped by its unit: {found}"
        # QEMU ended by itself, by its guest's power-off or when it was told to quit: nobody had to kill it.
        warned = journal(lab, "_PID=1", f"UNIT=virtd-qemu-{name}.service", "-p", "warning")
        assert [said for entry in warned if not PID1S_OWN.search(said := str(entry["MESSAGE"]))] == []
    assert max(found["Stopping"] for found in times.values()) < min(found["Stopped"] for found in times.values())
    assert times["polite"]["Stopped"] < times["deaf3"]["Stopped"] < times["deaf6"]["Stopped"]
    for entry in journal(lab, "_PID=1", "UNIT=virtd-network-lab.service"):
        if str(entry["MESSAGE"]).startswith("Stopping"):
            assert int(entry["__MONOTONIC_TIMESTAMP"]) > times["deaf6"]["Stopped"], "its network went first"
    tpm = journal(lab, "_PID=1", "UNIT=virtd-qemu-polite@tpm.service")
    (stopped,) = (int(entry["__MONOTONIC_TIMESTAMP"]) for entry in tpm if str(entry["MESSAGE"]).startswith("Stopped"))
    assert stopped > times["polite"]["Stopped"], "a guest was still there when its TPM went"
    left = root(lab) / "var/tmp"
    assert (left / "ground").read_text() == "stopped\n"
    assert (left / "guests").read_text() == "", "a guest was still there when its network went"
    unmounted = [
        int(entry["__MONOTONIC_TIMESTAMP"])
        for entry in journal(lab, "_PID=1", "UNIT=srv-disks.mount")
        if "Unmount" in str(entry["MESSAGE"])
    ]
    assert unmounted
    assert max(unmounted) > times["polite"]["Stopped"]


def test_reboot_without_the_daemon_and_autostart(lab: Lab) -> None:
    lab.virtdctl("autostart", "deaf3")
    networks.define(lab, networks.network("lab", 1, head="autostart = true"))
    networks.define(lab, networks.network("idle", 2), start=False)
    lab.run("sh", "-c", containers.MAKE, stdin=containers.PROGRAM)
    mount = '[[mount]]\nsource = "/usr"\ntarget = "/usr"\nreadonly = true\n'
    text = f'name = "boxed"\nrootfs = "{containers.ROOT}"\ncommand = ["/steady", "20"]\n{mount}'
    lab.virtdctl("container", "define", "-", stdin=text)
    lab.virtdctl("container", "autostart", "boxed")
    lab.virtdctl("container", "start", "boxed")
    lab.sh("systemctl stop virtd.socket virtd.service; rm /run/virtd/daemon.json")
    lab.sh("systemctl reboot", check=False)
    lab.wait("the end of the lab", lambda: gone(lab), 60)
    guests_ended_well(lab)
    assert not (root(lab) / "var/tmp/daemon.json").exists(), "the daemon came back for it"
    lab.boot()
    lab.wait("the autostart", lambda: lab.info("deaf3")["state"] == "running", 30)
    lab.wait("the container's", lambda: lab.json("container", "info", "boxed")["state"] == "running", 60)
    lab.virtdctl("container", "stop", "boxed")
    assert {item["name"]: item["state"] for item in lab.json("list")} == {
        "deaf3": "running",
        "deaf6": "stopped",
        "polite": "stopped",
    }
    assert networks.info(lab, "lab")["state"] == "active"
    assert networks.info(lab, "idle")["state"] == "inactive"
    assert lab.slots() == 10


def test_soft_reboot_and_power_off(lab: Lab) -> None:
    """Guests run on; one that is to be started at boot, and was stopped by a person, isn't started by it."""
    lab.virtdctl("define", "-", stdin=lab.sh("sed s,deaf3,idle, /etc/virtd/qemu/deaf3.toml | grep -v uuid"))
    lab.virtdctl("autostart", "idle")
    pids = {item["name"]: item["pid"] for item in lab.json("list")}
    tpm = lab.info("polite")["tpm"]["pid"]
    if SUITE != "bookworm":  # systemd 252 has no soft reboot
        lab.soft_reboot()
        running = ("polite", "deaf3", "deaf6")
        lab.wait("the monitors", lambda: all(lab.info(name)["monitor"] == "connected" for name in running), 30)
        assert {item["name"]: item["pid"] for item in lab.json("list")} == pids
        assert lab.info("polite")["tpm"]["pid"] == tpm
        assert lab.slots() == 15
        number = check(lab.console("polite")).last
        lab.wait("more lines", lambda: check(lab.console("polite")).last > number, 20)
        assert lab.json("status")["problems"] == []
        lab.sh("rm -f /var/tmp/g*; systemctl restart ground.service; rm -f /var/tmp/g*")
    lab.sh("systemctl poweroff", check=False)
    lab.wait("the end of the lab", lambda: gone(lab), 60)
    guests_ended_well(lab)
    # The daemon was there until the end, and so the guest's last words are in its log.
    log = (root(lab) / "var/log/virtd/qemu/polite.console.log").read_bytes()
    assert b"power button" in log
    assert check(log).whole
